"""What one meta step costs, beside a step of plain fine-tuning and beside other ways to take the same meta step.

    python benchmarks/step.py --model demo/encoder --data demo/wikiann

All run in this process, in turn, round after round, on the same sentences; the table gives medians, and ratios to the
fine-tuning step on the query sentences. Before anything is timed, every way must give the same meta-gradient. "Peak" is
what a step needs beyond what stands before it (weights and AdamW's state). "Padded" takes each set as one batch padded
to its longest sentence, as everybody else does; all the rest encode packed sentences as prime.py does. `higher` and
`torchopt` (benchmarks/requirements.txt) are left out with a word if they are not installed. `--model mbert-shape` is
mBERT's shape with random weights and the demo's tokenizer.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import operator
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime

INNER_LR = 0.03


class TagLoss(nn.Module):
    """The tagger's loss as a module: the form in which `higher` and `torchopt` take a model."""

    def __init__(self, tagger):
        super().__init__()
        self.tagger = tagger

    def forward(self, sentences):
        return prime.tag_loss(self.tagger, sentences)


def higher_step(model, sets, tasks, inner_steps):
    """`higher`, first order. It moves every parameter, so those of θp get the rate zero. Adds to .grad of θ."""
    import higher

    theta_p, theta_a, theta_h = sets
    names = [name for name, _ in model.named_parameters()]
    for support, query in tasks:
        groups = [{"params": [*theta_a.values(), *theta_h.values()], "lr": INNER_LR},
                  {"params": [p for n, p in model.named_parameters() if n not in theta_a | theta_h], "lr": 0.0}]
        inner = torch.optim.SGD(groups, lr=INNER_LR)
        with higher.innerloop_ctx(TagLoss(model), inner, track_higher_grads=False) as (copied, optimizer):
            for _ in range(inner_steps):
                optimizer.step(copied(support))
            at_theta_i = dict(zip(names, copied.parameters()))
            outer = [at_theta_i[name] for name in (*theta_p, *theta_a)]
            add(sets, torch.autograd.grad(copied(query), outer))


def torchopt_step(model, sets, tasks, inner_steps):
    """`torchopt.MetaSGD` on adapter and head. It builds the graph of the exact gradient, cut here after each step."""
    import torchopt

    theta_p, theta_a, _ = sets
    moving = nn.ModuleDict({"adapter": model.adapter, "head": model.head})
    for support, query in tasks:
        before = torchopt.extract_state_dict(moving, by="reference")
        optimizer = torchopt.MetaSGD(moving, lr=INNER_LR)
        for _ in range(inner_steps):
            optimizer.step(prime.tag_loss(model, support))
            torchopt.stop_gradient(moving)
        at_theta_i = [operator.attrgetter(name)(model) for name in theta_a]  # no longer nn.Parameters
        gradients = torch.autograd.grad(prime.tag_loss(model, query), [*theta_p.values(), *at_theta_i])
        torchopt.recover_state_dict(moving, before)
        add(sets, gradients)


def add(sets, gradients):
    for parameter, gradient in zip([*sets[0].values(), *sets[1].values()], gradients):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def peak(step, device):
    """The most memory that `step` holds beyond what is held before it, in MB: RSS on a CPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = high_water()
    step()
    return high_water() - before


def high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(ROOT / "demo/encoder"))
    parser.add_argument("--data", default=str(ROOT / "demo/wikiann"))
    parser.add_argument("--src", nargs="+", default=["en", "es"])
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--support", type=int, default=16)
    parser.add_argument("--query", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-train", type=int, default=5000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="rows to add to the least: all that begin so")
    args = parser.parse_args()
    args.seed, args.method, args.max_length = 0, "meta", 128

    torch.manual_seed(0)
    shaped = args.model == "mbert-shape"
    encoder, tokenizer = adapters.load_encoder(str(ROOT / "demo/encoder") if shaped else args.model, 128, args.device)
    if shaped:
        from transformers import BertConfig, BertModel

        encoder = BertModel(BertConfig(vocab_size=119_547)).to(args.device)
    corpora = [prime.load(args, tokenizer, language, "train") for language in args.src]
    model = adapters.Tagger(encoder, 7, bf16=args.bf16).to(args.device).eval()
    sets = theta_p, theta_a, theta_h = model.sets()
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, schedule = prime.adamw(outer, 1e-6, 10**9)  # hardly moves: every round measures the same model
    tuning, _ = prime.adamw([*outer, *theta_h.values()], 1e-6, 10**9)

    def fine_tuning(tasks):
        tuning.zero_grad()
        prime.tag_loss(model, [sentence for _, query in tasks for sentence in query]).backward()
        tuning.step()

    def meta(tasks, inner_steps, hoist=model.hoist, second_order=False):
        prime.prime(model, *sets, [tasks], prime.tag_loss, optimizer, schedule, inner_lr=INNER_LR,
                    inner_steps=inner_steps, hoist=hoist, second_order=second_order)

    def padded(step):
        """`step` with every sentence in a row of its own: one batch padded to its longest."""
        def run(*arguments):
            packing, model.first_position = model.first_position, None
            step(*arguments)
            model.first_position = packing
        return run

    def library(step):
        def run(tasks, inner_steps):
            optimizer.zero_grad()
            step(model, sets, tasks, inner_steps)
            optimizer.step()
        return run

    steps = {"meta step": meta, "textbook meta step": functools.partial(meta, hoist=None)}
    for name, step in {"higher": higher_step, "torchopt": torchopt_step}.items():
        try:
            __import__(name)
            steps[name] = library(step)
        except ImportError as error:
            print(f"{name} is left out: {error}")

    def draw(step):
        return prime.sample_tasks(corpora, args, step)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def restored(step, *arguments):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        step(*arguments)
        return torch.cat([p.grad.flatten().double() for p in outer])

    reference = restored(steps["textbook meta step"], draw(0), 5)
    for name, step in steps.items():
        error = ((restored(step, draw(0), 5) - reference).norm() / reference.norm()).item()
        tolerance = 5e-2 if args.bf16 else 1e-4
        assert error < tolerance, f"{name}: the meta-gradient differs by {error:.1e} from the textbook's"
        print(f"same meta-gradient, {name}: relative difference {error:.1e}")
    del reference

    wanted = [*(("meta step", s) for s in (1, 5, 20, 50)), ("textbook meta step", 5), ("textbook meta step", 50),
              ("higher", 5), ("torchopt", 5)]
    rows = {"fine-tuning step": fine_tuning, "fine-tuning step, padded": padded(fine_tuning)}
    for name, inner_steps in wanted:
        if name in steps:
            row = functools.partial(steps[name], inner_steps=inner_steps)
            rows[f"{name}, S = {inner_steps}"] = row
            if inner_steps == 5:
                rows[f"{name}, S = {inner_steps}, padded"] = padded(row)

    rows["meta step, second order, S = 5"] = functools.partial(meta, inner_steps=5, second_order=True)
    rows = {name: row for name, row in rows.items() if name.startswith(("fine-tuning step", "meta step, S", *args.only))}

    def timed(step, *arguments):
        began = time.perf_counter()
        step(*arguments)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    times = {name: [] for name in rows}
    adamw = {name: [] for name in ("default", "foreach", "fused")}
    kinds = {name: torch.optim.AdamW(outer, lr=1e-9, **({} if name == "default" else {name: True})) for name in adamw}
    pieces = []
    for round in tqdm(range(args.rounds + 2), disable=None):  # two to warm up
        tasks = draw(round)
        for name in random.sample([*rows], len(rows)):  # so that none always follows the same one
            times[name].append(timed(rows[name], tasks))
        for name, kind in kinds.items():
            adamw[name].append(timed(kind.step))
        pieces.append([sum(len(sentence.x) for task in tasks for sentence in task[k]) for k in (0, 1)])
    del kinds
    times, adamw = ({name: statistics.median(each[2:]) for name, each in group.items()} for group in (times, adamw))
    tasks = draw(0)

    def peak_of(step, tasks):
        step(tasks)
        for parameter in model.parameters():
            parameter.grad = None
        return peak(lambda: step(tasks), args.device)

    memory = {name: peak_of(step, tasks) for name, step in rows.items()}

    base = times["fine-tuning step"]
    print(f"\n{args.model}, {args.tasks} tasks of {args.support} + {args.query} sentences, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {args.bf16}, {args.rounds} rounds")
    print("\n| step | ratio | median ms | peak MB |\n|---|---|---|---|")
    for name in rows:
        print(f"| {name} | {times[name] / base:.2f} | {times[name]:.0f} | {memory[name]:.0f} |")
    print("\nAdamW alone, of a fine-tuning step: " + ", ".join(f"{n} {t / base:.3f}" for n, t in adamw.items()))
    for args.tasks in (1, 2, 4, 8):
        told = [f"{peak_of(rows[name], draw(0)):.0f} MB {name}" for name in ("meta step, S = 5", "fine-tuning step")]
        print(f"peak, {args.tasks} tasks of {args.support} + {args.query}: {', '.join(told)}")
    sentences = [[sentence for task in draw(0) for sentence in task[k]] for k in (0, 1)]
    for count in (1, 2, 4, 8):  # args.tasks is 8 by now: the same sentences, as fewer and larger tasks
        tasks = [[part[i::count] for part in sentences] for i in range(count)]
        print(f"peak, these sentences as {count} tasks: {peak_of(rows['meta step, S = 5'], tasks):.0f} MB meta step, S = 5")
    print_padding(model, corpora, args)
    support, query = (statistics.median(column) for column in zip(*pieces[2:]))
    print_rates(model, args, {"fine-tuning": (query, 3 * query, base),
                              "meta step, S = 5": (support + query, support + 3 * query, times["meta step, S = 5"])})


def print_padding(model, corpora, args):
    """How many of the positions that the encoder sees are real, in a random batch as drawn and as packed."""
    lengths = [len(sentence.x) for corpus in corpora for sentence in corpus]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    for size in (16, 32, 256):
        real = padded = packed = 0
        for begin in range(0, min(len(order), 10_000) - size + 1, size):
            batch = [lengths[i] for i in order[begin : begin + size]]
            real += sum(batch)
            padded += max(batch) * size
            rows = model.pack(batch)
            packed += len(rows) * max(sum(batch[i] for i in row) for row in rows)
        print(f"real positions in batches of {size}: {real / padded:.1%} padded, {real / packed:.1%} packed")


def print_rates(model, args, work):
    """Word pieces a second, and the arithmetic of the encoder's layers as a share of the device's matrix rate."""
    size = 2048 if args.device == "cpu" else 8192
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    a = torch.randn(size, size, device=args.device, dtype=dtype)
    durations = []
    for _ in range(8):
        if args.device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        if args.device != "cpu":
            torch.cuda.synchronize()
        durations.append((time.perf_counter() - began) / 4)
    rate = 2 * size**3 / statistics.median(durations)
    weights = sum(m.weight.numel() for m in model.encoder.modules() if isinstance(m, nn.Linear))
    for name, (pieces, passes, milliseconds) in work.items():
        share = 2 * weights * passes / (milliseconds / 1e3) / rate
        print(f"{name}: {1e3 * pieces / milliseconds:,.0f} word pieces a second; its matrix products at {share:.0%} of "
              f"{rate / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
