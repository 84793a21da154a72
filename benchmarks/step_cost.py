"""Time and memory of a meta step, compared with fine-tuning and with other implementations of the same step.

    python benchmarks/step_cost.py --model ENCODER --data WIKIANN

All steps run in this process, on the same sentences, in a random order in each round. The table gives
medians, and ratios to the fine-tuning step on the query sentences. Before anything is timed, all
implementations must give the same meta-gradient. "Peak" is the memory that a step needs beyond what is in
use before it: weights and AdamW's state. "Padded" takes each set as one batch padded to its longest sentence,
as is usual; all other rows pack sentences, as prime.py does. `higher` and `torchopt` are left out if they are
not installed (benchmarks/requirements.txt). `--model mbert-shape` has mBERT's shape, random weights and the
demo's tokenizer.
"""

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
import report

INNER_LR = 0.03
TYPES = ["PER", "ORG", "LOC"]
WARM_UP = 2  # rounds that are not counted


class TagLoss(nn.Module):
    """The tagger's loss as a module, which is how `higher` takes a model."""

    def __init__(self, tagger):
        super().__init__()
        self.tagger = tagger

    def forward(self, sentences):
        return adapters.tag_loss(self.tagger, sentences)


def higher_step(model, sets, tasks, inner_steps):
    """The meta-gradient by `higher`, in first order. It updates all parameters, so θp gets the rate zero."""
    import higher

    names = [name for name, _ in model.named_parameters()]
    constant = [p for n, p in model.named_parameters() if n not in sets.a | sets.h]
    for support, query in tasks:
        groups = [{"params": [*sets.a.values(), *sets.h.values()]}, {"params": constant, "lr": 0.0}]
        sgd = torch.optim.SGD(groups, lr=INNER_LR)
        with higher.innerloop_ctx(TagLoss(model), sgd, track_higher_grads=False) as (copied, optimizer):
            for _ in range(inner_steps):
                optimizer.step(copied(support))
            theta_i = dict(zip(names, copied.parameters(), strict=True))
            outer_params = [theta_i[name] for name in (*sets.p, *sets.a)]
            add_grads(sets, torch.autograd.grad(copied(query), outer_params))


def torchopt_step(model, sets, tasks, inner_steps):
    """The meta-gradient by `torchopt.MetaSGD` on adapter and head. torchopt keeps the graph of the inner
    steps for the exact gradient; cutting it after each step gives the first-order one."""
    import torchopt

    adapted = nn.ModuleDict({"adapter": model.adapter, "head": model.head})
    for support, query in tasks:
        initial_state = torchopt.extract_state_dict(adapted, by="reference")
        optimizer = torchopt.MetaSGD(adapted, lr=INNER_LR)
        for _ in range(inner_steps):
            optimizer.step(adapters.tag_loss(model, support))
            torchopt.stop_gradient(adapted)
        theta_i_a = [operator.attrgetter(name)(model) for name in sets.a]  # tensors in place of parameters
        grads = torch.autograd.grad(adapters.tag_loss(model, query), [*sets.p.values(), *theta_i_a])
        torchopt.recover_state_dict(adapted, initial_state)
        add_grads(sets, grads)


def add_grads(sets, grads):
    for p, grad in zip([*sets.p.values(), *sets.a.values()], grads, strict=True):
        p.grad = grad if p.grad is None else p.grad + grad


def implementations(model, optimizer, scheduler):
    """Functions of a batch of tasks and a number of inner steps, by name, that run a meta step."""
    sets = model.split_parameters()

    def ours(tasks, inner_steps, **options):
        meta_training = prime.prime(
            model, theta_p=sets.p, theta_a=sets.a, theta_h=sets.h, batches=[tasks], loss=adapters.tag_loss,
            optimizer=optimizer, scheduler=scheduler, inner_lr=INNER_LR, inner_steps=inner_steps, **options)
        for _query_losses in meta_training:
            pass

    def library(add_meta_gradient, tasks, inner_steps):
        optimizer.zero_grad()
        add_meta_gradient(model, sets, tasks, inner_steps)
        optimizer.step()

    steps = {
        "meta step": functools.partial(ours, encode=model.encode_sets),
        "meta step without encode": ours,
        "meta step, second order": functools.partial(ours, encode=model.encode_sets, second_order=True)}
    for name, add_meta_gradient in {"higher": higher_step, "torchopt": torchopt_step}.items():
        try:
            __import__(name)
            steps[name] = functools.partial(library, add_meta_gradient)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return steps


def compare_meta_gradients(model, steps, tasks, tolerance):
    """Ends the script unless all first-order implementations give the meta-gradient of the plain one."""
    theta_p, theta_a, _ = model.split_parameters()
    initial_state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def meta_gradient(step):
        model.load_state_dict(initial_state, strict=False)
        step(tasks, inner_steps=5)
        return torch.cat([p.grad.flatten().double() for p in (theta_p | theta_a).values()])

    expected = meta_gradient(steps["meta step without encode"])
    for name, step in steps.items():
        if "second order" not in name:
            error = ((meta_gradient(step) - expected).norm() / expected.norm()).item()
            if error > tolerance:
                sys.exit(f"{name}: the meta-gradient differs by {error:.1e} from that without encode")
            print(f"same meta-gradient, {name}: relative difference {error:.1e}")


def table_rows(model, steps, fine_tuning_step, only):
    """The steps to time, functions of a batch of tasks by name. `only`: beginnings of the names to add to the
    fine-tuning step and the meta step."""
    def padded(step, tasks):
        model.packs = False  # a row per sentence
        step(tasks)
        model.packs = True

    rows = {"fine-tuning step": fine_tuning_step,
            "fine-tuning step, padded": functools.partial(padded, fine_tuning_step)}
    inner_steps_of = {"meta step": (1, 5, 20, 50), "meta step without encode": (5, 50)}
    for name, step in steps.items():
        for inner_steps in inner_steps_of.get(name, (5,)):
            row = functools.partial(step, inner_steps=inner_steps)
            rows[f"{name}, S = {inner_steps}"] = row
            if inner_steps == 5 and "second order" not in name:
                rows[f"{name}, S = 5, padded"] = functools.partial(padded, row)
    always = ("fine-tuning step", "meta step, S")
    return {name: row for name, row in rows.items() if name.startswith((*always, *only))}


def milliseconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def median_times(rows, batches, outer_params):
    """Milliseconds by row, and by implementation of AdamW for its step alone."""
    variants = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    adamws = {name: torch.optim.AdamW(outer_params, lr=1e-9, **flags) for name, flags in variants.items()}
    times = {name: [] for name in (*rows, *adamws)}
    for tasks in tqdm(batches, disable=None):
        for name in random.sample([*rows], len(rows)):  # no row always follows the same one
            times[name].append(milliseconds(rows[name], tasks))
        for name, optimizer in adamws.items():
            times[name].append(milliseconds(optimizer.step))
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    return {name: medians[name] for name in rows}, {name: medians[name] for name in adamws}


def peak_memory(model, step, tasks):
    """The most memory in MB that `step` uses beyond what is in use before it; on a CPU, resident memory."""
    step(tasks)
    model.zero_grad()
    gc.collect()
    if model.head.weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(tasks)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = high_water()
    step(tasks)
    return high_water() - before


def high_water():
    """The most resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def print_peaks(model, rows, corpora, support, query):
    """How peak memory depends on the number of tasks, with more sentences and with the same ones."""
    for count in (1, 2, 4, 8):
        tasks = sample_tasks(corpora, tasks=count, support=support, query=query)
        plain = peak_memory(model, rows["fine-tuning step"], tasks)
        meta = peak_memory(model, rows["meta step, S = 5"], tasks)
        print(f"peak, {count} tasks of {support} + {query}: {meta:.0f} MB meta step, S = 5, "
              f"{plain:.0f} MB fine-tuning step")
    supports, queries = ([sentence for part in sets for sentence in part] for sets in zip(*tasks))
    for count in (1, 2, 4, 8):
        tasks = [(supports[i::count], queries[i::count]) for i in range(count)]
        megabytes = peak_memory(model, rows["meta step, S = 5"], tasks)
        print(f"peak, the same sentences as {count} tasks: {megabytes:.0f} MB meta step, S = 5")


def print_padding(model, corpora):
    """The share of real positions in the encoder's input, for random batches, padded and packed."""
    sentences = sum(corpora, [])
    random.Random(0).shuffle(sentences)
    for size in (16, 32, 256):
        real = padded = packed = 0
        for first in range(0, min(len(sentences), 10_000) - size + 1, size):
            batch = sentences[first : first + size]
            lengths = [len(sentence.input_ids) for sentence in batch]
            real, padded = real + sum(lengths), padded + max(lengths) * size
            packed += model.encoder_inputs(batch)[0]["input_ids"].numel()
        print(f"real positions in batches of {size}: {real / padded:.1%} padded, {real / packed:.1%} packed")


def print_throughput(model, batches, times, device, bf16):
    """Word pieces per second, and the matrix products of the encoder relative to the device's rate."""
    support, query = (
        statistics.median(sum(len(s.input_ids) for task in tasks for s in task[part]) for tasks in batches)
        for part in (0, 1))
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    peak_rate = 2 * size**3 / (statistics.median(milliseconds(lambda: a @ a) for _ in range(8)) / 1e3)
    weights = sum(m.weight.numel() for m in model.encoder.modules() if isinstance(m, nn.Linear))
    for name, encoded_once in {"fine-tuning step": 0, "meta step, S = 5": support}.items():
        pieces, passes = encoded_once + query, encoded_once + 3 * query  # backward costs two forward passes
        seconds = times[name] / 1e3
        share = 2 * weights * passes / seconds / peak_rate
        print(f"{name}: {pieces / seconds:,.0f} word pieces per second; its matrix products run at "
              f"{share:.0%} of {peak_rate / 1e12:.2f} TFLOP/s")


def sample_tasks(corpora, *, tasks, support, query, step=0):
    """The batch of tasks of a meta step."""
    batches = prime.sample_batches(
        corpora, steps=step + 1, tasks=tasks, support=support, query=query, seed=0, start_step=step)
    return next(batches)


def load(name, data, *, languages, limit_train, device, bf16):
    """A model that packs, and the training sentences of each source language."""
    encoder, tokenizer = adapters.load_encoder(report.DEMO["model"] if name == "mbert-shape" else name, 128)
    if name == "mbert-shape":
        from transformers import BertConfig, BertModel

        encoder = BertModel(BertConfig(vocab_size=119_547))
    corpora = [
        adapters.load_sentences(
            data, language, "train", tokenizer, types=TYPES, max_length=128, limit=limit_train)
        for language in languages]
    model = adapters.build_tagger(
        encoder, types=TYPES, pe="adapter", bottleneck=64, device=device, bf16=bf16)
    return model, corpora


def make_optimizers(model):
    """Optimizer and scheduler of a meta step, and optimizer of a fine-tuning step. Their rate is so small
    that all rounds measure the same model."""
    theta_p, theta_a, theta_h = model.split_parameters()
    meta = prime.adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], 1e-6, 10**9)
    plain = prime.adamw_with_linear_decay([*(theta_p | theta_a | theta_h).values()], 1e-6, 10**9)
    return *meta, plain[0]


def fine_tune_once(model, optimizer, tasks):
    """A step of plain fine-tuning on the query sentences."""
    optimizer.zero_grad()
    adapters.tag_loss(model, [sentence for _, query in tasks for sentence in query]).backward()
    optimizer.step()


def main():
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    add("--tasks", type=int, default=2, help="tasks per meta step")
    add("--support", type=int, default=16, help="support sentences per task")
    add("--query", type=int, default=16, help="query sentences per task")
    add("--rounds", type=int, default=15, help=f"rounds to time, after {WARM_UP} to warm up")
    add("--limit-train", type=int, default=5000, help="only the first N sentences of each language")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--bf16", action="store_true", help="run the encoder in bfloat16, by autocast")
    add("--only", nargs="+", default=[""], metavar="ROW",
        help="beginnings of the rows to time besides fine-tuning and our meta step; default: all")
    args = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"tasks": args.tasks, "support": args.support, "query": args.query}
    model, corpora = load(
        args.model, args.data, languages=args.src, limit_train=args.limit_train, device=args.device,
        bf16=args.bf16)
    optimizer, scheduler, plain_optimizer = make_optimizers(model)
    steps = implementations(model, optimizer, scheduler)
    tolerance = 5e-2 if args.bf16 else 1e-4
    compare_meta_gradients(model, steps, sample_tasks(corpora, **sizes), tolerance)
    rows = table_rows(model, steps, functools.partial(fine_tune_once, model, plain_optimizer), args.only)
    batches = [sample_tasks(corpora, **sizes, step=step) for step in range(args.rounds + WARM_UP)]
    theta_p, theta_a, _ = model.split_parameters()
    times, adamw_times = median_times(rows, batches, [*theta_p.values(), *theta_a.values()])

    base = times["fine-tuning step"]
    print(f"\n{args.model}, {args.tasks} tasks of {args.support} + {args.query} sentences, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {args.bf16}, "
          f"{args.rounds} rounds\n")
    cells = [
        (name, f"{value / base:.2f}", f"{value:.0f}", f"{peak_memory(model, rows[name], batches[0]):.0f}")
        for name, value in times.items()]
    print(report.markdown(["step", "ratio", "median ms", "peak MB"], cells))
    shares = ", ".join(f"{name} {value / base:.3f}" for name, value in adamw_times.items())
    print(f"\nAdamW's step alone, relative to a fine-tuning step: {shares}")
    print_peaks(model, rows, corpora, args.support, args.query)
    print_padding(model, corpora)
    print_throughput(model, batches[WARM_UP:], times, args.device, args.bf16)


if __name__ == "__main__":
    adapters.cli(main)
