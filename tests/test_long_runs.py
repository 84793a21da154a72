"""Runs that are killed, interrupted, resumed, started twice at once, or no longer finite."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    FROM_PRETRAINED, HINDI, SLOW_PRIMING, SMALL_TUNING, command, run_process, start_process,
)
from torch import nn



def kill_this_process(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before_the_folder_is_claimed():
    import adapters  # the fault comes in a process of its own

    def die_if_it_is_the_claim(path, mode="r"):
        return kill_this_process() if mode == "x" else open(path, mode)

    adapters.open = die_if_it_is_the_claim


def killed_after_the_folder_is_claimed():
    torch.optim.AdamW.__init__ = kill_this_process


def killed_in_the_fifth_checkpoint():
    save = torch.save

    def save_half(state, path):
        save(state, path)
        if len(state[0]) == 5:
            os.truncate(path, path.stat().st_size // 2)
            kill_this_process()

    torch.save = save_half


def killed_before_replacement(number):
    """Before the file that is written as number `number` gets its name."""
    replace, count = Path.replace, itertools.count(1)

    def replace_or_die(path, target):
        if next(count) == number:
            kill_this_process()
        return replace(path, target)

    Path.replace = replace_or_die


def killed_before_the_first_checkpoint_gets_its_name():
    killed_before_replacement(1)


def killed_before_the_second_checkpoint_gets_its_name():
    killed_before_replacement(2)


def killed_before_the_adapter_is_written():
    import adapters

    adapters.save_file = kill_this_process  # safetensors'


def killed_before_the_record_gets_its_name():
    killed_before_replacement(12 + 1)


def killed_before_the_checkpoint_is_deleted():
    unlink = Path.unlink

    def unlink_or_die(path, *args, **kwargs):
        if path.name == "checkpoint.pt":
            kill_this_process()
        unlink(path, *args, **kwargs)

    Path.unlink = unlink_or_die


def disk_full(size=100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def disk_full_at_the_last_checkpoint():
    save = torch.save

    def save_to_full_disk(state, path):
        if len(state[0]) == 12:
            disk_full()
        save(state, path)

    torch.save = save_to_full_disk


def disk_full_after_the_last_checkpoint():
    save = torch.save

    def save_and_fill_disk(state, path):
        save(state, path)
        if len(state[0]) == 12:
            disk_full()

    torch.save = save_and_fill_disk


def no_fcntl():
    """As on Windows. Modules that may use it are imported again."""
    for name in ("prime", "adapters", "fcntl"):
        sys.modules.pop(name, None)
    sys.modules["fcntl"] = None


def primed_bytes(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The output of a run that was never stopped."""
    output = tmp_path_factory.mktemp("uninterrupted") / "primed"
    run_process("prime.py", [*SLOW_PRIMING, "--output", output], output.parent / "stderr")
    return output


def steps_done(output, steps=12):
    """The number of steps that the folder has kept: each file is complete or does not have its name yet."""
    if (output / "priming.json").exists():
        assert json.loads((output / "priming.json").read_text())["steps"] == steps and primed_bytes(output)
        return steps
    if (output / "checkpoint.pt").exists():
        losses, states = torch.load(output / "checkpoint.pt", weights_only=True)
        assert 1 <= len(losses) <= steps and len(states) == 3
        return len(losses)
    return 0


# ---- killed and interrupted ----


def test_twenty_kills_at_random_moments_lose_at_most_one_step(uninterrupted, tmp_path):
    """Ten times two runs at once, each in a folder of its own."""
    flags, rng, done = [*SLOW_PRIMING, "--output"], random.Random(0), []
    start = time.perf_counter()
    run_process("prime.py", [*flags, tmp_path / "timed"], tmp_path / "stderr")
    seconds, outputs = time.perf_counter() - start, [tmp_path / "one", tmp_path / "two"]
    for _ in range(10):
        running = [start_process("prime.py", [*flags, output], tmp_path / "stderr") for output in outputs]
        start, moments = time.perf_counter(), sorted(rng.uniform(0, seconds) for _ in running)
        for moment, process, output in zip(moments, running, outputs):
            time.sleep(max(0, start + moment - time.perf_counter()))
            process.kill()
            process.join()
            done.append(steps_done(output))
            if (output / "priming.json").exists():
                assert primed_bytes(output) == primed_bytes(uninterrupted)
                shutil.rmtree(output)
    assert any(0 < steps < 12 for steps in done), done
    for output in outputs:
        run_process("prime.py", [*flags, output], tmp_path / "stderr")
        assert primed_bytes(output) == primed_bytes(uninterrupted) and not list(output.glob("*.new"))


@pytest.mark.parametrize(
    "fault, steps",
    [
        (killed_before_the_folder_is_claimed, 0), (killed_after_the_folder_is_claimed, 0),
        (killed_before_the_first_checkpoint_gets_its_name, 0),
        (killed_before_the_second_checkpoint_gets_its_name, 1), (killed_in_the_fifth_checkpoint, 4),
        (killed_before_the_adapter_is_written, 12), (killed_before_the_record_gets_its_name, 12),
        (killed_before_the_checkpoint_is_deleted, 12),
    ],
)
def test_the_same_command_completes_a_run_killed_at_the_worst_moment(fault, steps, uninterrupted, tmp_path):
    flags, output = [*SLOW_PRIMING, "--output", tmp_path / "primed"], tmp_path / "primed"
    run_process("prime.py", flags, tmp_path / "stderr", -signal.SIGKILL, fault=fault)
    assert steps_done(output) == steps
    assert (output / "priming.json").exists() == (fault is killed_before_the_checkpoint_is_deleted)
    run_process("prime.py", flags, tmp_path / "stderr")
    assert primed_bytes(output) == primed_bytes(uninterrupted)
    assert names(output) - {"checkpoint.pt"} == names(uninterrupted)


@pytest.mark.parametrize("method", ["meta", "ft"])  # ft has dropout, so its random state matters too
def test_an_interrupted_run_resumes_to_the_same_bits(method, tmp_path):
    flags = [*SLOW_PRIMING, "--steps", 30, "--save-every", 4, "--method", method, "--output"]
    run_process("prime.py", [*flags, tmp_path / "uninterrupted"], tmp_path / "stderr")
    for number in (signal.SIGINT, signal.SIGTERM):
        output = tmp_path / number.name
        process = start_process("prime.py", [*flags, output], tmp_path / "stderr")
        while not (output / "checkpoint.pt").exists():
            time.sleep(0.005)
        os.kill(process.pid, number)
        process.join()
        message = (tmp_path / "stderr").read_text()
        if number == signal.SIGINT:
            assert process.exitcode == 2 and len(message.splitlines()) == 1
            assert message == "prime.py: interrupted; checkpoints and results are kept\n"
        else:
            assert process.exitcode == -number and not message
        assert 4 <= steps_done(output, 30) < 30
        run_process("prime.py", [*flags, output], tmp_path / "stderr")
        assert primed_bytes(output) == primed_bytes(tmp_path / "uninterrupted")


def interrupted_in_the_first_step():
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    torch.optim.AdamW.step = interrupt


def test_an_interruption_before_the_first_checkpoint_promises_no_more_than_is_kept(uninterrupted, tmp_path):
    flags, output = [*SLOW_PRIMING, "--output", tmp_path / "primed"], tmp_path / "primed"
    run_process("prime.py", flags, tmp_path / "stderr", 2, fault=interrupted_in_the_first_step)
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert names(output) == {"settings.json"}
    assert line == "prime.py: interrupted; checkpoints and results are kept"
    run_process("prime.py", flags, tmp_path / "stderr")
    assert primed_bytes(output) == primed_bytes(uninterrupted)


# ---- one folder, one run ----


def test_two_equal_runs_at_once_both_succeed_with_the_bytes_of_one(uninterrupted, tmp_path):
    output = tmp_path / "primed"
    flags = [*SLOW_PRIMING, "--output", output]
    both = [start_process("prime.py", flags, tmp_path / f"stderr-{i}") for i in range(2)]
    for process in both:
        process.join()
    messages = [(tmp_path / f"stderr-{i}").read_text() for i in range(2)]
    assert [process.exitcode for process in both] == [0, 0], messages
    assert primed_bytes(output) == primed_bytes(uninterrupted) and names(output) == names(uninterrupted)
    assert "complete" in command("prime.py", *flags).stdout  # the record's checksums fit the files


def test_an_equal_run_may_claim_the_folder_at_any_moment(uninterrupted, monkeypatch, tmp_path):
    output, iterdir = tmp_path / "primed", Path.iterdir

    def claimed_before_the_folder_is_listed(folder):
        if folder == output and not (output / "settings.json").exists():
            shutil.copy(uninterrupted / "settings.json", output)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", claimed_before_the_folder_is_listed)
    command("prime.py", *SLOW_PRIMING, "--output", output)


def test_a_claim_that_a_kill_left_empty_is_named(tmp_path):
    (tmp_path / "primed").mkdir()
    (tmp_path / "primed/settings.json").touch()
    done = command("prime.py", *SLOW_PRIMING, "--output", tmp_path / "primed", status=2)
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/primed/settings.json: expected a run's record" in line


def test_one_of_two_different_runs_at_once_wins_and_the_other_is_told_why(tmp_path):
    output = tmp_path / "primed"
    both = [start_process("prime.py", [*SLOW_PRIMING, "--seed", seed, "--output", output],
                          tmp_path / f"stderr-{seed}") for seed in (0, 1)]
    for process in both:
        process.join()
    messages = [(tmp_path / f"stderr-{seed}").read_text() for seed in (0, 1)]
    assert sorted(process.exitcode for process in both) == [0, 2], messages
    winner = [process.exitcode for process in both].index(0)
    (line,) = messages[1 - winner].splitlines()
    assert f"{output} holds a run with seed {winner} (now {1 - winner})" in line
    assert json.loads((output / "priming.json").read_text())["seed"] == winner
    flags = [*SLOW_PRIMING, "--seed", winner, "--output"]
    command("prime.py", *flags, tmp_path / "alone")
    assert primed_bytes(output) == primed_bytes(tmp_path / "alone")


def test_priming_needs_no_fcntl_module(uninterrupted, tmp_path):
    flags = [*SLOW_PRIMING, "--output", tmp_path / "primed"]
    run_process("prime.py", flags, tmp_path / "stderr", fault=no_fcntl)
    assert primed_bytes(tmp_path / "primed") == primed_bytes(uninterrupted)


# ---- not finite, disk full ----


@pytest.mark.parametrize("flags", [["--method", "maml", "--inner-lr", 1e4], ["--outer-lr", 1e15]])
def test_a_loss_that_is_not_finite_stops_priming_after_the_last_good_checkpoint(flags, tmp_path):
    flags = [*SLOW_PRIMING, "--steps", 300, "--output", tmp_path / "primed", *flags]
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    match = re.search(r"meta step (\d+): query losses \[\S+, \S+\], gradient norm \S+; lower --inner-lr", line)
    assert match and ("nan" in line or "inf" in line), line
    assert steps_done(tmp_path / "primed", 300) == int(match[1]) - 1


def test_a_gradient_that_is_not_finite_stops_priming_though_the_loss_is_finite(monkeypatch, tmp_path):
    calls, cross_entropy = itertools.count(1), nn.functional.cross_entropy

    def with_infinite_slope(logits, tags):  # the square root has one at zero
        return cross_entropy(logits, tags) + (torch.sqrt(0 * logits.sum()) if next(calls) > 24 else 0)

    monkeypatch.setattr(nn.functional, "cross_entropy", with_infinite_slope)
    flags = [*SLOW_PRIMING, "--method", "ft", "--steps", 100, "--output", tmp_path / "primed"]
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    assert re.search(r"meta step 13: query losses \[\d\S+, \d\S+\], gradient norm nan", line), line
    assert steps_done(tmp_path / "primed", 100) == 12


def test_a_loss_that_is_not_finite_stops_fine_tuning(tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--tune", "full", "--lr", 1e15]
    done = command("finetune.py", *flags, "--results", tmp_path / "r", "--save", tmp_path / "s", status=2)
    assert "fine-tuning, seed 0: the loss is nan; lower --lr" in done.stderr
    assert not [*(tmp_path / "r").iterdir()] and not [*(tmp_path / "s").iterdir()]


@pytest.mark.parametrize(
    "fault, steps",
    [(disk_full, 0), (disk_full_at_the_last_checkpoint, 11), (disk_full_after_the_last_checkpoint, 12)],
)
def test_a_full_disk_leaves_no_output_that_looks_complete(fault, steps, uninterrupted, tmp_path):
    output = tmp_path / "primed"
    flags = [*SLOW_PRIMING, "--output", output]
    run_process("prime.py", flags, tmp_path / "stderr", 2, fault=fault)
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("prime.py: ") and str(output) in line and steps_done(output) == steps
    assert not [*output.glob("*.new")]  # a retry has the room that it needs
    run_process("prime.py", flags, tmp_path / "stderr")
    assert primed_bytes(output) == primed_bytes(uninterrupted)
