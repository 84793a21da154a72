"""What a meta step costs, beside a step of plain fine-tuning and other ways to take the same meta step.

    python benchmarks/step.py --model demo/encoder --data demo/wikiann

All run in this process, in turn, round after round, on the same sentences; the table gives medians, and
ratios to the fine-tuning step on the query sentences. Before anything is timed, every way must give the same
meta-gradient. "Peak" is what a step needs beyond what stands before it (weights and AdamW's state). "Padded"
takes each set as one batch padded to its longest sentence, as everybody else does; all the rest encode packed
sentences as prime.py does. `higher` and `torchopt` (benchmarks/requirements.txt) are left out with a word if
they are not installed. `--model mbert-shape` is mBERT's shape with random weights and the demo's tokenizer.
"""

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
    """The tagger's loss as a module: the form in which `higher` takes a model."""

    def __init__(self, tagger):
        super().__init__()
        self.tagger = tagger

    def forward(self, sentences):
        return prime.tag_loss(self.tagger, sentences)


def higher_step(model, sets, tasks, inner_steps):
    """`higher`, first order. It moves all parameters, so those of θp get the rate zero. Adds to .grad."""
    import higher

    theta_p, theta_a, theta_h = sets
    names = [name for name, _ in model.named_parameters()]
    rest = [p for n, p in model.named_parameters() if n not in theta_a | theta_h]
    for support, query in tasks:
        moved = [*theta_a.values(), *theta_h.values()]
        inner = torch.optim.SGD([{"params": moved}, {"params": rest, "lr": 0.0}], lr=INNER_LR)
        with higher.innerloop_ctx(TagLoss(model), inner, track_higher_grads=False) as (copied, optimizer):
            for _ in range(inner_steps):
                optimizer.step(copied(support))
            at_theta_i = dict(zip(names, copied.parameters(), strict=True))
            outer = [at_theta_i[name] for name in (*theta_p, *theta_a)]
            add(sets, torch.autograd.grad(copied(query), outer))


def torchopt_step(model, sets, tasks, inner_steps):
    """`torchopt.MetaSGD` on adapter and head. Its graph, for the exact gradient, is cut after each step."""
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
    for parameter, gradient in zip([*sets[0].values(), *sets[1].values()], gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def ways_of_a_meta_step(model, optimizer, scheduler):
    """By name, what takes a batch of tasks and a number of inner steps."""
    theta_p, theta_a, theta_h = sets = model.sets()

    def ours(tasks, inner_steps, **options):
        steps = prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[tasks], loss=prime.tag_loss,
            optimizer=optimizer, scheduler=scheduler, inner_lr=INNER_LR, inner_steps=inner_steps, **options,
        )
        for _query_losses in steps:
            pass

    def library(step, tasks, inner_steps):
        optimizer.zero_grad()
        step(model, sets, tasks, inner_steps)
        optimizer.step()

    ways = {"meta step": functools.partial(ours, encode=model.encode_sets), "textbook meta step": ours,
            "meta step, second order": functools.partial(ours, encode=model.encode_sets, second_order=True)}
    for name, step in {"higher": higher_step, "torchopt": torchopt_step}.items():
        try:
            __import__(name)
            ways[name] = functools.partial(library, step)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return ways


def compare_meta_gradients(model, ways, tasks, tolerance):
    """All of first order must have that of the textbook, without the hoist."""
    theta_p, theta_a, _ = model.sets()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def meta_gradient(step):
        model.load_state_dict(before, strict=False)
        step(tasks, inner_steps=5)
        return torch.cat([p.grad.flatten().double() for p in (theta_p | theta_a).values()])

    expected = meta_gradient(ways["textbook meta step"])
    for name, step in ways.items():
        if "second order" not in name:
            error = ((meta_gradient(step) - expected).norm() / expected.norm()).item()
            if error > tolerance:
                sys.exit(f"{name}: the meta-gradient differs by {error:.1e} from the textbook's")
            print(f"same meta-gradient, {name}: relative difference {error:.1e}")


def rows_of_the_table(model, ways, fine_tuning_step, only):
    """By name, what takes a batch of tasks; all rows that begin as one of `only`, and the least."""
    def padded(step, tasks):
        """`step` with every sentence in a row of its own: one batch padded to its longest."""
        packing, model.first_position = model.first_position, None
        step(tasks)
        model.first_position = packing

    rows = {"fine-tuning step": fine_tuning_step,
            "fine-tuning step, padded": functools.partial(padded, fine_tuning_step)}
    counts = {"meta step": (1, 5, 20, 50), "textbook meta step": (5, 50)}
    for name, step in ways.items():
        for inner_steps in counts.get(name, (5,)):
            row = functools.partial(step, inner_steps=inner_steps)
            rows[f"{name}, S = {inner_steps}"] = row
            if inner_steps == 5 and "second order" not in name:
                rows[f"{name}, S = 5, padded"] = functools.partial(padded, row)
    least = ("fine-tuning step", "meta step, S")
    return {name: row for name, row in rows.items() if name.startswith((*least, *only))}


def milliseconds(step, *arguments):
    began = time.perf_counter()
    step(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def median_times(rows, batches, outer):
    """Of each row, in random order in each round, and of a step of AdamW in each of its forms."""
    forms = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    adamws = {name: torch.optim.AdamW(outer, lr=1e-9, **flags) for name, flags in forms.items()}
    times = {name: [] for name in (*rows, *adamws)}
    for tasks in tqdm(batches, disable=None):
        for name in random.sample([*rows], len(rows)):  # so that none always follows the same one
            times[name].append(milliseconds(rows[name], tasks))
        for name, optimizer in adamws.items():
            times[name].append(milliseconds(optimizer.step))
    medians = {name: statistics.median(each[2:]) for name, each in times.items()}  # two to warm up
    return {name: medians[name] for name in rows}, {name: medians[name] for name in adamws}


def peak(model, step, tasks):
    """The most memory that `step` holds beyond what is held before it, in MB: RSS on a CPU."""
    step(tasks)
    model.zero_grad()
    gc.collect()
    if model.head.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(tasks)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = high_water()
    step(tasks)
    return high_water() - before


def high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def print_peaks(model, rows, corpora, args):
    """How peak memory depends on the number of tasks, with more sentences and with the same ones."""
    for count in (1, 2, 4, 8):
        tasks = draw(corpora, args, tasks=count)
        meta, plain = (peak(model, rows[name], tasks) for name in ("meta step, S = 5", "fine-tuning step"))
        print(f"peak, {count} tasks of {args.support} + {args.query}: "
              f"{meta:.0f} MB meta step, S = 5, {plain:.0f} MB fine-tuning step")
    sentences = [[sentence for task in tasks for sentence in task[k]] for k in (0, 1)]
    for count in (1, 2, 4, 8):
        tasks = [[part[i::count] for part in sentences] for i in range(count)]
        megabytes = peak(model, rows["meta step, S = 5"], tasks)
        print(f"peak, these sentences as {count} tasks: {megabytes:.0f} MB meta step, S = 5")


def print_padding(model, corpora):
    """How many of the positions that the encoder sees are real, in a random batch as drawn and as packed."""
    class SeenError(Exception):
        """Ends a call of the encoder before it has begun."""

    def note(module, given):
        raise SeenError(given[0].numel())

    hook = model.encoder.register_forward_pre_hook(note)
    sentences = sum(corpora, [])
    random.Random(0).shuffle(sentences)
    for size in (16, 32, 256):
        real = padded = packed = 0
        for begin in range(0, min(len(sentences), 10_000) - size + 1, size):
            batch = sentences[begin : begin + size]
            real += sum(len(sentence.pieces) for sentence in batch)
            padded += max(len(sentence.pieces) for sentence in batch) * size
            try:
                model.encode(batch)
            except SeenError as seen:
                packed += seen.args[0]
        print(f"real positions in batches of {size}: {real / padded:.1%} padded, {real / packed:.1%} packed")
    hook.remove()


def print_rates(model, args, batches, times):
    """Word pieces a second, and the arithmetic of the encoder's layers beside the device's matrix rate."""
    support, query = (statistics.median(sum(len(sentence.pieces) for task in tasks for sentence in task[k])
                                        for tasks in batches) for k in (0, 1))
    size = 2048 if args.device == "cpu" else 8192
    a = torch.randn(size, size, device=args.device, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    rate = 2 * size**3 / (statistics.median(milliseconds(lambda: a @ a) for _ in range(8)) / 1e3)
    weights = sum(m.weight.numel() for m in model.encoder.modules() if isinstance(m, nn.Linear))
    for name, encoded_once in {"fine-tuning step": 0, "meta step, S = 5": support}.items():
        pieces, passes = encoded_once + query, encoded_once + 3 * query  # the backward pass costs two forward
        seconds = times[name] / 1e3
        share = 2 * weights * passes / seconds / rate
        print(f"{name}: {pieces / seconds:,.0f} word pieces a second; its matrix products at {share:.0%} of "
              f"{rate / 1e12:.2f} TFLOP/s")


def draw(corpora, args, step=0, tasks=None):
    """The batch of tasks of a meta step."""
    changed = {"tasks": tasks or args.tasks, "steps": step + 1, "method": "meta"}
    return next(prime.sample_batches(corpora, argparse.Namespace(**{**vars(args), **changed}), step))


def load(args):
    """The model, which packs, and the training sentences of each source language."""
    shaped = args.model == "mbert-shape"
    name = str(ROOT / "demo/encoder") if shaped else args.model
    encoder, tokenizer = adapters.load_encoder(name, args.max_length)
    if shaped:
        from transformers import BertConfig, BertModel

        encoder = BertModel(BertConfig(vocab_size=119_547))
    corpora = [prime.load(args, tokenizer, language, "train") for language in args.src]
    model = adapters.Tagger(encoder, 7).to(args.device).eval()
    model.choose_packing(sum(corpora, []))
    model.bf16 = args.bf16
    return model, corpora


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", default=str(ROOT / "demo/encoder"))
    flag("--data", default=str(ROOT / "demo/wikiann"))
    flag("--src", nargs="+", default=["en", "es"])
    flag("--tasks", type=int, default=2)
    flag("--support", type=int, default=16)
    flag("--query", type=int, default=16)
    flag("--rounds", type=int, default=15)
    flag("--limit-train", type=int, default=5000)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--bf16", action="store_true")
    flag("--only", nargs="+", default=[""], metavar="ROW", help="rows to add to the least: all that begin so")
    parser.set_defaults(seed=0, max_length=128, types=["PER", "ORG", "LOC"])
    args = parser.parse_args()

    torch.manual_seed(0)
    model, corpora = load(args)
    theta_p, theta_a, theta_h = model.sets()
    outer = [*theta_p.values(), *theta_a.values()]
    # hardly moves: every round measures the same model
    optimizer, scheduler = prime.adamw_with_linear_decay(outer, 1e-6, 10**9)
    tuning, _ = prime.adamw_with_linear_decay([*outer, *theta_h.values()], 1e-6, 10**9)

    def fine_tuning_step(tasks):
        tuning.zero_grad()
        prime.tag_loss(model, [sentence for _, query in tasks for sentence in query]).backward()
        tuning.step()

    ways = ways_of_a_meta_step(model, optimizer, scheduler)
    compare_meta_gradients(model, ways, draw(corpora, args), tolerance=5e-2 if args.bf16 else 1e-4)
    rows = rows_of_the_table(model, ways, fine_tuning_step, args.only)
    batches = [draw(corpora, args, step) for step in range(args.rounds + 2)]
    times, adamw_times = median_times(rows, batches, outer)

    base = times["fine-tuning step"]
    print(f"\n{args.model}, {args.tasks} tasks of {args.support} + {args.query} sentences, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {args.bf16}, "
          f"{args.rounds} rounds")
    print("\n| step | ratio | median ms | peak MB |\n|---|---|---|---|")
    for name, time_of_row in times.items():
        megabytes = peak(model, rows[name], batches[0])
        print(f"| {name} | {time_of_row / base:.2f} | {time_of_row:.0f} | {megabytes:.0f} |")
    shares = ", ".join(f"{name} {time_of_form / base:.3f}" for name, time_of_form in adamw_times.items())
    print(f"\nAdamW alone, of a fine-tuning step: {shares}")
    print_peaks(model, rows, corpora, args)
    print_padding(model, corpora)
    print_rates(model, args, batches[2:], times)


if __name__ == "__main__":
    main()
