"""prime.py in several processes, with its flags: each process takes its share of the tasks of every batch.

    torchrun --nproc-per-node 2 examples/distributed.py --model demo/encoder --data demo/wikiann --tasks 4

The gradients of line 9 are summed over all processes, and θh comes from the first task of process 0, so the
result is that of prime.py except for rounding. Only --method ft depends on the number of processes, because
each draws its own dropout masks. Process 0 writes checkpoints and the folder, as prime.py does; both
resume with any number of processes. With --device cuda there is one GPU per process.
"""

import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapters
import prime


def share_of(batches, rank: int, processes: int):
    """The tasks of process `rank` in each batch, and dropout masks of its own."""
    for batch in batches:
        count = len(batch) // processes
        torch.manual_seed(torch.initial_seed() + rank)  # the seed of the step, by sample_batches
        yield batch[rank * count : (rank + 1) * count]


def sum_over_processes(optimizer: torch.optim.Optimizer) -> None:
    """From now on, each step of the optimizer takes the sum of the gradients of all processes. A parameter
    that no task of a process reaches adds zeros."""

    def sum_gradients(*_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)

    optimizer.register_step_pre_hook(sum_gradients)


def main() -> None:
    args = prime.parse_arguments()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.tasks % processes:
        raise adapters.UserError(f"--tasks {args.tasks} is not a multiple of the {processes} processes")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    options = tokenizer, args.types, args.max_length, args.limit_train, args.support + args.query
    corpora = [adapters.load_sentences(args.data, name, "train", *options) for name in args.src]
    not_compared = ("model", "data", "device", "output", "save_every")  # as in prime.py
    settings = {name: value for name, value in vars(args).items() if name not in not_compared}
    settings |= adapters.fingerprint(encoder, corpora)
    model = adapters.build_tagger(encoder, args.types, args.pe, args.bottleneck, device, args.bf16)
    settings["bottleneck"] = model.bottleneck
    if adapters.find_run_or_claim(args.output, settings, "priming.json"):
        return print(f"{args.output} is complete") if rank == 0 else None
    theta_p, theta_a, theta_h = model.split_parameters()
    inner_steps, support, query = args.inner_steps, args.support, args.query
    if args.method == "ft":  # as in prime.py
        theta_p, theta_h, inner_steps = {**theta_p, **theta_h}, {}, 0
        support, query = 0, support + query
        model.train()
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, args.outer_lr, args.steps)
    checkpoint, stateful = args.output / "checkpoint.pt", (model, optimizer, scheduler)
    losses = adapters.load_checkpoint(checkpoint, device, stateful)
    batches = prime.sample_batches(
        corpora, args.steps, args.tasks, support, query, args.seed, start_step=len(losses))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")  # after all checks
    sum_over_processes(optimizer)
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=share_of(batches, rank, processes),
        loss=adapters.tag_loss, optimizer=optimizer, scheduler=scheduler, inner_lr=args.inner_lr,
        inner_steps=inner_steps, maml=args.method == "maml",
        encode=model.encode_sets if args.pe == "adapter" else None)
    silent = True if rank else None
    for query_losses in tqdm(meta_training, "priming", args.steps, initial=len(losses), disable=silent):
        for p in theta_h.values():
            dist.broadcast(p.data, 0)  # line 9: θh = θ1_h, of the first of all tasks
        loss = torch.tensor(sum(query_losses), device=device)
        dist.all_reduce(loss)
        losses.append(loss.item())
        adapters.expect(math.isfinite(losses[-1]), f"meta step {len(losses)}: lower --inner-lr or --outer-lr")
        if rank == 0 and (len(losses) % args.save_every == 0 or len(losses) == args.steps):
            with adapters.atomic_write(checkpoint) as new:
                torch.save((losses, [part.state_dict() for part in stateful]), new)
    if rank == 0:
        record = {**vars(args), **settings, "processes": processes}
        adapters.save_primed(args.output, model, tokenizer, record, losses)
        print(f"{args.output}: {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    adapters.cli(main)
