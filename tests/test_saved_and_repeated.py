"""A saved model loads on its own encoder only. A folder belongs to one run, and a finished run is not repeated."""

import itertools
import json
import shutil
import signal

import pytest
from conftest import (
    DEMO, FROM_PRETRAINED, HINDI, SMALL_PRIMING, SMALL_TUNING, TAGS, TUNING, TYPES, command, edit_json,
    moved, read_results, run_process, score_saved, snapshot, start_process, tensors,
)
from load import load_tagger
from safetensors.torch import save_file
from test_long_runs import killed_before_replacement, primed_bytes

import adapters


def change_one_weight(encoder, by=1e-3):
    weights = tensors(encoder)
    weights["embeddings.word_embeddings.weight"][7, 7] += by
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})


# ---- --save and load_tagger ----


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_saved_model_scores_the_same_without_training_data(row, table, tmp_path):
    folder, _ = table[row]
    shutil.copytree("demo/wikiann/hi", tmp_path / "hi", ignore=shutil.ignore_patterns("train.txt"))
    _, trained = read_results(folder / "results")
    assert score_saved(folder / "tuned/hi-1", data=tmp_path, limit=30) == trained["f1"]
    model, tokenizer, tags = load_tagger(folder / "tuned/hi-1")
    assert tags == TAGS and tokenizer.model_max_length == trained["max_length"]
    assert model.pe == {1: None, 2: None, 4: "adapter"}[row] and not model.training


@pytest.fixture
def moved_together(table, tmp_path):
    """A copy of a primed folder and of the models tuned on it, in the same arrangement, while the originals
    are elsewhere."""
    shutil.copytree(table[4][0], tmp_path / "new")
    original = table[4][0].rename(table[4][0].with_name("away"))
    yield tmp_path / "new"
    original.rename(table[4][0])


def test_a_saved_model_finds_its_encoder_after_both_were_moved(moved_together, tmp_path):
    f1 = read_results(moved_together / "results")[0]["f1"]
    assert score_saved(moved_together / "tuned/hi-0", limit=30) == f1
    (moved_together / "tuned").rename(tmp_path / "tuned")
    with pytest.raises(adapters.UserError, match="primed"):
        load_tagger(tmp_path / "tuned/hi-0")
    assert score_saved(tmp_path / "tuned/hi-0", limit=30, base=str(moved_together / "primed")) == f1


def test_a_model_that_is_saved_through_a_link_finds_its_encoder(table, tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    flags = [*HINDI, *SMALL_TUNING, "--init", table[4][0] / "primed", "--save", tmp_path / "link/saved"]
    command("finetune.py", *flags, "--results", tmp_path / "results")
    (result,) = read_results(tmp_path / "results")
    assert score_saved(tmp_path / "far/away/saved/hi-0", limit=30) == result["f1"]


def test_a_saved_model_without_its_weights_is_not_called_done(tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--save", tmp_path / "s", "--results", tmp_path / "r"]
    command("finetune.py", *flags)
    assert "done before" in command("finetune.py", *flags).stdout
    (tmp_path / "s/hi-0/tuned.safetensors").unlink()
    line = command("finetune.py", *flags, status=2).stderr
    assert f"{tmp_path}/s/hi-0: a weights file is missing" in line


def test_a_saved_model_is_refused_on_another_encoder(table, moved_together):
    tuned, other = moved_together / "tuned/hi-0", str(table[7][0] / "primed")
    with pytest.raises(adapters.UserError, match=f"{tuned} was not tuned on {other}"):
        load_tagger(tuned, other)
    change_one_weight(moved_together / "primed")
    with pytest.raises(adapters.UserError, match=f"{tuned} was not tuned on "):
        load_tagger(tuned)


@pytest.mark.parametrize(
    "flag, value", [("--model", "demo"), ("--pe", "bitfit"), ("--bottleneck", 9), ("--types", "PER")])
def test_flags_that_contradict_a_primed_folder_are_refused(flag, value, primed, tmp_path):
    done = command("finetune.py", *HINDI, "--init", primed, flag, value, "--results", tmp_path / "r", status=2)
    (line,) = done.stderr.splitlines()
    saved = {"--model": "demo/encoder", "--pe": "adapter", "--bottleneck": 8, "--types": TYPES}[flag]
    given = [value] if flag == "--types" else value
    assert line == f"finetune.py: {flag} {given}: {primed} has {saved}" and not list(tmp_path.iterdir())


def test_settings_come_from_the_primed_folder_and_without_one_from_prime_pys_defaults(table):
    for row, bottleneck in ((4, 8), (2, None)):  # None: the default of the kind of θa
        record = read_results(table[row][0] / "results")[0]
        settings = [record[name] for name in ("model", "pe", "bottleneck", "types")]
        assert settings == ["demo/encoder", "adapter", bottleneck, TYPES]


# ---- one folder, one run ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--inner-lr", 0.3], "inner-lr 0.03 (now 0.3)"), (["--steps", 13], "steps 12 (now 13)"),
        (["--seed", 1], "seed 0 (now 1)"), (["--src", "es", "en"], "src ['en', 'es'] (now ['es', 'en'])"),
        (["--bf16"], "bf16 False (now True)"),
        (["--types", "PER", "ORG", "LOC", "MISC"], "types ['PER', 'ORG', 'LOC'] (now ["),
        ("sentences", "sentences "), ("weights", "weights "), ("configuration", "configuration "),
    ],
    ids=str,
)
def test_another_run_on_a_primed_folder_is_told_which_setting_differs(flags, message, unfinished, tmp_path):
    root, first_flags = unfinished
    copy = shutil.copytree(root, tmp_path / "copy")
    if flags == "sentences":
        edited = copy / "wikiann/en/train.txt"
        edited.write_text(edited.read_text().replace("B-LOC", "B-ORG", 1))
    elif flags == "weights":
        change_one_weight(copy / "encoder", by=1e-6)
    elif flags == "configuration":
        edit_json(copy / "encoder/config.json", hidden_act="relu")
    paths = ["--model", copy / "encoder", "--data", copy / "wikiann", "--output", copy / "primed"]
    before = snapshot(copy / "primed")
    more = [] if isinstance(flags, str) else flags
    done = command("prime.py", *first_flags, *paths, *more, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"prime.py: {copy}/primed holds a run with {message}") and "choose another" in line
    assert snapshot(copy / "primed") == before and done.stdout == ""


def test_paths_and_the_number_of_checkpoints_may_change_when_a_run_resumes(unfinished, tmp_path):
    root, flags = unfinished
    copy = shutil.copytree(root, tmp_path / "copy")
    paths = ["--model", copy / "encoder", "--data", copy / "wikiann", "--output", copy / "primed"]
    command("prime.py", *flags, "--output", tmp_path / "uninterrupted")
    command("prime.py", *flags, *paths, "--save-every", 5)
    assert primed_bytes(copy / "primed") == primed_bytes(tmp_path / "uninterrupted")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_not_touched(damage, unfinished, tmp_path):
    root, flags = unfinished
    output = shutil.copytree(root / "primed", tmp_path / "primed")
    path = output / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"x" + data[1:])
    before = snapshot(output)
    (line,) = command("prime.py", *flags, "--output", output, status=2).stderr.splitlines()
    assert line.startswith(f"prime.py: {path}: expected a checkpoint of this run; delete it")
    assert snapshot(output) == before
    path.unlink()
    command("prime.py", *flags, "--output", output)


def test_the_same_commands_again_change_nothing_and_print_the_scores_again(table, primed):
    folder, stdout = table[4]
    before = snapshot(folder)
    flags = [*DEMO, *SMALL_PRIMING, "--output", primed]
    assert f"{primed} is complete" in command("prime.py", *flags).stdout.splitlines()[-1]
    outputs = ["--results", folder / "results", "--save", folder / "tuned", "--seeds", 0, 1]
    again = command("finetune.py", *HINDI, *SMALL_TUNING, "--init", primed, *outputs).stdout
    assert again.replace(" (done before)", "").split() == stdout.split()
    assert again.count("done before") == 2
    assert "holds a run with seed 0 (now 3)" in command("prime.py", *flags, "--seed", 3, status=2).stderr
    assert snapshot(folder) == before


def test_fine_tuning_on_other_data_weights_or_settings_is_another_run(tmp_path):
    shutil.copytree("demo/encoder", tmp_path / "encoder")
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi")
    results = tmp_path / "r"
    flags = ["--tgt", "hi", "--init", "none", "--model", tmp_path / "encoder", "--data", tmp_path / "data"]
    flags += [*SMALL_TUNING, "--results", results]

    def runs_again(*more):
        count = len(read_results(results))
        done = command("finetune.py", *flags, *more)
        new = len(read_results(results)) - count
        assert new in (0, 1) and new == 1 - ("done before" in done.stdout)
        return bool(new)

    assert runs_again() and not runs_again()
    assert not runs_again("--seeds", 0, 0)  # a repeated seed counts once
    assert runs_again("--lr", 1e-2) and runs_again("--seeds", 1)
    for split in ("train", "test"):
        path = tmp_path / f"data/hi/{split}.txt"
        path.write_text(path.read_text().replace("B-LOC", "B-ORG", 1))
        assert runs_again() and not runs_again()
    path = tmp_path / "data/hi/train.txt"
    path.write_text(f"{path.read_text()}\n\nmore\tO\n")  # after the sentences of --limit-train
    assert not runs_again()
    change_one_weight(tmp_path / "encoder")
    assert runs_again() and not runs_again()
    edit_json(tmp_path / "encoder/config.json", hidden_act="relu")
    assert runs_again() and not runs_again()


def test_save_works_after_a_run_without_it(tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--results", tmp_path / "r"]
    command("finetune.py", *flags)
    (without,) = read_results(tmp_path / "r")
    command("finetune.py", *flags, "--save", tmp_path / "tuned")
    (record,) = read_results(tmp_path / "r")
    assert record == without | {"save": str(tmp_path / "tuned")}
    assert tensors(tmp_path / "tuned/hi-0", "tuned.safetensors")
    assert "done before" in command("finetune.py", *flags, "--save", tmp_path / "tuned").stdout


def test_save_into_a_folder_of_something_else_is_refused_before_training(tmp_path):
    (tmp_path / "tuned/hi-1").mkdir(parents=True)
    (tmp_path / "tuned/hi-1/mine.txt").write_text("mine")
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--seeds", 0, 1, "--results", tmp_path / "r"]
    done = command("finetune.py", *flags, "--save", tmp_path / "tuned", status=2)
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/tuned/hi-1 holds other files: choose another" in line
    assert done.stdout == "" and not read_results(tmp_path / "r")
    assert [path.name for path in (tmp_path / "tuned/hi-1").iterdir()] == ["mine.txt"]


# ---- fine-tuning in several processes, killed ----


def test_two_commands_share_a_results_folder_and_repeating_them_skips_what_is_done(tmp_path):
    results = tmp_path / "results"
    flags = ["--tgt", "hi", "af", *DEMO, *SMALL_TUNING, "--init", "none", "--results", results]
    both = [start_process("finetune.py", [*flags, "--seeds", *seeds], tmp_path / f"stderr-{seeds[0]}")
            for seeds in ((0, 1), (2, 3))]
    for process in both:
        process.join()
    records = read_results(results)
    runs = {(record["target"], record["seed"]) for record in records}
    assert runs == set(itertools.product(("hi", "af"), range(4))) and len(records) == 8
    done = command("finetune.py", *flags, "--seeds", 0, 1, 2, 3, 4)
    again = read_results(results)
    assert again[:8] == records and done.stdout.count("done before") == 8
    assert [(record["target"], record["seed"]) for record in again[8:]] == [("hi", 4), ("af", 4)]
    assert [line.split()[-1] for line in done.stdout.splitlines()[-2:]] == ["5", "5"]  # seeds in the table


def killed_before_the_result_gets_its_name():
    killed_before_replacement(1)


def killed_before_the_tuned_weights_get_their_name():
    killed_before_replacement(2)


def killed_before_the_record_that_completes_the_folder():
    killed_before_replacement(3)


@pytest.mark.parametrize(
    "fault",
    [killed_before_the_result_gets_its_name, killed_before_the_tuned_weights_get_their_name,
     killed_before_the_record_that_completes_the_folder],
)
def test_the_same_command_completes_fine_tuning_killed_at_the_worst_moment(fault, table, tmp_path):
    save, results = tmp_path / "tuned", tmp_path / "results"
    flags = [*HINDI, *SMALL_TUNING, *TUNING[3], "--results", results, "--save", save]
    run_process("finetune.py", flags, tmp_path / "stderr", -signal.SIGKILL, fault=fault)
    assert not (save / "hi-0/tuned.json").exists()
    run_process("finetune.py", flags, tmp_path / "stderr")
    (record,) = read_results(results)
    assert record["f1"] == read_results(table[3][0] / "results")[0]["f1"]
    tuned = tensors(save / "hi-0", "tuned.safetensors")
    assert not moved(tuned, tensors(table[3][0] / "tuned/hi-0", "tuned.safetensors"))


def test_two_equal_commands_at_once_both_succeed_with_one_result(table, tmp_path):
    save, results = tmp_path / "tuned", tmp_path / "results"
    flags = [*HINDI, *SMALL_TUNING, *TUNING[3], "--results", results, "--save", save]
    both = [start_process("finetune.py", flags, tmp_path / f"stderr-{i}") for i in range(2)]
    for process in both:
        process.join()
    messages = [(tmp_path / f"stderr-{i}").read_text() for i in range(2)]
    assert [process.exitcode for process in both] == [0, 0], messages
    (record,) = read_results(results)
    assert record["f1"] == read_results(table[3][0] / "results")[0]["f1"]
    assert json.loads((save / "hi-0/tuned.json").read_text())["f1"] == record["f1"]
