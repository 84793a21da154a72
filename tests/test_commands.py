"""The commands on the demo: each row of Table 1, each PE method, and what is kept."""

import copy
import itertools
import json
import math
import shutil
import statistics
import sys
from argparse import Namespace

import pytest
import torch
from conftest import (
    DEMO, HERE, HINDI, PE, PRIMING, SMALL_PRIMING, SMALL_TUNING, START, TAGS, TUNING, TYPES, command, moved,
    read_results, tensors,
)

import adapters
import finetune
import prime

HIDDEN = 96  # of the demo's encoder
THETA_A = {
    "adapter.down.weight": (8, HIDDEN), "adapter.down.bias": (8,),
    "adapter.up.weight": (HIDDEN, 8), "adapter.up.bias": (HIDDEN,),
}
THETA_H = {"head.weight": (7, HIDDEN), "head.bias": (7,)}


def theta_p():
    """Of the demo's encoder, under the names that it has in the model; the pooler is in no set."""
    named = tensors("demo/encoder").items()
    return {f"encoder.{name}": tensor for name, tensor in named if not name.startswith("pooler.")}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def parameters_of(pe):
    """θp and θa by their names in a BERT of two layers: what the files on disk are held to."""
    pretrained = set(theta_p())
    theta_a = {
        "bitfit": {name for name in pretrained if name.endswith("bias")},
    }[pe]
    return pretrained, theta_a


# ---- Table 1: what moves ----


@pytest.mark.parametrize("row", PRIMING)
def test_priming_moves_exactly_theta_p_and_theta_a(row, table):
    primed = table[row][0] / "primed"
    before, after = tensors("demo/encoder"), tensors(primed)
    assert after.keys() == before.keys()
    assert {f"encoder.{name}" for name in moved(after, before)} == theta_p().keys()
    theta_a = tensors(primed, "adapter.safetensors")
    assert shapes(theta_a) == THETA_A and all(p.any() for p in theta_a.values())  # biases start at zero


def test_each_way_of_priming_gives_another_theta(table):
    primed = {row: tensors(table[row][0] / "primed") for row in PRIMING}
    for row, other in itertools.combinations(PRIMING, 2):
        assert moved(primed[row], primed[other])


@pytest.mark.parametrize("row", range(1, 8))
def test_row_updates_exactly_its_parameters(row, table):
    folder, _ = table[row]
    pretrained = theta_p()
    expected = {**THETA_H, **(THETA_A if row > 2 else {}), **(shapes(pretrained) if row == 1 else {})}
    tuned = tensors(folder / "tuned/hi-0", "tuned.safetensors")
    assert shapes(tuned) == expected
    updated = sum(map(math.prod, expected.values()))
    frozen = 0 if row == 1 else sum(p.numel() for p in pretrained.values())
    line = read_results(folder / "results")[0]
    assert (line["updated"], line["parameters"]) == (updated, updated + frozen)
    assert line["share"] == updated / (updated + frozen)
    if row == 1:
        assert moved({name: tuned[name] for name in pretrained}, pretrained) == pretrained.keys()
    if row in PRIMING:
        theta_a_star = tensors(folder / "primed", "adapter.safetensors")
        assert moved(theta_a_star, tuned) == theta_a_star.keys()


@pytest.mark.parametrize("moves", ["full", "head", *PE])
def test_fine_tuning_leaves_the_rest_bit_identical(moves, demo):
    encoder, _, sentences = demo
    tune, pe = (moves, "adapter") if moves in ("full", "head") else ("adapter", moves)
    args = Namespace(
        tune=tune, pe=pe, init="none", load=None, bottleneck=8, bf16=False, device="cpu", types=TYPES,
        epochs=2, min_steps=0, batch_size=8, lr=1e-2,
    )
    encoder, untouched = (copy.deepcopy(encoder).float() for _ in range(2))
    model, tuned = finetune.start(args, encoder, {}, 0, sentences[:40])
    model.double()
    before = copy.deepcopy(model.state_dict())
    finetune.tune(args, model, tuned, sentences[:40], 0)
    still = {name for name in tuned if name.endswith("key.bias")}  # attention does not depend on it
    assert tuned.keys() - still <= moved(model.state_dict(), before) <= tuned.keys()
    assert not moved(encoder.state_dict(), untouched.state_dict())  # the next run starts from the same


@pytest.mark.parametrize("pe", PE[1:])
def test_each_pe_method_is_primed_tuned_saved_and_loaded(pe, tmp_path):
    """What is saved is the plain encoder, under its own names, and θa."""
    from transformers import AutoModel

    pretrained, theta_a = parameters_of(pe)
    base, plain = [*HINDI, *SMALL_TUNING, "--results", tmp_path / "r"], tensors("demo/encoder")
    for method in ("meta", "ft"):
        output = tmp_path / method
        flags = [*SMALL_PRIMING, "--pe", pe, "--method", method, "--output", output]
        command("prime.py", *DEMO, *flags)
        after, primed = tensors(output), tensors(output, "adapter.safetensors")
        assert after.keys() == plain.keys() and primed.keys() == theta_a
        assert {f"encoder.{name}" for name in moved(after, plain)} == pretrained
        if pe == "bitfit":  # θa is a part of the encoder
            assert not moved(primed, {f"encoder.{name}": p for name, p in after.items()})
        assert not moved(after, AutoModel.from_pretrained(output).state_dict())
        command("finetune.py", *base, "--init", output, "--save", tmp_path / f"{method}-tuned",
                "--seeds", 0, 1)
        for seed in (0, 1):  # which both start from θa*
            tuned = tensors(tmp_path / f"{method}-tuned/hi-{seed}", "tuned.safetensors")
            assert tuned.keys() == {*theta_a, *THETA_H} and moved(primed, tuned) == theta_a
        command("finetune.py", *base, "--load", tmp_path / f"{method}-tuned/hi-1")
        _, tuned_line, again = read_results(tmp_path / "r")[-3:]
        assert again["f1"] == tuned_line["f1"] and again["updated"] == sum(p.numel() for p in tuned.values())
    command("finetune.py", *base, *START, "--pe", pe, "--bottleneck", 8)
    assert read_results(tmp_path / "r")[-1]["updated"] == again["updated"]


@pytest.mark.parametrize("pe", PE)
def test_second_order_runs_from_the_command_and_gives_another_theta(pe, tmp_path):
    for name, flags in (("first", []), ("second", ["--second-order"])):
        command("prime.py", *DEMO, *SMALL_PRIMING, "--pe", pe, *flags, "--output", tmp_path / name)
    assert moved(tensors(tmp_path / "first"), tensors(tmp_path / "second"))


@pytest.mark.parametrize(
    "method, pe, more",
    [("meta", "adapter", []), ("maml", "adapter", ["--second-order"]), ("ft", "adapter", []),
     ("meta", "bitfit", ["--second-order"])],
)
def test_flags_reach_algorithm_1_and_dropout_is_on_in_ft_priming(method, pe, more, monkeypatch, tmp_path):
    seen = Namespace(tasks=[])

    def spy(model, *, theta_p, theta_a, theta_h, batches, **settings):
        seen.training = {module.training for module in model.modules()}
        seen.settings = settings
        for tasks in batches:
            seen.tasks += [[len(part) for part in task] for task in tasks]
            for parameter in [*theta_p.values(), *theta_a.values()]:
                parameter.grad = torch.zeros_like(parameter)
            yield [0.0] * len(tasks)

    monkeypatch.setattr(prime, "prime", spy)
    flags = ["--steps", "3", "--inner-steps", "2", "--inner-lr", "0.2", "--tasks", "4", "--pe", pe, *more]
    flags += ["--support", "5", "--query", "6", "--limit-train", "20", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prime.py", *DEMO, "--method", method, *flags])
    prime.main()
    told = seen.settings
    assert seen.training == {method == "ft"}
    assert (told["maml"], told["second_order"], told["inner_lr"]) == (method == "maml", bool(more), 0.2)
    assert told["inner_steps"] == (0 if method == "ft" else 2)
    assert told["encode"] is None or pe == "adapter"  # only where it is exact
    assert seen.tasks == 3 * 4 * [[0, 11] if method == "ft" else [5, 6]]


@pytest.mark.parametrize("tune", ["adapter", "head", "full"])
def test_dropout_is_on_in_full_fine_tuning_alone_and_off_in_scoring(tune, demo, monkeypatch):
    modes = set()

    def spy(model, batch):
        modes.update(module.training for module in owner.modules())
        return loss(model, batch)

    loss = prime.tag_loss
    monkeypatch.setattr(prime, "tag_loss", spy)
    args = Namespace(
        tune=tune, pe="adapter", init="none", load=None, bottleneck=8, bf16=False, device="cpu", types=TYPES,
        epochs=1, min_steps=0, batch_size=8, lr=1e-2,
    )
    owner, tuned = finetune.start(args, copy.deepcopy(demo[0]).train(), {}, 0, demo[2][:8])
    finetune.tune(args, owner.double(), tuned, demo[2][:8], 0)
    finetune.predict(owner, demo[2][:8], TAGS)
    assert modes == {tune == "full"} and not any(module.training for module in owner.modules())


def test_features_are_computed_once_where_theta_p_stays(tmp_path, monkeypatch):
    encoded, encode = [], adapters.Tagger.encode

    def spy(self, sentences):
        encoded.append(len(sentences))
        return encode(self, sentences)

    monkeypatch.setattr(adapters.Tagger, "encode", spy)
    monkeypatch.setattr(adapters.Tagger, "choose_packing", lambda *given: None)
    base = [*HINDI, *SMALL_TUNING, *START, "--seeds", 0, 1, "--results", tmp_path / "r"]
    for tune in ("adapter", "head"):
        encoded.clear()
        command("finetune.py", *base, "--tune", tune)
        assert encoded == [60]
    encoded.clear()
    command("finetune.py", *base, "--tune", "full")
    assert encoded == 2 * [*2 * [16, 14], 30]


# ---- what is kept ----


def test_same_seed_same_bytes_another_seed_others(table, primed, tmp_path):
    def priming_bytes(folder):
        return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]

    for seed in (0, 1):
        command("prime.py", *DEMO, *SMALL_PRIMING, "--seed", seed, "--output", tmp_path / str(seed))
    first, again, other = (priming_bytes(folder) for folder in (primed, tmp_path / "0", tmp_path / "1"))
    assert first == again and all(a != b for a, b in zip(first, other))
    outputs = ["--results", tmp_path / "results", "--save", tmp_path]
    command("finetune.py", *HINDI, *SMALL_TUNING, *TUNING[3], *outputs)
    folders = (tmp_path / "hi-0", *sorted((table[3][0] / "tuned").iterdir()))
    again, seed_0, seed_1 = ((folder / "tuned.safetensors").read_bytes() for folder in folders)
    assert again == seed_0 != seed_1


def test_results_have_every_setting_and_the_table_its_means(table):
    folder, stdout = table[4]
    lines = read_results(folder / "results")
    runs = [(line["target"], line["seed"], line["seeds"], line["tune"]) for line in lines]
    assert runs == [("hi", 0, [0], "adapter"), ("hi", 1, [1], "adapter")]
    told = {
        "epochs": 2, "batch_size": 16, "lr": 3e-3, "train_sentences": 30, "test_sentences": 30,
        "init": str(folder / "primed"), "model": "demo/encoder", "bottleneck": 8, "split": "test",
        "max_length": 128, "data": "demo/wikiann", "types": TYPES,
        "priming": json.loads((folder / "primed/priming.json").read_text()),
    }
    scores = {"f1", "precision", "recall"}
    assert all(told.items() <= line.items() and scores <= line.keys() for line in lines)
    f1 = [line["f1"] for line in lines]
    row = ["hi", f"{statistics.mean(f1):.2f}", f"{statistics.stdev(f1):.2f}", "2"]
    assert stdout.splitlines()[-1].split() == row


def test_one_seed_has_no_spread_and_no_nan(tmp_path):
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi")
    shutil.copytree("demo/wikiann/af", tmp_path / "data/af")
    flags = ["--data", tmp_path / "data", *SMALL_TUNING, *START, "--results", tmp_path / "r"]
    stdout = command("finetune.py", "--tgt", "hi", "af", *flags).stdout
    f1 = [f"{line['f1']:.2f}" for line in read_results(tmp_path / "r")]
    rows = [line.split() for line in stdout.splitlines()[-2:]]
    assert rows == [["hi", f1[0], "-", "1"], ["af", f1[1], "-", "1"]] and "nan" not in stdout.lower()


def test_few_sentences_get_the_epochs_that_make_the_steps(tmp_path):
    base = [*HINDI, *SMALL_TUNING, *TUNING[3]]
    tuned = []
    for epochs, steps in ((2, 0), (1, 3), (1, 2)):  # an epoch of 30 sentences has two steps
        name = f"{epochs}-{steps}"
        outputs = ["--save", tmp_path / name, "--results", tmp_path / f"{name}"]
        command("finetune.py", *base, "--epochs", epochs, "--min-steps", steps, *outputs)
        tuned.append(tensors(tmp_path / name / "hi-0", "tuned.safetensors"))
    four, three_at_least, two = tuned
    assert not moved(four, three_at_least) and moved(four, two) == four.keys()


def test_primed_loads_elsewhere(primed):
    from transformers import AutoModel, AutoTokenizer

    assert not moved(tensors(primed), AutoModel.from_pretrained(primed).state_dict())
    text, elsewhere = "Delhi is a city .", AutoTokenizer.from_pretrained(HERE / "demo/encoder")
    assert AutoTokenizer.from_pretrained(primed)(text) == elsewhere(text)
    record = json.loads((primed / "priming.json").read_text())
    assert record["bottleneck"] == 8 and len(record["last_losses"]) == 2 and record["versions"]["torch"]
    assert record["src"] == ["en", "es"] and record["types"] == TYPES
    assert not {path.suffix for path in primed.iterdir()} - {".json", ".safetensors"}


def test_split_chooses_what_is_scored(table, tmp_path):
    """The validation split under the name of the test split has the same score; the test split another."""
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi")
    shutil.copy("demo/wikiann/hi/validation.txt", tmp_path / "data/hi/test.txt")
    flags = ["--tgt", "hi", "--load", table[4][0] / "tuned/hi-1", "--results", tmp_path / "r"]
    command("finetune.py", *flags, "--data", "demo/wikiann", "--split", "validation")
    command("finetune.py", *flags, "--data", tmp_path / "data")
    command("finetune.py", *flags, "--data", "demo/wikiann")
    lines = read_results(tmp_path / "r")
    validation, renamed, test = ((line["f1"], line["test_sentences"]) for line in lines)
    assert validation == renamed != test
