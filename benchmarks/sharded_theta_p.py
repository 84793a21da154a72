"""Algorithm 1 where θp does not fit in one process: it is sharded by FSDP2, θa and θh are not.

    torchrun --nproc-per-node 2 benchmarks/sharded_theta_p.py

Prints how far the meta-gradient is from that of one process, and the time of a meta step and the bytes that
each process sends: in one process, in several that each have all of θp (as in examples/distributed.py), and
in several that share θp. The encoder is a randomly initialised BERT.

`prime` calls backward(inputs=...), which FSDP does not support, so the meta step is written out here with a
plain backward pass. It is first-order, without `encode`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import distributed

import adapters
import prime


def random_tagger(layers: int, hidden: int, dtype: torch.dtype) -> adapters.Tagger:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * hidden)
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    return adapters.Tagger(encoder, 7).to(dtype).eval()


def sample_tasks(count: int, sentences: int, length: int) -> list[tuple[list, list]]:
    """Support and query sets of random sentences, the same in each process."""
    torch.manual_seed(1)

    def sample_sentence():
        pieces, tags = torch.randint(5, 1000, (length,)).tolist(), torch.randint(7, (length,)).tolist()
        return adapters.Sentence(["word"] * length, tags, pieces, [*range(length)])

    return [tuple([sample_sentence() for _ in range(sentences)] for _ in range(2)) for _ in range(count)]


def shard(model: adapters.Tagger) -> None:
    """Shards θp over all processes, one encoder layer at a time. θa and θh stay whole in each process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _, theta_a, theta_h = model.split_parameters()
    for layer in model.encoder.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={*theta_a.values(), *theta_h.values()})


class ShardedLoss(prime.TaskLoss):
    def forward(self, batch, grads_of=None, create_graph=False, backward_to=None):
        """Calls `backward()` without `inputs=`, which does not know FSDP's unsharded parameters."""
        result = super().forward(batch, grads_of, create_graph)
        if backward_to:
            result.backward()
        return result


def sharded_meta_step(model: adapters.Tagger, tasks: list, inner_steps: int, inner_lr: float) -> None:
    """Lines 3 to 8 and the gradients of line 9, for this process's tasks; .grad is summed over processes."""
    sets = dict(zip(("theta_p", "theta_a", "theta_h"), model.split_parameters()))
    task_loss = ShardedLoss(model, adapters.tag_loss, sets, forbid_checkpointing=False)
    model.zero_grad()
    for number, (support, query) in enumerate(tasks, start=1):
        model.set_requires_gradient_sync(number == len(tasks))  # one exchange of gradients per step
        theta_i = {n: p.clone() for n, p in sets["theta_a"].items()}
        theta_i |= {n: p.detach().clone().requires_grad_() for n, p in sets["theta_h"].items()}
        for _ in range(inner_steps):
            grads = task_loss.gradients_at(theta_i, support, create_graph=False)
            theta_i = {n: theta_i[n] - inner_lr * grads[n] for n in theta_i}
        task_loss.at(theta_i, query, backward_to=[*model.parameters()])
    for p in sets["theta_p"].values():
        p.grad *= dist.get_world_size()  # FSDP has averaged it
    for p in sets["theta_a"].values():
        dist.all_reduce(p.grad)


def whole_meta_step(
    model: adapters.Tagger, tasks: list, inner_steps: int, inner_lr: float, *, shared: bool,
) -> None:
    """The same by `prime`, with an optimizer that leaves θ as it is. `shared`: among the processes."""
    theta_p, theta_a, theta_h = model.split_parameters()
    head = {n: p.detach().clone() for n, p in theta_h.items()}
    optimizer = torch.optim.SGD([*theta_p.values(), *theta_a.values()], lr=0.0)
    if shared:
        distributed.sum_over_processes(optimizer)
    for _ in prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[tasks], loss=adapters.tag_loss,
        optimizer=optimizer, inner_lr=inner_lr, inner_steps=inner_steps,
    ):
        for n, p in theta_h.items():
            p.data.copy_(head[n])


def largest_difference(sharded: nn.Module, whole: nn.Module) -> float:
    """The largest |difference| of the meta-gradients in θp and θa, relative to the largest entry."""
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in sharded.named_parameters() if n in expected}
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    largest = max(g.abs().max() for g in expected.values())
    return max(((found[n] - g).abs().max() / largest).item() for n, g in expected.items())


def seconds_per_step(step: Callable[[], None], steps: int) -> float:
    """The fastest of several steps; processes start each at the same time."""
    times = []
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return min(times)


def megabytes_sent(model: adapters.Tagger, tasks: int, inner_steps: int, processes: int) -> tuple:
    """What each process sends in a meta step with whole and with sharded θp, if collectives are rings: an
    all-reduce sends a tensor 2 (n - 1) / n times, an all-gather and a reduce-scatter half of that."""
    theta_p, theta_a, _ = model.split_parameters()
    p, a = (sum(v.numel() * v.element_size() for v in part.values()) / 1e6 for part in (theta_p, theta_a))
    part = (processes - 1) / processes
    gathers = tasks // processes * (inner_steps + 2)  # each forward pass, and the backward pass of line 9
    return 2 * part * (p + a), part * (gathers * p + p + 2 * a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=4, help="layers of the encoder")
    add("--hidden", type=int, default=256, help="width of the encoder")
    add("--tasks", type=int, default=4, help="tasks of a meta step, over all processes")
    add("--sentences", type=int, default=8, help="sentences per support or query set")
    add("--length", type=int, default=32, help="word pieces per sentence")
    add("--inner-steps", type=int, default=5, help="S")
    add("--rounds", type=int, default=5, help="meta steps that are timed; the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if args.tasks % processes:
        raise adapters.UserError(f"--tasks {args.tasks} is not a multiple of the {processes} processes")
    tasks = sample_tasks(args.tasks, args.sentences, args.length)
    share = tasks[rank * len(tasks) // processes : (rank + 1) * len(tasks) // processes]
    options = {"inner_steps": args.inner_steps, "inner_lr": 0.03}
    small = random_tagger(2, 32, torch.float64)
    sharded = copy.deepcopy(small)
    shard(sharded)
    whole_meta_step(small, tasks, **options, shared=False)
    sharded_meta_step(sharded, share, **options)
    difference = largest_difference(sharded, small)
    whole = random_tagger(args.layers, args.hidden, torch.float32)
    sharded = copy.deepcopy(whole)
    shard(sharded)
    runs = {
        "one process, all tasks": lambda: whole_meta_step(whole, tasks, **options, shared=False),
        f"{processes} processes, each has θp": lambda: whole_meta_step(whole, share, **options, shared=True),
        f"{processes} processes, θp sharded": lambda: sharded_meta_step(sharded, share, **options),
    }
    seconds = {}
    for name, step in runs.items():
        alone = name.startswith("one")
        step_or_wait = step if rank == 0 or not alone else lambda: None
        step_or_wait()  # not timed
        seconds[name] = seconds_per_step(step_or_wait, args.rounds)
    if rank == 0:
        print(f"meta-gradient in float64, θp sharded: {difference:.1e} from one process")
        sent = 0.0, *megabytes_sent(whole, args.tasks, args.inner_steps, processes)
        for (name, value), megabytes in zip(seconds.items(), sent):
            print(f"{name}: {1000 * value:.0f} ms per meta step; each sends {megabytes:.1f} MB")
    dist.destroy_process_group()


if __name__ == "__main__":
    adapters.cli(main)
