"""What an encoder computes for a sentence depends on that sentence only, whatever the architecture, and
prime() refuses wrong arguments before it updates anything."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import adapters
import prime
from conftest import SLOW_PRIMING, SMALL_PRIMING, command, random_encoder, save_encoder
from test_prime import SmallModel, assert_refused, make_tasks, small_loss

EMBEDDING = {"embedding_size": 16}
PACKED = ["the demo's", "Bert", "Roberta", "XLMRoberta"]
NOT_PACKED = [
    "causal Bert", "causal Roberta", "causal XLMRoberta", "DistilBert", "Electra", "Albert", "ModernBert", "RoFormer",
    "MPNet", "DebertaV2", "Deberta", "MobileBert"]


def make_encoder(architecture, demo):
    encoder, tokenizer, _ = demo
    if architecture == "the demo's":
        return encoder
    more = EMBEDDING if architecture in ("Electra", "Albert", "RoFormer") else {}
    if architecture == "MobileBert":  # it reads neighbouring pieces, so padding must be its padding piece
        more = {"pad_token_id": 0}
    if architecture.startswith("causal "):
        more = {"is_decoder": True}
    return random_encoder(architecture.removeprefix("causal "), len(tokenizer), **more)


@pytest.mark.parametrize("architecture", [*PACKED, *NOT_PACKED])
def test_features_equal_those_of_one_sentence_at_a_time(architecture, demo):
    sentences, encoder = demo[2], make_encoder(architecture, demo)
    model = adapters.Tagger(encoder, 7).double().eval()
    assert model.packs == (architecture in PACKED)
    chosen = [*sentences[:60], max(sentences, key=lambda s: len(s.input_ids))]
    if architecture == "the demo's":
        chosen += sentences[60:290]  # more than one chunk of `encode`
    with torch.no_grad():
        for encoded, sentence in zip(*model.encode_sets([chosen]), chosen, strict=True):
            hidden = encoder(input_ids=torch.tensor([sentence.input_ids])).last_hidden_state[0]
            torch.testing.assert_close(encoded.features, hidden[sentence.word_starts], rtol=0, atol=1e-11)
            assert encoded._replace(features=None) == sentence


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "XLMRoberta"])
def test_a_causal_encoder_is_not_packed_and_stays_causal(architecture, demo):
    model = adapters.Tagger(make_encoder(f"causal {architecture}", demo), 7).double().eval()
    assert not model.packs
    sentence, other = demo[2][:2]
    changed = sentence._replace(input_ids=sentence.input_ids[:-1] + [7])
    (encoded,) = model.encode_sets([[sentence, changed, other]])
    unchanged = sum(start < len(sentence.input_ids) - 1 for start in sentence.word_starts)
    assert torch.equal(encoded[0].features[:unchanged], encoded[1].features[:unchanged])


@pytest.mark.parametrize("architecture", ["FNet", "ConvBert", "Nystromformer", "Yoso"])
def test_encoders_whose_features_depend_on_padding_end_the_command_with_one_line(architecture, demo, tmp_path):
    encoder = random_encoder(architecture, len(demo[1]), embedding_size=16)
    folder = save_encoder(encoder, tmp_path / "encoder")
    flags = [*SLOW_PRIMING, "--model", folder, "--steps", 1, "--output", tmp_path / "out"]
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    assert f"{folder}: padding changes its features" in line and not (tmp_path / "out").exists()


def test_a_tokenizer_without_word_ids_ends_the_command_with_one_line(demo, tmp_path):
    folder = save_encoder(random_encoder("Bert", 400), tmp_path / "encoder")
    for path in folder.glob("*token*"):
        path.unlink()
    transformers.ByT5Tokenizer().save_pretrained(folder)
    flags = [*SLOW_PRIMING, "--model", folder, "--steps", 1, "--output", tmp_path / "out"]
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    assert "word_ids() is not available" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("length, fits", [(130, True), (131, False), (132, False)])
def test_positions_of_roberta_start_after_the_padding_index(length, fits, demo, tmp_path):
    encoder = random_encoder("Roberta", len(demo[1]), max_position_embeddings=132)
    roberta = save_encoder(encoder, tmp_path / "roberta")
    flags = [*SLOW_PRIMING, "--model", roberta, "--max-length", length, "--steps", 1, "--output", tmp_path / "out"]
    output = command("prime.py", *flags, status=0 if fits else 2)
    if not fits:
        (line,) = output.stderr.splitlines()
        assert f"--max-length {length}: the encoder has 132 positions" in line


def test_packed_rows_hold_little_padding(demo):
    encoder, _, sentences = demo
    model, shapes = adapters.Tagger(encoder, 7).double(), []
    hook = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    with hook, torch.no_grad():
        model.encode_sets([sentences[:200]])
    pieces = sum(len(s.input_ids) for s in sentences[:200])
    assert 0.8 * sum(map(math.prod, shapes)) <= pieces <= sum(map(math.prod, shapes))


def test_bf16_runs_the_encoder_in_bf16_and_keeps_theta_in_float32(demo):
    encoder, _, sentences = demo
    grads = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = adapters.Tagger(copy.deepcopy(encoder).float(), 7, bottleneck=8, bf16=bf16).eval()
        assert model.packs
        dtypes = set()
        query = model.encoder.encoder.layer[0].attention.self.query
        query.register_forward_hook(lambda module, args, output, dtypes=dtypes: dtypes.add(output.dtype))
        adapters.tag_loss(model, sentences[:16]).backward()
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        sets = model.split_parameters()
        grads.append(torch.cat([p.grad.flatten() for p in {**sets.p, **sets.a, **sets.h}.values()]))
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert 1e-4 < error < 5e-2


def test_an_encoder_without_biases_is_refused_for_bitfit():
    encoder = random_encoder("ModernBert", 50, norm_bias=False)
    with pytest.raises(adapters.UserError, match="--pe bitfit: the encoder has no such parameters"):
        adapters.Tagger(encoder, 7, "bitfit")


def test_priming_works_with_a_parameter_that_gets_no_gradient(demo, tmp_path):
    """RoFormer keeps its fixed sinusoidal positions as a parameter."""
    encoder = random_encoder("RoFormer", len(demo[1]), **EMBEDDING)
    roformer = save_encoder(encoder, tmp_path / "roformer")
    flags = [*SMALL_PRIMING, "--model", roformer, "--data", "demo/wikiann", "--output", tmp_path / "out"]
    command("prime.py", *flags)
    assert (tmp_path / "out/priming.json").exists()


# ---- wrong arguments of prime() ----


def optimized(args):
    return args["optimizer"].param_groups[0]["params"]


def tie_the_head_to_the_adapter(args):
    args["model"].h.weight = args["theta_h"]["h.weight"] = args["model"].g.weight


def loss_without_adapter(model, batch):
    return nn.functional.cross_entropy(model.h(model.features(batch[0])), batch[1])


def loss_without_head(model, batch):
    return nn.functional.cross_entropy(model.g(model.features(batch[0])), batch[1])


def detach_features(args):
    args["encode"] = torch.no_grad()(args["model"].encode_sets)


@pytest.mark.parametrize(
    "message, break_it",
    [
        ("^f.weight .*is not the model's", lambda args: args.update(model=copy.deepcopy(args["model"]))),
        ("theta_.* must be dicts", lambda args: args.update(theta_a=[*args["theta_a"]])),
        ("^f.weight .*disjoint", lambda args: args["theta_a"].update(args["theta_p"])),
        ("^f.weight .*disjoint", lambda args: args["theta_h"].update(args["theta_p"])),
        ("^g.weight .*disjoint", lambda args: args["theta_h"].update(args["theta_a"])),
        ("^h.weight .*disjoint", tie_the_head_to_the_adapter),
        ("^f.weight .*frozen", lambda args: args["model"].f.weight.requires_grad_(False)),
        ("^h.bias .*frozen", lambda args: args["model"].h.bias.requires_grad_(False)),
        ("^theta_p is empty", lambda args: args["theta_p"].clear()),
        ("theta_a and theta_h are", lambda args: (args["theta_a"].clear(), args["theta_h"].clear())),
        ("^f.bias: the optimizer must hold theta_p", lambda args: optimized(args).pop(1)),
        ("^g.weight: the optimizer must hold theta_a", lambda args: optimized(args).pop(2)),
        ("^h.weight: the optimizer must not hold theta_h", lambda args: optimized(args).append(args["model"].h.weight)),
        ("^f.bias is not the model's",  # each of two sets has a "bias": the model's names tell them apart
         lambda args: args["theta_a"].update({"f.bias": args["theta_a"].pop("g.bias")})),
        (r"in no set, of shapes \[\(5,\)\]", lambda args: optimized(args).append(args["model"].constant)),
        (r"in no set, of shapes \[\(1,\)\]", lambda args: optimized(args).append(nn.Parameter(torch.ones(1)))),
        ("list of .* pairs", lambda args: args["batches"][0].clear()),
        ("list of .* pairs", lambda args: args["batches"][0].append((1, 2, 3))),
        ("list of .* pairs", lambda args: args["batches"][0].append({"input_ids": 1, "labels": 2})),
        ("list of .* pairs", lambda args: args["batches"][0].append(torch.ones(2, 2))),
        ("cannot be generators", lambda args: args["batches"][0].append((iter([1]), 2))),
        ("loss must return a scalar .*not 1.0", lambda args: args.update(loss=lambda *_: 1.0)),
        ("loss must return a scalar .*not None", lambda args: args.update(loss=lambda *_: None)),
        ("loss must return a scalar", lambda args: args.update(loss=lambda model, batch: model(batch[0]))),
        ("depends on the parameters", lambda args: args.update(loss=lambda *_: torch.tensor(1.0))),
        ("depends on the parameters", lambda args: args.update(loss=torch.no_grad()(small_loss))),
        ("support set does not depend on theta_a", lambda args: args.update(loss=loss_without_adapter)),
        ("support set does not depend on theta_h", lambda args: args.update(loss=loss_without_head)),
        ("query losses does not depend on theta_p", detach_features),
        ("inner_steps must be", lambda args: args.update(inner_steps=-1)),
        ("inner_steps must be", lambda args: args.update(inner_steps=2.0)),
        ("inner_lr must be", lambda args: args.update(inner_lr=-0.1)),
        ("inner_lr must be", lambda args: args.update(inner_lr=float("nan"))),
        ("encode returned 1 and 1 sets", lambda args: args.update(encode=lambda sets: sets[1:])),
        ("encode returned 4 and 4 sets", lambda args: args.update(encode=lambda sets: 2 * sets)),
        ("ReduceLROnPlateau", lambda args: args.update(scheduler=ReduceLROnPlateau(args["optimizer"]))),
    ],
)
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_wrong_arguments_are_refused_before_any_update(inner_steps, message, break_it):
    model = SmallModel()
    theta_p, theta_a, theta_h = model.split_parameters()
    args = {
        "model": model, "theta_p": theta_p, "theta_a": theta_a, "theta_h": theta_h, "loss": small_loss,
        "optimizer": torch.optim.AdamW([*theta_p.values(), *theta_a.values()]),
        "batches": [make_tasks(2)], "inner_steps": inner_steps,
    }
    break_it(args)
    assert_refused(prime.prime(**args), model, message)


def test_no_grad_and_a_distributed_model_and_no_steps_are_refused(tmp_path):
    model = SmallModel()
    theta_p, theta_a, theta_h = model.split_parameters()
    optimizer = torch.optim.AdamW([*theta_p.values(), *theta_a.values()])
    args = {"theta_p": theta_p, "theta_a": theta_a, "theta_h": theta_h, "batches": [make_tasks(1)],
            "loss": small_loss, "optimizer": optimizer}
    with torch.no_grad():
        assert_refused(prime.prime(model, **args), model, "torch.no_grad")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_refused(prime.prime(wrapped, **args), model, "pass model.module")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        prime.adamw_with_linear_decay(theta_p.values(), 1e-3, 0)


@pytest.mark.parametrize("maml", [False, True])
def test_a_module_with_two_names_gets_its_own_parameters_back(maml):
    """Its parameters are replaced once, and the meta-gradient is that of a deep copy moved by SGD."""
    torch.manual_seed(0)
    first = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(4, 5), first, nn.Tanh(), first, nn.Linear(5, 3)).double()
    support, query = ((torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(2))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    copied, before = copy.deepcopy(model), dict(model.named_parameters())
    moving = copied.parameters() if maml else [*copied[1].parameters(), *copied[4].parameters()]
    sgd = torch.optim.SGD(moving, lr=0.1)
    for _ in range(5):
        copied.zero_grad()
        loss(copied, support).backward()
        sgd.step()
    copied.zero_grad()
    loss(copied, query).backward()
    theta_p, theta_a, theta_h = ({n: p for n, p in before.items() if n[0] == k} for k in "014")
    optimizer = torch.optim.SGD([*theta_p.values(), *theta_a.values()], lr=0.0)
    for _ in prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[[(support, query)]],
        loss=loss, optimizer=optimizer, inner_lr=0.1, maml=maml,
    ):
        pass
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    for name, p in copied.named_parameters():
        if name[0] in "01":
            torch.testing.assert_close(after[name].grad, p.grad, rtol=0, atol=1e-14)


def step_with_changes(change, names=("f.weight", "f.bias")):
    """Two meta steps of a small model whose θp has the given names, with a change between them."""
    model = SmallModel()
    named, (_, theta_a, theta_h) = dict(model.named_parameters()), model.split_parameters()
    theta_p = {name: named[name] for name in names}
    optimizer = torch.optim.SGD([*theta_p.values(), *theta_a.values()], lr=0.1)
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[make_tasks(2), make_tasks(2)],
        loss=small_loss, optimizer=optimizer)
    next(meta_training)
    change(model, theta_p, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, before, meta_training


def test_a_module_that_is_replaced_between_two_steps_is_refused():
    def replace_the_head(model, theta_p, optimizer):
        model.h = nn.Linear(5, 3).double()

    model, _, meta_training = step_with_changes(replace_the_head)
    assert_refused(meta_training, model, "^h.weight is not the model's")


def test_an_optimizer_that_gets_a_parameter_of_no_set_between_two_steps_is_refused():
    def add_the_constant(model, theta_p, optimizer):
        optimizer.add_param_group({"params": [model.constant]})

    model, _, meta_training = step_with_changes(add_the_constant)
    assert_refused(meta_training, model, r"in no set, of shapes \[\(5,\)\]")


def test_a_parameter_that_joins_theta_p_between_two_steps_is_updated():
    def unfreeze_the_bias(model, theta_p, optimizer):
        theta_p["f.bias"] = model.f.bias
        optimizer.add_param_group({"params": [model.f.bias]})

    model, before, meta_training = step_with_changes(unfreeze_the_bias, names=["f.weight"])
    next(meta_training)
    assert not torch.equal(before["f.bias"], model.f.bias)
