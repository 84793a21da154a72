"""Bad input ends a command with one line on stderr and exit status 2, and nothing is written; fuzzed readers."""

import itertools
import random
import resource
import shutil
import time

import pytest
from conftest import (
    DEMO, FROM_PRETRAINED, HERE, HINDI, SLOW_PRIMING, SMALL_TUNING, TYPES, command, edit_json, random_encoder,
    save_encoder,
)
from load import load_tagger

import adapters


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("prime.py", ["--src", "en", "xx", *DEMO], "expected demo/wikiann/xx/train.txt, found in demo/wikiann: ["),
        ("prime.py", [*DEMO, "--support", 10_000], "en train: 1000 sentences, 10016 are needed"),
        ("prime.py", [*DEMO, "--inner-lr", "nan"], "argument --inner-lr: nan is out of range"),
        ("prime.py", [*DEMO, "--steps", "0"], "argument --steps: 0 is out of range"),
        ("prime.py", [*DEMO, "--outer-lr", "-1"], "argument --outer-lr: -1 is out of range"),
        ("prime.py", [*DEMO, "--query", "1.5"], "argument --query"),
        ("prime.py", [*DEMO, "--seed", str(2**63)], "argument --seed"),
        ("prime.py", [*DEMO, "--tasks", "-2"], "argument --tasks"),
        ("prime.py", [*DEMO, "--pe", "lora2"], "argument --pe"),
        ("prime.py", [*DEMO, "--cache-gb", "4"], "unrecognized arguments: --cache-gb"),
        ("finetune.py", [*HINDI, *FROM_PRETRAINED, "--epochs", "0"], "argument --epochs"),
        ("finetune.py", [*HINDI, *FROM_PRETRAINED, "--lr", "inf"], "argument --lr: inf is out of range"),
        ("finetune.py", [*HINDI, *FROM_PRETRAINED, "--device", "cuda:77"], "--device cuda:77: "),
        ("prime.py", [*DEMO, "--device", "cuda:77"], "--device cuda:77: "),
        ("prime.py", ["--model", "no/where", "--data", "demo/wikiann"], "--model no/where (offline"),
        ("prime.py", ["--model", "demo/encoder", "--data", "no/where"], "--data no/where, en train: expected tokens, ner_tags: ConnectionError: "),
        ("finetune.py", [*HINDI, "--init", "no/where"], "no/where/priming.json: expected "),
    ],
)
def test_bad_input_is_one_line(script, flags, message, tmp_path):
    outputs = ["--output", tmp_path / "out"] if script == "prime.py" else ["--results", tmp_path / "out"]
    done = command(script, *outputs, *flags, status=2)
    *usage, line = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and message in line and done.stdout == ""
    assert usage == [] or "error: " in line and usage[0].startswith(f"usage: {script} ")  # by argparse
    assert not any(path.is_file() and path.name != "settings.json" for path in tmp_path.rglob("*"))


def test_a_folder_or_file_of_something_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "mine/partial-results").mkdir(parents=True)
    (tmp_path / "mine/thesis.tex").write_text("x")
    (line,) = command("prime.py", *SLOW_PRIMING, "--output", tmp_path / "mine", status=2).stderr.splitlines()
    assert f"{tmp_path}/mine holds other files: choose another" in line
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.tex", "partial-results"}
    (line,) = command("prime.py", *SLOW_PRIMING, "--output", "demo/README.md", status=2).stderr.splitlines()
    assert "demo/README.md" in line


def test_a_missing_split_is_found_before_any_training(tmp_path):
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi", ignore=shutil.ignore_patterns("test*"))
    flags = ["--tgt", "hi", *FROM_PRETRAINED, "--data", tmp_path / "data", "--results", tmp_path / "r"]
    (line,) = command("finetune.py", *flags, status=2).stderr.splitlines()
    assert f"expected {tmp_path}/data/hi/test.txt, found in {tmp_path}/data/hi: " in line and not (tmp_path / "r").exists()
    assert line.endswith("['train.txt', 'validation.txt']")


def broken_folders(tmp_path, primed, tuned):
    """Flags of finetune.py, or a folder for load_tagger, with something missing or wrong, and part of the
    message."""
    def copied(name, source="demo/encoder", without=()):
        return shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns(*without))

    def edited(name, file, change, source=primed):
        path = copied(name, source) / file
        path.write_bytes(change(path.read_bytes()))
        return path.parent

    def cut(data):
        return data[:-9]

    model = ["--init", "none", "--model"]
    yield [*model, copied("no-tokenizer", without=["tokenizer*"])], "no-tokenizer has no vocabulary file"
    yield [*model, copied("no-weights", without=["*.safetensors"])], "no-weights (offline, give a folder): OSError"
    few = save_encoder(random_encoder("Bert", 1000), tmp_path / "few")
    yield [*model, few], "few: 1834 word pieces, but the encoder has 1000"
    yield ["--init", copied("no-record", primed, ["priming.json"])], "no-record/priming.json: expected"
    yield ["--init", edited("json", "priming.json", lambda data: data[:50])], "json/priming.json: expected"
    yield ["--init", edited("key", "priming.json", lambda data: b"{}")], "key/priming.json: expected"
    yield ["--init", edited("list", "priming.json", lambda data: b"[]")], "list/priming.json: expected"
    yield ["--init", edited("cut", "adapter.safetensors", cut)], "cut: a weights file is missing or not as in"
    yield ["--init", edited("weights", "model.safetensors", cut)], "weights: a weights file is missing or not as in"
    yield edited("load", "tuned.safetensors", cut, tuned), "load: a weights file is missing or not as in"
    yield copied("no-tuned", tuned, ["*.json"]), "no-tuned/tuned.json: expected"


def test_a_broken_folder_is_named_and_nothing_is_written(table, primed, tmp_path):
    for flags, message in broken_folders(tmp_path, primed, table[4][0] / "tuned/hi-0"):
        if not isinstance(flags, list):
            with pytest.raises(adapters.UserError, match=message):
                load_tagger(flags)
            continue
        done = command("finetune.py", *HINDI, *SMALL_TUNING, "--results", tmp_path / "r", *flags, status=2)
        (line,) = done.stderr.splitlines()
        assert message in line and not [*tmp_path.glob("r/*")]


@pytest.mark.parametrize(
    "content",
    ['{"run": "', "nonsense", "\x00" * 20, "[" * 9000, "{}", '{"f1": 3}', "[1]", '"f1"', "null"],
    ids=lambda content: content[:9],
)
def test_a_result_file_that_is_not_ours_is_named_and_not_touched(content, tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--results", tmp_path]
    command("finetune.py", *flags)
    (result,) = tmp_path.iterdir()
    result.write_text(content)
    (line,) = command("finetune.py", *flags, status=2).stderr.splitlines()
    assert str(tmp_path) in line and result.read_text() == content


@pytest.mark.parametrize("changes", [{"pe": "bitfit"}, {"bottleneck": 9}, {"bottleneck": None}], ids=str)
def test_parameters_that_do_not_fit_an_edited_record_are_never_ignored(changes, table, tmp_path):
    folder = shutil.copytree(table[4][0] / "primed", tmp_path / "folder")
    edit_json(folder / "priming.json", **changes)
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict for Tagger"):
        command("finetune.py", *HINDI, *SMALL_TUNING, "--init", folder, "--results", tmp_path / "r")
    tuned = shutil.copytree(table[4][0] / "tuned/hi-0", tmp_path / "tuned")
    edit_json(tuned / "tuned.json", **changes)
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict for Tagger"):
        load_tagger(tuned, str(table[4][0] / "primed"))


def test_a_terminal_without_greek_letters_gets_help_and_messages(tmp_path):
    for script in ("prime.py", "finetune.py"):
        help = command(script, "--help", encoding="ascii").stdout
        assert "--bottleneck" in help and "PE method: what ?a is" in " ".join(help.split())
    done = command("prime.py", *SLOW_PRIMING, "--output", tmp_path / "primed", encoding="ascii")
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/primed: 12 steps; query loss ")
    (line,) = command("prime.py", *SLOW_PRIMING, "--src", "θ", status=2, encoding="ascii").stderr.splitlines()
    assert "expected demo/wikiann/?/train.txt, " in line


# ---- fuzz ----


def mutate(data, rng):
    """One to three of: cut, bits flipped, lines shuffled, control characters, a huge line, a repeated part."""
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:position]
        elif kind == 1 and data:
            flipped = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        elif kind == 2:
            lines = data.split(b"\n")
            data = b"\n".join(rng.sample(lines, len(lines)))
        elif kind == 3:
            data = data[:position] + bytes(rng.choices(range(32), k=4)) + data[position:]
        elif kind == 4:
            more = rng.choice([b"x", b"\t", b" ", b"\xf0"]) * 10 ** rng.randint(1, 5)
            data = data[:position] + more + data[position:]
        else:
            data = data[:position] + data[position // 2 :]
    return data


def parse_sentences(data):
    """The sentences of a text by the rules of the README, without a check."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    columns = [line.split("\t" if "\t" in text else " ") for line in lines]
    ends = [not line or line.startswith("-DOCSTART-") for line in lines]
    groups = itertools.groupby(zip(ends, columns), key=lambda pair: pair[0])
    sentences = [[(row[0], row[-1]) for _, row in group] for end, group in groups if not end]
    return sentences


def test_the_reader_returns_what_was_written_or_raises_one_error_for_2000_mutated_files(tmp_path):
    rng, path, loaded = random.Random(0), tmp_path / "hi/train.txt", 0
    path.parent.mkdir()
    original = b"\n".join((HERE / "demo/wikiann/hi/train.txt").read_bytes().split(b"\n")[:60])
    tags = adapters.tag_names(TYPES)
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        data = mutate(original, rng)
        path.write_bytes(data)
        try:
            sentences = adapters.read_split(str(tmp_path), "hi", "train", TYPES)
        except adapters.UserError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
            continue
        loaded += 1
        named = [[(word, tags[tag]) for word, tag in zip(*sentence)] for sentence in sentences]
        assert named == parse_sentences(data)
    assert 50 < loaded < 1950
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "name, count", [("checkpoint.pt", 10), ("settings.json", 10), ("priming.json", 100)]
)
def test_a_command_works_or_ends_with_one_line_for_mutated_files(name, count, unfinished, table, tmp_path):
    primed = table[4][0] / "primed"
    results = [*HINDI, "--limit-test", 3, "--results", tmp_path / "r"]
    if name in ("checkpoint.pt", "settings.json"):
        source, script, flags = unfinished[0] / "primed", "prime.py", [*unfinished[1], "--output"]
    else:
        source, script, flags = primed, "finetune.py", [*results, "--limit-train", 3, "--init"]
    rng, original, folder = random.Random(0), (source / name).read_bytes(), tmp_path / "mutated"
    memory, statuses = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set()
    for _ in range(count):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(mutate(original, rng))
        done = command(script, *flags, folder, status=None)
        statuses.add(done.status)
        assert done.status == 0 or done.status == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 2 in statuses
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB


def test_a_tagger_loads_or_raises_one_error_for_20_mutated_records(table, tmp_path):
    rng, statuses = random.Random(0), set()
    folder = shutil.copytree(table[4][0] / "tuned/hi-0", tmp_path / "mutated")
    original = (folder / "tuned.json").read_bytes()
    for _ in range(20):
        (folder / "tuned.json").write_bytes(mutate(original, rng))
        try:
            load_tagger(folder, str(table[4][0] / "primed"))
            statuses.add("loaded")
        except adapters.UserError as error:
            assert "\n" not in str(error)
            statuses.add("refused")
    assert "refused" in statuses
