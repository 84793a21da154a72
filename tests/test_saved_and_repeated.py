"""What was saved is found again on its own base alone, and a command that was run before is not run again."""

import shutil

import pytest
from conftest import (
    DEMO, HERE, HINDI, SMALL_PRIMING, SMALL_TUNING, START, TUNING, command, contents, read_results, tensors,
)
from safetensors.torch import save_file


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_saved_pair_scores_the_same_without_training_data(row, table, tmp_path):
    folder, _ = table[row]
    ignored = shutil.ignore_patterns("train.txt")
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi", ignore=ignored)
    flags = ["--limit-test", 30, "--load", folder / "tuned/hi-1", "--results", tmp_path / "again"]
    command("finetune.py", "--tgt", "hi", "--data", tmp_path / "data", *flags)
    (again,), (_, line) = read_results(tmp_path / "again"), read_results(folder / "results")
    same = ("f1", "precision", "recall", "updated", "share", "tune", "pe", "weights", "priming", "seed")
    assert {name: again[name] for name in same} == {name: line[name] for name in same}


@pytest.fixture
def moved_together(table, tmp_path):
    """Copies of a primed folder and of what was tuned on it, side by side as they were, at another place."""
    shutil.copytree(table[4][0], tmp_path / "new")
    (tmp_path / "old").mkdir()
    with pytest.MonkeyPatch.context() as patch:  # where they were there is nothing now
        patch.chdir(HERE)
        original = table[4][0].rename(table[4][0].with_name("away"))
        yield tmp_path / "new", ["--tgt", "hi", "--data", "demo/wikiann", "--limit-test", 30,
                                 "--results", tmp_path / "again"]
        original.rename(table[4][0])


def test_a_saved_pair_is_found_again_after_it_has_moved_with_its_base(moved_together, table, tmp_path):
    folder, flags = moved_together
    command("finetune.py", *flags, "--load", folder / "tuned/hi-0")
    f1 = read_results(folder / "results")[0]["f1"]
    (folder / "tuned").rename(tmp_path / "tuned")
    told = command("finetune.py", *flags, "--load", tmp_path / "tuned/hi-0", status=2).stderr
    assert len(told.splitlines()) == 1 and str(table[4][0] / "primed") in told
    command("finetune.py", *flags, "--load", tmp_path / "tuned/hi-0", "--init", folder / "primed")
    lines = read_results(tmp_path / "again")
    assert [line["f1"] for line in lines] == len(lines) * [f1]


def test_a_base_that_has_changed_is_refused(table, moved_together, tmp_path):
    folder, flags = moved_together
    weights = tensors(folder / "primed")
    weights["embeddings.word_embeddings.weight"][7, 7] += 1e-3
    save_file(weights, folder / "primed/model.safetensors", {"format": "pt"})
    done = command("finetune.py", *flags, "--load", folder / "tuned/hi-0", status=2)
    (line,) = done.stderr.splitlines()
    assert f"is not what {folder}/tuned/hi-0 was tuned on: give --init" in line
    other = ["--load", folder / "tuned/hi-0", "--init", table[7][0] / "primed"]
    (line,) = command("finetune.py", *flags, *other, status=2).stderr.splitlines()
    assert "was tuned on" in line and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "flags", [["--model", "demo"], ["--pe", "bitfit"], ["--bottleneck", 9]], ids=lambda flags: flags[0]
)
def test_a_flag_that_the_folder_decides_is_refused(flags, table, primed, tmp_path):
    for folder in (["--init", primed], ["--load", table[4][0] / "tuned/hi-0"]):
        done = command("finetune.py", *HINDI, *folder, *flags, "--results", tmp_path / "r", status=2)
        (line,) = done.stderr.splitlines()
        value = {"--model": "demo/encoder", "--pe": "adapter", "--bottleneck": "8"}[flags[0]]
        assert line.endswith(f"{flags[0]} {flags[1]}: {folder[1]} has {value}")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--types", "PER"], ["--tune", "full"], ["--max-length", 20], ["--seeds", 5], ["--bf16"]],
    ids=lambda flags: flags[0],
)
def test_a_saved_pair_keeps_its_own_settings(flags, table, tmp_path):
    load = ["--load", table[4][0] / "tuned/hi-0", "--results", tmp_path / "r"]
    (line,) = command("finetune.py", *HINDI, *load, *flags, status=2).stderr.splitlines()
    assert flags[0].replace("-", "_").strip("_") in line.replace("-", "_") and not list(tmp_path.iterdir())


def test_the_same_commands_twice_do_nothing_more(table, primed):
    folder = table[4][0]
    before = contents(folder)
    flags = [*DEMO, *SMALL_PRIMING, "--output", primed]
    assert command("prime.py", *flags).stdout.splitlines()[-1] == f"{primed} is complete"
    outputs = ["--results", folder / "results", "--save", folder / "tuned", "--seeds", 0, 1]
    done = command("finetune.py", *HINDI, *SMALL_TUNING, "--init", primed, *outputs)
    first, second, *told = done.stdout.splitlines()
    assert [first, second] == ["hi seed 0: done before", "hi seed 1: done before"]
    assert told == table[4][1].splitlines()[-2:]  # the table of means
    assert contents(folder) == before
    assert "name another" in command("prime.py", *flags, "--seed", 3, status=2).stderr
    assert contents(folder) == before


def test_a_run_on_other_data_weights_or_settings_is_another_run(tmp_path):
    shutil.copytree("demo/encoder", tmp_path / "encoder")
    for split in ("train", "test", "validation"):
        (tmp_path / "data/hi").mkdir(parents=True, exist_ok=True)
        shutil.copy(f"demo/wikiann/hi/{split}.txt", tmp_path / "data/hi")
    results = tmp_path / "r"
    flags = ["--tgt", "hi", "--init", "none", "--model", tmp_path / "encoder", "--data", tmp_path / "data"]
    flags += [*SMALL_TUNING, "--results", results]

    def runs_again(*more):
        count = len(read_results(results))
        done = command("finetune.py", *flags, *more)
        again = len(read_results(results)) - count
        assert again in (0, 1) and again == 1 - ("done before" in done.stdout)
        return bool(again)

    assert runs_again() and not runs_again()
    assert not runs_again("--seeds", 0, 0)  # a seed given twice is one
    assert runs_again("--lr", 1e-2) and runs_again("--seeds", 1)
    for split in ("train", "test"):
        path = tmp_path / f"data/hi/{split}.txt"
        path.write_text(path.read_text().replace("B-LOC", "B-ORG", 1))
        assert runs_again() and not runs_again()
    path = tmp_path / "data/hi/train.txt"
    path.write_text(f"{path.read_text()}\n\nmore\tO\n")  # beyond --limit-train: no part of the run
    assert not runs_again()
    weights = tensors(tmp_path / "encoder")
    weights["embeddings.word_embeddings.weight"][7, 7] += 1e-3
    save_file(weights, tmp_path / "encoder/model.safetensors", {"format": "pt"})
    assert runs_again() and not runs_again()


def test_a_folder_and_results_that_disagree_are_refused(tmp_path):
    results, save = tmp_path / "r", ["--save", tmp_path / "tuned"]
    flags = [*HINDI, *SMALL_TUNING, *START, "--results", results]
    command("finetune.py", *flags)
    (line,) = command("finetune.py", *flags, *save, status=2).stderr.splitlines()  # a line without a folder
    assert f"{tmp_path}/tuned/hi-0, {results}/hi-0-" in line and line.endswith("one is there: remove it")
    assert not (tmp_path / "tuned").exists() and len(read_results(results)) == 1
    command("finetune.py", *flags, "--lr", 1e-2, *save)
    before = contents(tmp_path)
    (line,) = command("finetune.py", *flags, "--lr", 2e-2, *save, status=2).stderr.splitlines()
    assert "one is there: remove it" in line and contents(tmp_path) == before  # a folder of another run


def test_results_of_loading_are_not_taken_for_training(table, tmp_path):
    """Nor the other way round: a line of scoring does not stand for a run of the same seed."""
    base = [*HINDI, *SMALL_TUNING, *TUNING[3], "--results", tmp_path / "r"]
    command("finetune.py", *HINDI, "--load", table[3][0] / "tuned/hi-0", "--limit-test", 30,
            "--results", tmp_path / "r")
    assert "done before" not in command("finetune.py", *base).stdout
    assert len(read_results(tmp_path / "r")) == 2
