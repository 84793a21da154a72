"""Runs that are killed, stopped, gone on with, shared among processes, or end in what is not finite."""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    DEMO, HERE, HINDI, LONG, SMALL_TUNING, START, TUNING, command, contents, read_results,
    tensors,
)
from safetensors.torch import save_file

import prime

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["prime", "finetune", "transformers.models.bert.modeling_bert", "datasets", "seqeval.metrics", "conftest"]
)


def child(script, flags, stderr, environment=None, fault=None):
    """The target of a process: a script with its flags, its stderr in a file, and perhaps a fault."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    sys.argv, sys.stdout = [script, *map(str, flags)], open(os.devnull, "w")
    sys.stderr = sys.__stderr__ = open(stderr, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would ignore it
    if fault:
        fault()
    runpy.run_path(str(HERE / script), run_name="__main__")


def begin(flags, stderr, script="prime.py", **settings):
    process = processes.Process(target=child, args=(script, flags, stderr), kwargs=settings)
    process.start()
    return process


def finish(flags, stderr, status=0, **settings):
    process = begin(flags, stderr, **settings)
    process.join()
    assert process.exitcode == status, Path(stderr).read_text()


def killed_while_a_checkpoint_is_written():
    save = torch.save

    def half(state, path):
        save(state, path)
        if len(state[1]) == 5:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def killed_before_a_file_takes_its_place(nth=5):
    replace, count = Path.replace, itertools.count(1)

    def kill_instead(path, target):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = kill_instead


def killed_after_the_first_step():
    killed_before_a_file_takes_its_place(nth=2)


def killed_before_the_last_file():
    killed_before_a_file_takes_its_place(nth=12 + 1)


def killed_after_the_last_file():
    Path.unlink = lambda path, missing_ok=False: os.kill(os.getpid(), signal.SIGKILL)


def killed_before_the_adapter_is_written():
    import safetensors.torch

    safetensors.torch.save_file = lambda *given: os.kill(os.getpid(), signal.SIGKILL)


def disk_full(size=100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def disk_full_for_the_last_checkpoint():
    save = torch.save

    def full(state, path):
        if len(state[1]) == 12:
            disk_full()
        save(state, path)

    torch.save = full


def primed_bytes(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "primed"
    finish([*LONG, "--output", output], output.parent / "stderr")
    assert not list(output.glob("checkpoint*"))
    return primed_bytes(output)


def steps_done(output, steps=12):
    """What stands under its name is a whole checkpoint, or a whole result, or nothing."""
    if (output / "priming.json").exists():
        assert json.loads((output / "priming.json").read_text())["steps"] == steps and primed_bytes(output)
        return steps
    if (output / "checkpoint.pt").exists():
        _, losses, states = torch.load(output / "checkpoint.pt", weights_only=True)
        assert 1 <= len(losses) <= steps and len(states) == 3
        return len(losses)
    return 0


# ---- killed and stopped ----


def test_twenty_kills_at_random_moments_lose_nothing_but_the_step_under_way(tmp_path):
    flags, chance, done = [*LONG, "--steps", 20, "--output"], random.Random(0), []
    finish([*flags, tmp_path / "warm"], tmp_path / "stderr")  # the server of processes has started then
    began = time.perf_counter()
    finish([*flags, tmp_path / "whole"], tmp_path / "stderr")
    seconds, output = time.perf_counter() - began, tmp_path / "primed"
    expected = primed_bytes(tmp_path / "whole")
    for _ in range(20):
        process = begin([*flags, output], tmp_path / "stderr")
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.join()
        done.append(steps_done(output, 20))
        if (output / "priming.json").exists():
            assert primed_bytes(output) == expected
            shutil.rmtree(output)
    assert any(0 < steps < 20 for steps in done), done
    finish([*flags, output], tmp_path / "stderr")
    assert primed_bytes(output) == expected and not list(output.glob("*.new"))


@pytest.mark.parametrize(
    "fault, steps",
    [
        (killed_while_a_checkpoint_is_written, 4), (killed_before_a_file_takes_its_place, 4),
        (killed_after_the_first_step, 1), (killed_before_the_adapter_is_written, 12),
        (killed_before_the_last_file, 12), (killed_after_the_last_file, 12),
    ],
)
def test_a_kill_at_the_worst_moment_leaves_what_the_same_command_makes_whole(fault, steps, whole, tmp_path):
    flags, output = [*LONG, "--output", tmp_path / "primed"], tmp_path / "primed"
    finish(flags, tmp_path / "stderr", -signal.SIGKILL, fault=fault)
    assert steps_done(output) == steps
    assert (output / "priming.json").exists() == (fault is killed_after_the_last_file)
    finish(flags, tmp_path / "stderr")
    assert primed_bytes(output) == whole and not list(output.glob("*.new"))
    assert (output / "priming.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("method", ["meta", "ft"])  # with dropout, the random state counts too
def test_a_stopped_run_goes_on_to_the_same_bits(number, method, tmp_path):
    flags = [*LONG, "--steps", 60, "--save-every", 7, "--method", method, "--output"]
    finish([*flags, tmp_path / "whole"], tmp_path / "stderr")
    process = begin([*flags, tmp_path / "primed"], tmp_path / "stopped")
    while not (tmp_path / "primed/checkpoint.pt").exists():
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    told = (tmp_path / "stopped").read_text()
    if number == signal.SIGINT:
        assert process.exitcode == 2 and told == "prime.py: interrupted; the same command goes on\n"
    else:
        assert process.exitcode == -number and not told
    assert 7 <= steps_done(tmp_path / "primed", 60) < 60
    finish([*flags, tmp_path / "primed"], tmp_path / "stderr")
    assert primed_bytes(tmp_path / "primed") == primed_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [["--inner-lr", "0.1"], ["--steps", "13"], ["--src", "es", "en"], ["--seed", "1"], ["--bf16"],
     ["--types", "PER", "ORG", "LOC", "MISC"], "data", "weights", "cut", "flipped", "a file of others"],
    ids=str,
)
def test_another_run_in_the_same_folder_is_refused_and_nothing_in_it_touched(change, unfinished, tmp_path):
    """The base and data are put where they were when the run was cut off, so that nothing else differs."""
    root, flags = unfinished
    shutil.copytree(root, tmp_path / "copy")
    output = tmp_path / "copy/primed"
    flags = [*flags, "--output", output]
    path = output / "checkpoint.pt"
    if change == "data":
        edited = root / "wikiann/en/train.txt"
        edited.write_text(edited.read_text().replace("B-LOC", "B-ORG", 1))
    elif change == "weights":
        edited = root / "encoder/model.safetensors"
        weights = tensors(root / "encoder")
        weights["embeddings.word_embeddings.weight"][0, 0] += 1e-6
        save_file(weights, edited, {"format": "pt"})
    elif change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "flipped":
        path.write_bytes(b"x" + path.read_bytes()[1:])
    elif change == "a file of others":
        path.rename(output / "thesis.tex")
    else:
        flags += change
    before = contents(output)
    done = command("prime.py", *flags, status=2)
    if change in ("data", "weights"):
        source = tmp_path / "copy" / edited.relative_to(root)
        shutil.copy(source, edited)
    (line,) = done.stderr.splitlines()
    assert f"prime.py: --output {output} " in line if change in ("cut", "flipped") else "name another" in line
    assert contents(output) == before
    command("prime.py", *unfinished[1], "--output", shutil.copytree(root / "primed", tmp_path / "unchanged"))


def test_a_second_command_on_one_output_is_refused(tmp_path):
    flags = [*LONG, "--steps", 2000, "--output", tmp_path / "primed"]
    first = begin(flags, tmp_path / "stderr")
    while not (tmp_path / "primed/checkpoint.pt").exists():
        time.sleep(0.01)
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    assert f"--output {tmp_path}/primed (does another command write there?)" in line
    assert first.is_alive()
    first.kill()
    first.join()
    assert steps_done(tmp_path / "primed", 2000) >= 1


# ---- not finite, disk full ----


@pytest.mark.parametrize("flags", [["--method", "maml", "--inner-lr", 1e4], ["--outer-lr", 1e15]])
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(flags, tmp_path):
    done = command("prime.py", *LONG, "--steps", 300, "--output", tmp_path / "primed", *flags, status=2)
    (line,) = done.stderr.splitlines()
    told = r"step (\d+): losses \[\S+, \S+\] of \['en', 'es'\] in turn, gradient \S+; lower"
    found = re.search(told, line)
    assert found and "nan" in line or "inf" in line, line
    assert steps_done(tmp_path / "primed", 300) == int(found[1]) - 1


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(monkeypatch, tmp_path):
    steps, loss = itertools.count(1), prime.tag_loss

    def sharp(model, sentences):  # the root has an infinite slope at zero
        scores = model(sentences)
        more = torch.sqrt(0 * scores.sum()) if next(steps) > 24 else 0
        return loss(lambda _: scores, sentences) + more

    monkeypatch.setattr(prime, "tag_loss", sharp)
    flags = [*LONG, "--method", "ft", "--steps", 100, "--output", tmp_path / "primed"]
    monkeypatch.setattr(sys, "argv", ["prime.py", *map(str, flags)])
    with pytest.raises(prime.BadInput, match=r"step 13: .* \[\d\S+, \d\S+\] .* nan"):
        prime.main()
    assert steps_done(tmp_path / "primed", 100) == 12


def test_a_loss_that_is_not_finite_stops_fine_tuning(tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *START, "--tune", "full", "--lr", 1e15]
    done = command("finetune.py", *flags, "--results", tmp_path / "r", "--save", tmp_path / "s", status=2)
    assert "fine-tuning, seed 0: the loss is nan; lower --lr" in done.stderr
    assert not [*(tmp_path / "r").iterdir()] and not (tmp_path / "s").exists()


@pytest.mark.parametrize("fault, steps", [(disk_full, 0), (disk_full_for_the_last_checkpoint, 11)])
def test_a_full_disk_is_told_and_leaves_no_output_that_looks_complete(fault, steps, whole, tmp_path):
    output = tmp_path / "primed"
    finish([*LONG, "--output", output], tmp_path / "stderr", 2, fault=fault)
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith(f"prime.py: writing {output}") and steps_done(output) == steps
    finish([*LONG, "--output", output], tmp_path / "stderr")
    assert primed_bytes(output) == whole


# ---- several processes ----


def prime_a_share(rank, count, port, path):
    """The target of a process: two of its own tasks a step, by the lines that README has for it."""
    from test_prime import Small, make_tasks, small_loss

    torch.set_num_threads(1)
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ.update(environment, WORLD_SIZE=str(count))
    torch.distributed.init_process_group("gloo")
    model = Small()
    theta_p, theta_a, theta_h = model.sets()
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer, 1e-2, 10)

    def sum_gradients(*given):
        for p in outer:
            torch.distributed.all_reduce(p.grad)

    optimizer.register_step_pre_hook(sum_gradients)
    share = 4 // count
    batches = [make_tasks(4, seed)[share * rank : share * (rank + 1)] for seed in range(3)]
    for _ in prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=small_loss,
        optimizer=optimizer, scheduler=scheduler,
    ):
        for p in theta_h.values():
            torch.distributed.broadcast(p.data, 0)
    torch.save(model.state_dict(), f"{path}-{rank}")
    torch.distributed.destroy_process_group()


def test_several_processes_give_what_one_gives(tmp_path):
    models = []
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shares = [processes.Process(target=prime_a_share, args=(rank, count, port, tmp_path / f"of-{count}"))
                  for rank in range(count)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
        models += [torch.load(f"{tmp_path}/of-{count}-{rank}", weights_only=True) for rank in range(count)]
    alone, *shared = models
    for one in shared:
        assert one.keys() == alone.keys()
        assert all((one[name] - alone[name]).abs().max() <= 1e-12 for name in alone)


# ---- fine-tuning ----


def test_two_commands_share_a_results_folder_and_the_same_command_skips_what_it_has(tmp_path):
    results = tmp_path / "results"
    flags = ["--tgt", "hi", "af", *DEMO, *SMALL_TUNING, "--init", "none", "--results", results]
    both = [begin([*flags, "--seeds", *seeds], tmp_path / f"stderr-{seeds[0]}", "finetune.py")
            for seeds in ((0, 1), (2, 3))]
    for process in both:
        process.join()
    lines = read_results(results)
    runs = {(line["target"], line["seed"]) for line in lines}
    assert runs == set(itertools.product(("hi", "af"), range(4))) and len(lines) == 8
    done = command("finetune.py", *flags, "--seeds", 0, 1, 2, 3, 4)
    again = read_results(results)
    assert again[:8] == lines and done.stdout.count("done before") == 8
    assert [(line["target"], line["seed"]) for line in again[8:]] == [("hi", 4), ("af", 4)]
    assert [row.split()[-1] for row in done.stdout.splitlines()[-2:]] == ["5", "5"]  # the earlier ones too


def test_a_result_that_cannot_be_read_is_told_by_its_name(tmp_path):
    flags = [*HINDI, *SMALL_TUNING, *TUNING[3], "--results", tmp_path]
    command("finetune.py", *flags)
    (result,) = tmp_path.iterdir()
    for bad in ('{"run": "', "nonsense", "\x00" * 20):
        result.write_text(bad)
        (line,) = command("finetune.py", *flags, status=2).stderr.splitlines()
        assert line.startswith(f"finetune.py: {result}: JSONDecodeError: ") and result.read_text() == bad
