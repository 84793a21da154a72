"""The model on encoders of many architectures: what it computes for a sentence is the sentence's alone."""

import copy
import math
import shutil

import pytest
import torch
from conftest import LONG, SMALL_PRIMING, command, folder_of, random_encoder

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


@pytest.mark.parametrize("architecture", ["FNet", "ConvBert", "Nystromformer", "Yoso"])
def test_an_encoder_that_mixes_the_sentences_of_a_batch_is_refused(architecture, demo):
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
    model = adapters.Tagger(encoder, 7).eval()
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


def test_packed_rows_hold_little_padding(demo):
    encoder, _, sentences = demo
    model, shapes = adapters.Tagger(encoder, 7).double(), []
    model.choose_packing(sentences)
    hook = encoder.register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape))
    with torch.no_grad():
        model.encode(sentences[:200])
    hook.remove()
    pieces = sum(len(sentence.pieces) for sentence in sentences[:200])
    assert 0.8 * sum(map(math.prod, shapes)) <= pieces <= sum(map(math.prod, shapes))


def test_bf16_runs_the_encoder_in_bf16_and_keeps_theta_in_float32(demo):
    encoder, _, sentences = demo
    gradients = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = adapters.Tagger(copy.deepcopy(encoder).float(), 7, bottleneck=8).eval()
        model.choose_packing(sentences)
        model.bf16 = bf16
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


def test_an_encoder_without_biases_is_refused_for_bitfit():
    encoder = random_encoder("ModernBert", 50, norm_bias=False)
    with pytest.raises(ValueError, match="modernbert has no part for bitfit"):
        adapters.Tagger(encoder, 7, "bitfit")


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
    optimizer, scheduler = prime.adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], 1e-2, 10)
    batches = [[(demo[2][:5], demo[2][5:10])]]
    steps = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=prime.tag_loss,
        optimizer=optimizer, scheduler=scheduler, encode=torch.no_grad()(model.encode_sets),
    )
    with pytest.raises(ValueError, match="do not depend on theta_p: does encode detach"):
        next(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
