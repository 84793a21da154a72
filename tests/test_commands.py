"""The two commands on the demo: each row of Table 1, each PE method, and what they write."""

import copy
import itertools
import json
import math
import shutil
import statistics

import pytest
import torch
from conftest import (
    DEMO, FROM_PRETRAINED, HERE, HINDI, PRIMING, SMALL_PRIMING, SMALL_TUNING, TUNING, TYPES, command,
    moved, read_results, score_saved, tensors,
)
from torch import nn

import adapters
import prime

HIDDEN = 96  # of the demo's encoder
ADAPTER_SHAPES = {
    "adapter.down.weight": (8, HIDDEN), "adapter.down.bias": (8,),
    "adapter.up.weight": (HIDDEN, 8), "adapter.up.bias": (HIDDEN,),
}
HEAD_SHAPES = {"head.weight": (7, HIDDEN), "head.bias": (7,)}


def pretrained_parameters():
    """The demo's encoder without its pooler, under the names that the Tagger gives it."""
    named = tensors("demo/encoder").items()
    return {f"encoder.{name}": tensor for name, tensor in named if not name.startswith("pooler.")}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---- Table 1: which parameters move ----


@pytest.mark.parametrize("row", PRIMING)
def test_priming_moves_exactly_theta_p_and_theta_a(row, table):
    primed = table[row][0] / "primed"
    before, after = tensors("demo/encoder"), tensors(primed)
    assert after.keys() == before.keys()
    assert {f"encoder.{name}" for name in moved(after, before)} == pretrained_parameters().keys()
    theta_a = tensors(primed, "adapter.safetensors")
    assert shapes(theta_a) == ADAPTER_SHAPES
    assert all(p.any() for p in theta_a.values())  # biases start at zero


def test_each_method_of_priming_gives_different_weights(table):
    primed = {row: tensors(table[row][0] / "primed") for row in PRIMING}
    for row, other in itertools.combinations(PRIMING, 2):
        assert moved(primed[row], primed[other])


@pytest.mark.parametrize("row", range(1, 8))
def test_each_row_updates_exactly_its_parameters(row, table):
    folder, _ = table[row]
    pretrained = pretrained_parameters()
    expected = {
        **HEAD_SHAPES, **(ADAPTER_SHAPES if row > 2 else {}), **(shapes(pretrained) if row == 1 else {}),
    }
    tuned = tensors(folder / "tuned/hi-0", "tuned.safetensors")
    assert shapes(tuned) == expected
    updated = sum(map(math.prod, expected.values()))
    frozen = 0 if row == 1 else sum(p.numel() for p in pretrained.values())
    record = read_results(folder / "results")[0]
    assert (record["updated"], record["parameters"]) == (updated, updated + frozen)
    assert record["share"] == updated / (updated + frozen)
    if row == 1:
        assert moved({name: tuned[name] for name in pretrained}, pretrained) == pretrained.keys()
    if row in PRIMING:
        primed_adapter = tensors(folder / "primed", "adapter.safetensors")
        assert moved(primed_adapter, tuned) == primed_adapter.keys()


def test_biases_are_primed_tuned_saved_and_loaded(tmp_path):
    """The primed folder holds a plain encoder under the encoder's own names, and θa."""
    from transformers import AutoModel

    before, pretrained = tensors("demo/encoder"), pretrained_parameters().keys()
    biases = {name for name in pretrained if name.endswith("bias")}
    flags = [*HINDI, *SMALL_TUNING, "--results", tmp_path / "r"]
    for method in ("meta", "ft"):
        output, save = tmp_path / method, tmp_path / f"{method}-tuned"
        command("prime.py", *DEMO, *SMALL_PRIMING, "--pe", "bitfit", "--method", method, "--output", output)
        after, theta_a = tensors(output), tensors(output, "adapter.safetensors")
        assert after.keys() == before.keys() and theta_a.keys() == biases
        assert {f"encoder.{name}" for name in moved(after, before)} == pretrained
        assert not moved(theta_a, {f"encoder.{name}": p for name, p in after.items()})
        assert not moved(after, AutoModel.from_pretrained(output).state_dict())
        command("finetune.py", *flags, "--init", output, "--save", save, "--seeds", 0, 1)
        for seed in (0, 1):  # both start from the primed biases
            tuned = tensors(save / f"hi-{seed}", "tuned.safetensors")
            assert tuned.keys() == {*biases, *HEAD_SHAPES} and moved(theta_a, tuned) == biases
        trained = read_results(tmp_path / "r")[-1]
        assert score_saved(save / "hi-1", limit=30) == trained["f1"]
        assert trained["updated"] == sum(p.numel() for p in tuned.values())
    command("finetune.py", *flags, *FROM_PRETRAINED, "--pe", "bitfit")
    assert read_results(tmp_path / "r")[-1]["updated"] == trained["updated"]


def hand_written_losses(method, pe, *, steps, tasks, support, query, inner_steps, inner_lr, outer_lr, seed):
    """The sum of the query losses of each meta step of Algorithm 1 with copies of the model and SGD, or of
    FT priming, on the demo's first 20 training sentences."""
    torch.manual_seed(seed)
    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    corpora = [adapters.load_sentences("demo/wikiann", language, "train", tokenizer, types=TYPES,
                                       max_length=128, limit=20) for language in ("en", "es")]
    model = adapters.build_tagger(encoder, types=TYPES, pe=pe, bottleneck=64, device="cpu", bf16=False)
    theta_p, theta_a, theta_h = model.split_parameters()
    inner = {**theta_a, **theta_h, **(theta_p if method == "maml" else {})}
    outer = {**theta_p, **theta_a, **(theta_h if method == "ft" else {})}
    optimizer = torch.optim.AdamW(outer.values(), weight_decay=0.01)
    batches = prime.sample_batches(corpora, steps=steps, tasks=tasks, support=support, query=query, seed=seed)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        if method == "ft":
            model.train()
            sets = model.encode_sets([support + query for support, query in batch])
            query_losses = [adapters.tag_loss(model, sentences) for sentences in sets]
            sum(query_losses).backward()
        else:
            query_losses, copies = [], [copy.deepcopy(model) for _ in batch]
            for (support_set, query_set), adapted in zip(batch, copies):
                parameters = dict(adapted.named_parameters())
                sgd = torch.optim.SGD([parameters[name] for name in inner], inner_lr)
                for _ in range(inner_steps):
                    adapted.zero_grad()
                    adapters.tag_loss(adapted, support_set).backward()
                    sgd.step()
                adapted.zero_grad()
                query_losses.append(adapters.tag_loss(adapted, query_set))
                query_losses[-1].backward()
                for name, p in outer.items():
                    p.grad = parameters[name].grad + (0 if p.grad is None else p.grad)
            model.head.load_state_dict(copies[0].head.state_dict())
        optimizer.param_groups[0]["lr"] = outer_lr * (1 - step / steps)
        optimizer.step()
        losses.append(sum(loss.item() for loss in query_losses))
    return losses


@pytest.mark.parametrize(
    "method, pe", [("meta", "adapter"), ("meta", "bitfit"), ("maml", "adapter"), ("ft", "adapter")]
)
def test_the_command_does_what_algorithm_1_does_with_its_flags(method, pe, tmp_path):
    settings = {"steps": 3, "tasks": 3, "support": 5, "query": 6, "inner_steps": 2, "inner_lr": 0.05,
                "outer_lr": 1e-3, "seed": 1}
    flags = [flag for name, value in settings.items() for flag in (f"--{name.replace('_', '-')}", value)]
    command("prime.py", *DEMO, *flags, "--limit-train", 20, "--method", method, "--pe", pe,
            "--output", tmp_path / "out")
    losses = json.loads((tmp_path / "out/priming.json").read_text())["last_losses"]
    assert losses == pytest.approx(hand_written_losses(method, pe, **settings), rel=1e-5)


@pytest.mark.parametrize("trainable", ["adapter", "head", "bitfit", "full"])
def test_encoders_below_theta_a_run_once_and_full_fine_tuning_alone_has_dropout(trainable, tmp_path):
    """Per batch of the encoder: how many sentences, and with dropout or not. There are 30 sentences for
    training and 30 for the test, two epochs and two seeds. The batch that load_encoder tries has none."""
    batches, start_of_sentence = [], 2  # the id of [CLS]

    def record_batch(module, args):
        if isinstance(module, nn.Embedding) and module.num_embeddings == 1834:
            batches.append((int((args[0] == start_of_sentence).sum()), module.training))

    hook = nn.modules.module.register_module_forward_pre_hook(record_batch)
    tune = ["--pe", "bitfit"] if trainable == "bitfit" else ["--tune", trainable]
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, *tune, "--seeds", 0, 1]
    command("finetune.py", *flags, "--results", tmp_path / "r")
    hook.remove()
    dropout = trainable == "full"
    every_epoch = [*2 * [(16, dropout), (14, dropout)], (30, False)]
    expected = [(60, False)] if trainable in ("adapter", "head") else 2 * every_epoch
    assert [batch for batch in batches if batch[0]] == expected


# ---- what the commands write ----


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(table, primed, tmp_path):
    def primed_bytes(folder):
        return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]

    for seed in (0, 1):
        command("prime.py", *DEMO, *SMALL_PRIMING, "--seed", seed, "--output", tmp_path / str(seed))
    first, again, other = (primed_bytes(folder) for folder in (primed, tmp_path / "0", tmp_path / "1"))
    assert first == again and all(a != b for a, b in zip(first, other))
    outputs = ["--results", tmp_path / "results", "--save", tmp_path]
    command("finetune.py", *HINDI, *SMALL_TUNING, *TUNING[3], *outputs)
    folders = (tmp_path / "hi-0", *sorted((table[3][0] / "tuned").iterdir()))
    again, seed_0, seed_1 = ((folder / "tuned.safetensors").read_bytes() for folder in folders)
    assert again == seed_0 != seed_1


def test_results_have_every_setting_and_the_table_has_their_means(table):
    folder, stdout = table[4]
    records = read_results(folder / "results")
    runs = [(record["target"], record["seed"], record["tune"]) for record in records]
    assert runs == [("hi", 0, "adapter"), ("hi", 1, "adapter")]
    settings = {
        "epochs": 2, "batch_size": 16, "lr": 3e-3, "train_sentences": 30, "test_sentences": 30,
        "init": str(folder / "primed"), "model": "demo/encoder", "bottleneck": 8, "split": "test",
        "max_length": 128, "types": TYPES,
        "priming": json.loads((folder / "primed/priming.json").read_text()),
    }
    metrics = {"f1", "precision", "recall"}
    assert all(settings.items() <= record.items() for record in records)
    assert all(metrics <= record.keys() for record in records)
    f1 = [record["f1"] for record in records]
    last_line = ["hi", f"{statistics.mean(f1):.2f}", f"{statistics.stdev(f1):.2f}", "2"]
    assert stdout.splitlines()[-1].split() == last_line


def test_records_name_the_data_set(table):
    folder, _ = table[4]
    primed = json.loads((folder / "primed/priming.json").read_text())
    assert all("demo/wikiann" in record.values() for record in [primed, *read_results(folder / "results")])


def test_one_seed_has_no_standard_deviation(tmp_path):
    flags = ["--data", "demo/wikiann", *SMALL_TUNING, *FROM_PRETRAINED, "--results", tmp_path / "r"]
    stdout = command("finetune.py", "--tgt", "hi", "af", *flags).stdout
    f1 = [f"{record['f1']:.2f}" for record in read_results(tmp_path / "r")]
    last_lines = [line.split() for line in stdout.splitlines()[-2:]]
    assert last_lines == [["hi", f1[0], "-", "1"], ["af", f1[1], "-", "1"]] and "nan" not in stdout.lower()


def test_min_steps_adds_whole_epochs(tmp_path):
    tuned = []
    for epochs, min_steps in ((2, 0), (1, 3), (1, 2)):  # an epoch of 30 sentences has two steps
        folder = tmp_path / f"{epochs}-{min_steps}"
        flags = ["--epochs", epochs, "--min-steps", min_steps, "--save", folder, "--results", folder / "r"]
        command("finetune.py", *HINDI, *SMALL_TUNING, *TUNING[3], *flags)
        tuned.append(tensors(folder / "hi-0", "tuned.safetensors"))
    two_epochs, at_least_three_steps, one_epoch = tuned
    assert not moved(two_epochs, at_least_three_steps)
    assert moved(two_epochs, one_epoch) == two_epochs.keys()


def test_a_primed_folder_loads_in_transformers_and_records_its_run(primed):
    from transformers import AutoModel, AutoTokenizer

    assert not moved(tensors(primed), AutoModel.from_pretrained(primed).state_dict())
    text, original = "Delhi is a city .", AutoTokenizer.from_pretrained(HERE / "demo/encoder")
    assert AutoTokenizer.from_pretrained(primed)(text) == original(text)
    record = json.loads((primed / "priming.json").read_text())
    assert record["bottleneck"] == 8 and len(record["last_losses"]) == 2
    assert record["src"] == ["en", "es"] and record["types"] == TYPES
    assert {path.suffix for path in primed.iterdir()} == {".json", ".safetensors"}


def test_split_chooses_the_sentences_that_are_scored(table, tmp_path):
    """A test split with the validation split's sentences gets the score of the validation split."""
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi")
    shutil.copy("demo/wikiann/hi/validation.txt", tmp_path / "data/hi/test.txt")
    flags = ["--tgt", "hi", "--init", table[4][0] / "primed", "--epochs", 5, "--results", tmp_path / "r"]
    command("finetune.py", *flags, "--data", "demo/wikiann", "--split", "validation")
    command("finetune.py", *flags, "--data", tmp_path / "data")
    command("finetune.py", *flags, "--data", "demo/wikiann")
    records = read_results(tmp_path / "r")
    validation, copied, test = ((record["f1"], record["test_sentences"]) for record in records)
    assert validation == copied != test
