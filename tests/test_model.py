"""The model on encoders of many architectures: what it computes for a sentence is the sentence's alone."""

import copy
import random
import shutil

import pytest
import torch
from conftest import EXTRA, LONG, SMALL_PRIMING, command, folder_of, random_encoder

import adapters
import prime

EMBEDDING = {"embedding_size": 16}
FIRST_POSITION = {  # of a sentence in a packed row
    "the demo's": 0, "Bert": 0, "DistilBert": 0, "Electra": 0, "Albert": 0, "ModernBert": 0, "RoFormer": 0,
    "Roberta": 2, "XLMRoberta": 2, "MPNet": 2,  # after the index of padding, which is 1 here
    "DebertaV2": None, "Deberta": None, "MobileBert": None,  # a row a sentence
}


def encoder_of(architecture, demo):
    encoder, tokenizer, _ = demo
    if architecture == "the demo's":
        return encoder
    more = EMBEDDING if architecture in ("Electra", "Albert", "RoFormer") else {}
    if architecture == "MobileBert":  # it looks at the words beside, and padding has to be its padding
        more = {"pad_token_id": 0}
    return random_encoder(architecture, len(tokenizer), **more)


@pytest.mark.parametrize("architecture", FIRST_POSITION)
def test_encoding_equals_one_sentence_at_a_time(architecture, demo):
    sentences = demo[2]
    encoder = encoder_of(architecture, demo)
    model = adapters.Tagger(encoder, 7).double().eval()
    model.choose_packing(sentences)
    assert model.first_position == FIRST_POSITION[architecture]
    chosen = [*sentences[:60], max(sentences, key=lambda sentence: len(sentence.pieces))]
    if architecture == "the demo's":
        chosen += sentences[60:290]  # more than are encoded at once
    with torch.no_grad():
        for encoded, sentence in zip(model.encode(chosen), chosen, strict=True):
            hidden = encoder(input_ids=torch.tensor([sentence.pieces])).last_hidden_state[0]
            torch.testing.assert_close(encoded.features, hidden[sentence.first], rtol=0, atol=1e-11)
            assert encoded._replace(features=None) == sentence


def test_a_tagger_that_has_measured_nothing_gives_each_sentence_a_row(demo):
    model = adapters.Tagger(copy.deepcopy(demo[0]), 7)
    rows, word_embeddings = [], model.encoder.get_input_embeddings()
    word_embeddings.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.double().encode(demo[2][:20])
    model.choose_packing(demo[2])
    model.encode(demo[2][:20])
    assert rows[0] == 20 > rows[-1]


def test_a_bert_that_looks_back_alone_gets_a_row_a_sentence_and_stays_causal(demo):
    encoder = random_encoder("Bert", len(demo[1]), is_decoder=True)
    model = adapters.Tagger(encoder, 7).double().eval()
    model.choose_packing(demo[2])
    assert model.first_position is None
    last = demo[2][0].pieces[:-1] + [7]
    both = model.encode([demo[2][0], demo[2][0]._replace(pieces=last), demo[2][1]])
    until = sum(position < len(last) - 1 for position in demo[2][0].first)
    assert torch.equal(both[0].features[:until], both[1].features[:until])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("architecture", ["FNet", "ConvBert", "Nystromformer", "Yoso"])
def test_an_encoder_that_mixes_the_sentences_of_a_batch_is_refused(architecture, bf16, demo):
    encoder = random_encoder(architecture, len(demo[1])).float()
    alone, longer = (torch.tensor(demo[2][k].pieces)[None] for k in (0, 1))
    if alone.shape[1] > longer.shape[1]:
        alone, longer = longer, alone
    width = longer.shape[1]
    batch = torch.ones(2, width, dtype=torch.int64)
    batch[0, : alone.shape[1]], batch[1] = alone[0], longer[0]
    mask = (torch.arange(width) < torch.tensor([[alone.shape[1]], [width]])).long()
    mask = {} if architecture == "FNet" else {"attention_mask": mask}
    with torch.no_grad():
        together = encoder(batch, **mask).last_hidden_state[0, : alone.shape[1]]
        hidden = encoder(alone).last_hidden_state[0]
        assert (together - hidden).norm() > 1e-6 * hidden.norm()  # in float32 others have under 1e-7
    model = adapters.Tagger(encoder, 7, bf16=bf16).eval()
    with pytest.raises(ValueError, match=f"{architecture.lower()} mixes the sentences"):
        model.choose_packing(demo[2])


def test_fnet_ends_the_command_with_one_line(demo, tmp_path):
    fnet = folder_of(random_encoder("FNet", len(demo[1])), tmp_path / "fnet")
    done = command("prime.py", *LONG, "--model", fnet, "--output", tmp_path / "out", status=2)
    (line,) = done.stderr.splitlines()
    assert "fnet mixes the sentences of a batch" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("length, fits", [(130, True), (131, False), (132, False)])
def test_positions_of_roberta_begin_after_the_index_of_padding(length, fits, demo, tmp_path):
    encoder = random_encoder("Roberta", len(demo[1]), max_position_embeddings=132)
    roberta = folder_of(encoder, tmp_path / "roberta")
    flags = [*LONG, "--model", roberta, "--max-length", length, "--steps", 1, "--output", tmp_path / "out"]
    done = command("prime.py", *flags, status=0 if fits else 2)
    if not fits:
        (line,) = done.stderr.splitlines()
        assert f"--max-length {length}" in line and "Error: " in line


def test_packing_keeps_every_sentence_and_wastes_little(demo):
    model = adapters.Tagger(demo[0], 7)
    model.first_position = 0
    chance = random.Random(0)
    lengths = [chance.randint(4, 60) for _ in range(256)]
    rows = model.pack(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) == max(lengths)
    assert sum(lengths) >= 0.95 * len(rows) * max(lengths)


def test_bf16_runs_the_encoder_in_bf16_and_keeps_theta_in_float32(demo):
    encoder, _, sentences = demo
    gradients = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = adapters.Tagger(copy.deepcopy(encoder).float(), 7, bottleneck=8, bf16=bf16).eval()
        model.choose_packing(sentences)
        assert model.first_position == 0
        kinds = set()
        query = model.encoder.encoder.layer[0].attention.self.query
        query.register_forward_hook(lambda *given, kinds=kinds: kinds.add(given[2].dtype))
        prime.tag_loss(model, sentences[:16]).backward()
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for part in model.sets() for p in part.values()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize(
    "architecture, ends",
    [
        ("Bert", ["attention.output.dense", "output.dense"]),
        ("Roberta", ["attention.output.dense", "output.dense"]),
        ("Electra", ["attention.output.dense", "output.dense"]),
        ("DistilBert", ["attention.out_lin", "ffn.lin2"]),
        ("MPNet", ["attention.attn.o", "output.dense"]),
        ("ModernBert", ["attn.Wo", "mlp.Wo"]),
    ],
)
def test_houlsby_stands_after_each_block_and_before_the_skip_connection(architecture, ends):
    """An adapter that adds a constant is a block whose last bias is larger by it."""
    more = {"attention_bias": True, "mlp_bias": True} if architecture == "ModernBert" else {}
    plain, changed = (random_encoder(architecture, 50, **more) for _ in range(2))
    model = adapters.Tagger(copy.deepcopy(plain), 7, "houlsby", 8).double().eval()
    layer = "layers" if architecture == "ModernBert" else "layer"
    places = [f"{layer}.{k}.{end}" for k in range(2) for end in ends]
    named = dict(changed.named_modules())
    blocks = [module for place in places for name, module in named.items() if name.endswith(place)]
    with torch.no_grad():
        for adapter, block in zip(model.adapters, blocks, strict=True):
            adapter.up.weight.zero_()
            adapter.up.bias.copy_(torch.randn(16))
            block.bias.add_(adapter.up.bias)
        ids = torch.arange(2, 12)[None]
        expected = changed(input_ids=ids).last_hidden_state
        ours = model.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert (expected - plain(input_ids=ids).last_hidden_state).abs().max() > 0.1


@EXTRA
def test_lora_adds_twice_the_product_of_its_factors(demo):
    plain = copy.deepcopy(demo[0])
    model = adapters.Tagger(copy.deepcopy(demo[0]), 7, "lora", 8).double().eval()
    factors, changed = model.sets()[1], []
    with torch.no_grad():
        for factor in factors.values():
            factor.add_(0.02 * torch.randn_like(factor))  # the second factors start at zero
        for name, factor in factors.items():
            if "lora_B" in name:
                changed.append(name.removeprefix("encoder.").partition(".lora_B")[0])
                weight = plain.get_submodule(changed[-1]).weight
                weight.add_(2 * factor @ factors[name.replace("lora_B", "lora_A")])
        assert {name.rpartition(".")[2] for name in changed} == {"query", "value"}
        assert len(changed) == 2 * demo[0].config.num_hidden_layers
        ids = torch.tensor([demo[2][0].pieces])
        expected = plain(input_ids=ids).last_hidden_state
        ours = model.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert (expected - demo[0](input_ids=ids).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize(
    "architecture, more, pe, told",
    [
        ("FNet", {}, "houlsby", "fnet has not two blocks a layer that we know"),
        ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 2}, "houlsby", "gpt2 has not two blocks"),
        ("ModernBert", {"norm_bias": False}, "bitfit", "modernbert has no parameters for bitfit"),
    ],
)
def test_an_encoder_without_the_parts_of_a_method_is_refused(architecture, more, pe, told):
    encoder = random_encoder(architecture, 50, **more)
    with pytest.raises(ValueError, match=told):
        adapters.Tagger(encoder, 7, pe)


def test_a_parameter_without_a_gradient_does_no_harm(demo, tmp_path):
    """RoFormer's positions are fixed sinusoids, kept as a parameter."""
    encoder = random_encoder("RoFormer", len(demo[1]), **EMBEDDING)
    folder = folder_of(encoder, tmp_path / "roformer")
    flags = [*SMALL_PRIMING, "--model", folder, "--data", "demo/wikiann", "--output", tmp_path / "out"]
    command("prime.py", *flags)
    assert (tmp_path / "out/priming.json").exists()
    shutil.rmtree(tmp_path / "out")


def test_a_hoist_that_detaches_theta_p_from_the_query_sets_is_told(demo):
    model = adapters.Tagger(copy.deepcopy(demo[0]), 7, bottleneck=8).double().eval()
    theta_p, theta_a, theta_h = model.sets()
    before = copy.deepcopy(model.state_dict())
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-2, 10)
    batches = [[(demo[2][:5], demo[2][5:10])]]
    steps = prime.prime(model, theta_p, theta_a, theta_h, batches, prime.tag_loss, optimizer, schedule,
                        hoist=torch.no_grad()(model.hoist))
    with pytest.raises(ValueError, match="no gradient reaches θp"):
        next(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
