"""Bad input ends with one line on stderr and exit status 2, and nothing is written; fuzzed readers."""

import copy
import io
import itertools
import json
import random
import resource
import shutil
import signal
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import (
    DEMO, HERE, HINDI, LONG, SMALL_TUNING, START, TYPES, command, folder_of, own_locks, random_encoder,
)

import adapters
import finetune
import prime

NONE = ["--init", "none"]


@pytest.mark.parametrize(
    "script, flags, told",
    [
        ("prime.py", ["--src", "en", "xx", *DEMO], "xx: no train split; there are ["),
        ("prime.py", [*DEMO, "--support", 10_000], "en train: ValueError: 1000 sentences with a word piece, 10016 needed"),
        ("prime.py", [*DEMO, "--inner-lr", "nan"], "argument --inner-lr"),
        ("prime.py", [*DEMO, "--steps", "0"], "argument --steps"),
        ("prime.py", [*DEMO, "--outer-lr", "-1"], "argument --outer-lr"),
        ("prime.py", [*DEMO, "--query", "1.5"], "argument --query"),
        ("prime.py", [*DEMO, "--seed", str(2**63)], "argument --seed"),
        ("prime.py", [*DEMO, "--tasks", "-2"], "argument --tasks"),
        ("prime.py", [*DEMO, "--pe", "lora2"], "argument --pe"),
        ("prime.py", [*DEMO, "--cache-gb", "4"], "unrecognized arguments: --cache-gb"),
        ("finetune.py", [*HINDI, *START, "--epochs", "0"], "argument --epochs"),
        ("finetune.py", [*HINDI, *START, "--lr", "inf"], "argument --lr"),
        ("finetune.py", [*HINDI, *START, "--results", "demo/README.md"], "demo/README.md"),
        ("finetune.py", [*HINDI, *START, "--device", "cuda:77"], "cuda:77: "),
        ("prime.py", [*DEMO, "--max-length", 129], "--max-length 129: RuntimeError: "),
        ("prime.py", [*DEMO, "--device", "cuda:77"], "cuda:77: "),
        ("prime.py", ["--model", "no/where", "--data", "demo/wikiann"], "--model no/where (offline"),
        ("prime.py", ["--model", "demo/encoder", "--data", "no/where"], "--data no/where (offline"),
        ("finetune.py", [*HINDI, "--init", "no/where"], "--init no/where, which prime.py writes: "),
        ("finetune.py", [*HINDI, "--load", "no/where"], "--load no/where, which --save writes: "),
        ("finetune.py", DEMO, "the following arguments are required: --tgt"),
    ],
)
def test_bad_input_is_one_line(script, flags, told, tmp_path):
    outputs = ["--output", tmp_path / "out"] if script == "prime.py" else ["--results", tmp_path / "out"]
    done = command(script, *outputs, *flags, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and told in line and done.stdout == ""
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_folder_of_others_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine/partial-results").mkdir(parents=True)
    (tmp_path / "mine/thesis.tex").write_text("x")
    (line,) = command("prime.py", *LONG, "--output", tmp_path / "mine", status=2).stderr.splitlines()
    assert "name another" in line
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.tex", "partial-results"}
    (line,) = command("prime.py", *LONG, "--output", "demo/README.md", status=2).stderr.splitlines()
    assert "--output demo/README.md" in line


def test_a_missing_split_is_told_before_anything_is_trained(tmp_path):
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi", ignore=shutil.ignore_patterns("test*"))
    flags = ["--tgt", "hi", *START, "--data", tmp_path / "data", "--results", tmp_path / "r"]
    (line,) = command("finetune.py", *flags, status=2).stderr.splitlines()
    told = f"{tmp_path}/data/hi: no test split; there are ['hi']"
    assert line.endswith(told) and not (tmp_path / "r").exists()


def broken_folders(tmp_path, primed, tuned):
    """Folders with something missing or wrong: flags of finetune.py, and what it must tell."""
    def copied(name, source="demo/encoder", without=()):
        return shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns(*without))

    def edited(name, file, change, source=primed):
        path = copied(name, source) / file
        path.write_bytes(change(path.read_bytes()))
        return path.parent

    def without_its_end(data):
        return data[:-9]

    tokenizer, model = copied("no-tokenizer", without=["tokenizer*"]), [*NONE, "--model"]
    yield [*model, tokenizer], "no-tokenizer (offline: a folder), --max-length 128"
    yield [*model, copied("no-weights", without=["*.safetensors"])], "no-weights (offline: a folder)"
    few = random_encoder("Bert", 1000)
    few = folder_of(few, tmp_path / "few")
    yield [*model, few], "ValueError: a tokenizer of 1834 pieces, an encoder of 1000"
    fnet = folder_of(random_encoder("FNet", 1834), tmp_path / "fnet")  # its layers have no attention
    yield [*model, fnet], "fnet mixes the sentences of a batch"
    pe = edited("pe", "priming.json", lambda data: data.replace(b'"pe": "adapter"', b'"pe": "bitfit"'))
    yield ["--init", pe], "pe: ValueError: it holds other parameters than the model has"
    size = edited("size", "priming.json", lambda data: data.replace(b'"bottleneck": 8', b'"bottleneck": 9'))
    yield ["--init", size], "size: RuntimeError: Error(s) in loading"
    yield ["--init", copied("no-adapter", primed, ["adapter*"])], "no-adapter/adapter.safetensors: File"
    yield ["--init", copied("no-record", primed, ["priming.json"])], "no-record, which prime.py writes: F"
    yield ["--init", edited("cut", "adapter.safetensors", without_its_end)], "cut/adapter.safetensors: Saf"
    yield ["--init", edited("weights", "model.safetensors", without_its_end)], "weights (offline"
    yield ["--init", edited("json", "priming.json", lambda data: data[:50])], "json, which prime.py writes: J"
    yield ["--init", edited("key", "priming.json", lambda data: b"{}")], "key, which prime.py writes: Key"
    flipped = edited("load", "tuned.safetensors", without_its_end, tuned)
    yield ["--load", flipped, "--init", primed], "load/tuned.safetensors: SafetensorError"
    yield ["--load", copied("no-tuned", tuned, ["*.json"])], "no-tuned, which --save writes: File"


def test_a_broken_folder_is_told_by_name_and_nothing_is_written(table, primed, tmp_path):
    for flags, told in broken_folders(tmp_path, primed, table[4][0] / "tuned/hi-0"):
        small = [] if "--load" in flags else SMALL_TUNING
        results = ["--results", tmp_path / "results"]
        done = command("finetune.py", *HINDI, *small, *results, *flags, status=2)
        assert told in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
        written = tmp_path / "results"
        assert not written.exists() or not [*written.iterdir()]


def test_an_interruption_is_told_as_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
    with pytest.raises(SystemExit, match="2"):
        prime.run(lambda: signal.default_int_handler(signal.SIGINT, None))
    assert [stream.buffer.getvalue() for stream in streams] == [b"", b"finetune.py: interrupted; the same command goes on\n"]


def test_a_terminal_that_knows_no_theta_gets_help_and_the_last_line(tmp_path):
    for script in ("prime.py", "finetune.py"):
        help = command(script, "--help", encoding="ascii").stdout
        assert "--bottleneck" in help and ("paper: 64" in help)
    done = command("prime.py", *LONG, "--output", tmp_path / "primed", encoding="ascii")
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/primed: 12 steps; query loss ")
    (line,) = command("prime.py", *LONG, "--src", "θ", status=2, encoding="ascii").stderr.splitlines()
    assert "demo/wikiann/?: no train split; there are" in line


# ---- fuzz ----


def mutate(data, chance):
    """One to three of: cut, bits flipped, lines shuffled, control characters, a huge line, a part twice."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and data:
            flipped = bytearray(data)
            for _ in range(chance.randint(1, 8)):
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            data = bytes(flipped)
        elif kind == 2:
            lines = data.split(b"\n")
            data = b"\n".join(chance.sample(lines, len(lines)))
        elif kind == 3:
            data = data[:at] + bytes(chance.choices(range(32), k=4)) + data[at:]
        elif kind == 4:
            more = chance.choice([b"x", b"\t", b" ", b"\xf0"]) * 10 ** chance.randint(1, 5)
            data = data[:at] + more + data[at:]
        else:
            data = data[:at] + data[at // 2 :]
    return data


def read_plainly(data):
    """The sentences of a text, by the rules that README states, without ours for what is refused."""
    lines = [line.rstrip(" \t\r") for line in data.decode("utf-8-sig").split("\n")]
    columns = [line.split("\t") if "\t" in line else line.split(" ") for line in lines]
    ends = [not line or row[0] == "-DOCSTART-" for line, row in zip(lines, columns)]
    groups = itertools.groupby(zip(ends, columns), key=lambda pair: pair[0])
    rows = [[(row[0], row[-1]) for _, row in group] for end, group in groups if not end]
    prefixed = all(word.startswith("hi:") for row in rows for word, _ in row)
    return [[(word[3 * prefixed :], tag) for word, tag in row] for row in rows]


def test_the_reader_gives_what_was_written_or_one_error_for_2000_mutated_files(tmp_path):
    chance, path, loaded = random.Random(0), tmp_path / "hi/train.txt", 0
    path.parent.mkdir()
    original = b"\n".join((HERE / "demo/wikiann/hi/train.txt").read_bytes().split(b"\n")[:60])
    tags = prime.tag_names(TYPES)
    began, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        data = mutate(original, chance)
        path.write_bytes(data)
        try:
            rows = prime.read_split(str(tmp_path), "hi", "train", TYPES)
        except prime.BadInput as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
            continue
        loaded += 1
        assert [[(word, tags[tag]) for word, tag in zip(*row)] for row in rows] == read_plainly(data)
    assert 50 < loaded < 1950
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("kind", ["adapter.safetensors", "checkpoint.pt", "priming.json"])
def test_the_loaders_load_or_give_one_error_for_mutated_files(kind, unfinished, primed, tmp_path, demo):
    from safetensors.torch import load_file

    chance, outcomes = random.Random(0), {True: 0, False: 0}
    encoder = demo[0] if kind == "adapter.safetensors" else random_encoder("Bert", 1834)
    encoder = copy.deepcopy(encoder).float()
    model = adapters.Tagger(encoder, 7, bottleneck=8)
    theta_p, theta_a, theta_h = model.sets()
    parts = model, *prime.adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], 1e-2, 12)
    original = ((primed if kind != "checkpoint.pt" else unfinished[0] / "primed") / kind).read_bytes()
    if kind == "priming.json":
        identity = json.loads(original)["run"]
    else:
        identity = torch.load(unfinished[0] / "primed/checkpoint.pt", weights_only=True)[0]
    args = Namespace(output=tmp_path, device="cpu", tune="adapter", pe="adapter", types=TYPES, bottleneck=8,
                     bf16=False, load=None, init=str(tmp_path))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300 if kind == "adapter.safetensors" else 2000):
        data = mutate(original, chance)
        (tmp_path / kind).write_bytes(data)
        try:
            with own_locks(), prime.blaming("fuzz"):
                if kind == "adapter.safetensors":
                    finetune.start(args, encoder, load_file(tmp_path / kind), 0, [])
                else:
                    assert len(prime.continued(args, identity, *parts)) == 4
            outcomes[True] += 1
        except SystemExit:  # the run is complete
            assert kind == "priming.json"
            outcomes[True] += 1
        except prime.BadInput as error:
            assert "\n" not in str(error) and "AssertionError" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 0, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB
