"""Several processes that share the tasks of a batch give what one process gives."""

import functools
import os
import re
import shutil
import signal
import socket

import torch
from test_long_runs import killed_before_replacement
from torch import nn

import prime
from conftest import DEMO, command, processes, random_encoder, save_encoder, start_process, tensors

CASES = {  # options of prime(), and the layers of θp, θa and θh
    "meta": ({}, "024"), "maml": ({"maml": True}, "024"), "second order": ({"second_order": True}, "024"),
    "bitfit": ({}, ("0.weight 2.weight", "0.bias 2.bias", "4")),
    "ft": ({"inner_steps": 0}, ("0 4", "2", "-")),
}
FLAGS = ["--limit-train", 60, "--support", 4, "--query", 4, "--tasks", 4, "--steps", 3, "--outer-lr", 1e-3]


def environment(rank, count, port):
    """What torchrun sets for a process."""
    values = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": count}
    return {name: str(value) for name, value in values.items()}


def prepare(values, fault):
    os.environ.update(values)
    if fault:
        fault()


def killed_in_the_second_checkpoint():
    killed_before_replacement(2)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def prime_a_share(rank, count, port, path):
    """The target of a process: three meta steps of its share of four tasks, for each case."""
    import distributed

    torch.set_num_threads(1)
    os.environ.update(environment(rank, count, port))
    torch.distributed.init_process_group("gloo")
    for case, (options, layers) in CASES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        theta_p, theta_a, theta_h = (
            {name: p for name, p in model.named_parameters() if name.startswith(tuple(prefixes.split()))}
            for prefixes in layers)
        optimizer, scheduler = prime.adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], 1e-2, 10)
        distributed.sum_over_processes(optimizer)
        data = torch.randn(3, 4, 2, 6, 4).double()  # [steps, tasks, support and query, sentences, features]
        batches = [[tuple(task) for task in tasks] for tasks in data]
        for _ in prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h,
            batches=distributed.share_of(batches, rank, count), loss=lambda f, x: f(x).square().mean(),
            optimizer=optimizer, scheduler=scheduler, **options,
        ):
            for p in theta_h.values():
                torch.distributed.broadcast(p.data, 0)
        torch.save(model.state_dict(), f"{path} {case} {rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_that_share_the_tasks_give_what_one_gives_in_each_case(tmp_path):
    for count in (1, 2):
        port = free_port()
        shares = [processes.Process(target=prime_a_share, args=(rank, count, port, tmp_path / f"of {count}"))
                  for rank in range(count)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
    for case in CASES:
        alone, *shared = (
            torch.load(f"{tmp_path}/of {part} {case} {rank}", weights_only=True)
            for part, rank in ((1, 0), (2, 0), (2, 1)))
        for state in shared:
            assert state.keys() == alone.keys()
            assert max((state[name] - alone[name]).abs().max() for name in alone) <= 1e-12, case


def run_distributed(flags, folder, status=(0, 0), fault=None, script="examples/distributed.py"):
    """Two processes of a script as torchrun starts them, the first after fault(); returns what each wrote to
    stderr."""
    port = free_port()
    started = [
        start_process(script, flags, folder / f"stderr{rank}", folder / f"stdout{rank}",
                      fault=functools.partial(prepare, environment(rank, 2, port), None if rank else fault))
        for rank in range(2)]
    for process in started:
        process.join()
    errors = [(folder / f"stderr{rank}").read_text() for rank in range(2)]
    assert tuple(process.exitcode for process in started) == status, errors
    return errors


def test_the_command_in_two_processes_writes_what_prime_py_writes(tmp_path):
    """Without dropout, for Algorithm 1 and FT priming. The gradient of an attention's key bias is zero except
    for rounding, and AdamW makes a full step of it, so key biases are left out."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = save_encoder(random_encoder("Bert", 1834, **no_dropout), tmp_path / "encoder")
    for method in ("meta", "ft"):
        flags = [*DEMO, *FLAGS, "--model", encoder, "--method", method]
        command("prime.py", *flags, "--output", tmp_path / f"{method}-1")
        run_distributed([*flags, "--output", tmp_path / f"{method}-2"], tmp_path)
        for file in ("model.safetensors", "adapter.safetensors"):
            alone, shared = (tensors(tmp_path / f"{method}-{count}", file) for count in (1, 2))
            assert alone.keys() == shared.keys()
            for name in alone:
                if not name.endswith("key.bias"):
                    torch.testing.assert_close(shared[name], alone[name], rtol=0, atol=1e-4)


def test_an_interrupted_run_resumes_in_two_processes_to_the_same_bits_and_in_one_by_prime_py(tmp_path):
    flags = [*DEMO, *FLAGS, "--save-every", 1]
    run_distributed([*flags, "--output", tmp_path / "whole"], tmp_path)
    run_distributed([*flags, "--output", tmp_path / "two"], tmp_path, (-signal.SIGKILL, 1),
                    fault=killed_in_the_second_checkpoint)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert len(torch.load(tmp_path / "one/checkpoint.pt", weights_only=True)[0]) == 1
    run_distributed([*flags, "--output", tmp_path / "two"], tmp_path)
    command("prime.py", *flags, "--output", tmp_path / "one")
    whole, two, one = (tensors(tmp_path / name) for name in ("whole", "two", "one"))
    for name, value in whole.items():
        assert torch.equal(two[name], value), name
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-4 if "key.bias" not in name else 1)


def test_bad_flags_end_each_process_before_any_of_them_waits(tmp_path):
    (tmp_path / "out").mkdir()
    for error in run_distributed([*DEMO, *FLAGS, "--tasks", 3, "--output", tmp_path / "out"], tmp_path, (2, 2)):
        assert error == "distributed.py: --tasks 3 is not a multiple of the 2 processes\n"
    for error in run_distributed([*DEMO, *FLAGS, "--src", "xx", "--output", tmp_path / "out"], tmp_path, (2, 2)):
        assert "/xx/train.txt" in error and len(error.splitlines()) == 1


def test_a_sharded_theta_p_gets_the_meta_gradient_of_one_process(tmp_path):
    """By FSDP2, in float64. `prime` itself is compared with deep copies in test_substitution.py."""
    flags = ["--layers", 1, "--hidden", 16, "--tasks", 2, "--sentences", 2, "--length", 4, "--rounds", 1]
    run_distributed(flags, tmp_path, script="benchmarks/sharded_theta_p.py")
    first, *timed = (tmp_path / "stdout0").read_text().splitlines()
    assert float(re.search(r"θp sharded: (\S+) from one process", first)[1]) <= 1e-13
    assert len(timed) == 3 and (tmp_path / "stdout1").read_text() == ""
