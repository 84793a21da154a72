"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (ACL 2023).

`python prime.py --src en es` does the paper's experiment and leaves θp* and θa* in `primed/`. To prime
your own model, copy this file and iterate over `prime`: it needs torch and nothing else.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import zlib
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Batch = Any  # whatever the loss takes
Loss = Callable[[Callable[..., Any], Batch], Tensor]  # L(f_θ, D)
Parameters = Mapping[str, nn.Parameter]  # a named part of `model.named_parameters()`


def prime(
    model: nn.Module, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    batches: Iterable[Iterable[tuple[Batch, Batch]]], loss: Loss,
    optimizer: Optimizer, schedule: LRScheduler, *,
    inner_lr: float = 0.03, inner_steps: int = 5, maml: bool = False, second_order: bool = False,
    hoist: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None,
) -> Iterator[list[float]]:
    """Algorithm 1 as a generator: each turn of the caller's loop is one meta step, which moves θ in
    place and gives the query losses of its tasks. A call that nobody iterates does nothing.

    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())`, all of which
        require gradients. A parameter in none of them is a constant.
    batches: each is a batch of tasks; a task is a support and a query set, of any form that `loss`
        takes. "Not converged" is the caller's to judge: the end of `batches`, or `break`.
    loss: L(f, D), a scalar. It calls `f(...)` where it would call `model(...)`.
    optimizer, schedule: the "− β ∇" of line 9; the optimizer holds θp and θa.
    inner_lr, inner_steps: α and S.
    maml: the paper's ablation, MAML proper: the inner loop moves the task's copy of θp too.
    second_order: the exact meta-gradient. Without it the gradients of line 6 are constants to line 9,
        whose gradient reaches θ as if dθi/dθ were the identity (§4.2). Fused attention has no second
        derivative and raises RuntimeError: take "eager".
    hoist: gives back the support, or the query, sets of all tasks with f(x; θp) in the place of x,
        for `loss` to accept. Exact where θa and θh come after all of θp, and θp's part has no
        dropout; inner steps are nearly free then. Not used with `maml`.

    Modes stay: call `model.eval()` before, unless dropout is wanted. `.grad` of θp and θa holds the
    last meta-gradient. In a process group all start from the same θ and each brings its own tasks;
    line 9 sums over all, and θ1_h is the first's. Raises ValueError as `check` says. Activations that
    your own code checkpoints, which it cannot see, would be recomputed with θ in the place of θi.
    """
    check(model, [theta_p, theta_a, theta_h], optimizer, inner_steps)
    outer = [*theta_p.values(), *theta_a.values()]
    inner = {**theta_a, **theta_h, **(theta_p if maml else {})}  # what line 6 moves; θp: the red line
    # 1: while not converged do
    for tasks in batches:  # 2: sample a batch of tasks T
        supports, queries = support_and_query_sets(tasks)
        if hoist and not maml:  # f(x; θp) once for all of lines 3 to 8, which do not move θp
            with torch.set_grad_enabled(second_order):
                supports = hoist(supports)
            queries = hoist(queries)
        query_losses, theta_1 = [], {}
        for support, query in zip(supports, queries, strict=True):  # 3: for all Ti in T do
            theta_i = {name: parameter.clone() for name, parameter in inner.items()}  # 4: θi = θ
            for _ in range(inner_steps):  # 5: for s = 1..S do
                gradient = gradient_of(loss(at(model, theta_i), support), theta_i, second_order)
                theta_i = {name: theta_i[name] - inner_lr * gradient[name] for name in theta_i}  # 6
            # 7: end for
            query_losses.append(loss(at(model, theta_i), query))  # for line 9
            theta_1 = theta_1 or theta_i  # the first task's
        # 8: end for
        optimizer.zero_grad()
        sum(query_losses).backward(inputs=outer)  # 9: ∇ of the sum over tasks
        if theta_p and all(parameter.grad is None for parameter in theta_p.values()):
            raise ValueError("no gradient reaches θp: does `hoist` detach the query sets' features?")
        theta_1_h = [theta_1[name].detach() for name in theta_h]
        all_losses = share_among_processes(query_losses, outer, theta_1_h)
        optimizer.step()  # 9: θa and θp
        schedule.step()
        for parameter, value in zip(theta_h.values(), theta_1_h):
            parameter.data.copy_(value)  # 9: θh = θ1_h
        torch.clear_autocast_cache()  # a caller's autocast would keep casts of the θp that was
        yield all_losses
    # 10: end while
    return theta_p, theta_a  # 11: they were moved in place


def at(model: nn.Module, theta: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The paper's f_θ: `model` with the parameters `theta` in the place of its own."""
    return lambda *args, **kwargs: functional_call(model, theta, args, kwargs)


def gradient_of(loss: Tensor, theta: Mapping[str, Tensor], second_order: bool) -> dict[str, Tensor]:
    """∇_θ of the loss, by name; zero where the loss does not depend on a part of θ."""
    found = torch.autograd.grad(loss, [*theta.values()], create_graph=second_order, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError("no gradient reaches θi: the loss must call f(...), and not model(...)")
    return {n: torch.zeros_like(loss) if g is None else g for n, g in zip(theta, found)}


def share_among_processes(losses, outer, theta_1_h):
    """In a process group: sums the meta-gradients, spreads the first's θ1_h. All query losses."""
    mine = [loss.item() for loss in losses]
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    for parameter in outer:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
    for tensor in theta_1_h:
        distributed.broadcast(tensor, 0)
    everyones = [mine] * distributed.get_world_size()
    distributed.all_gather_object(everyones, mine)
    return sum(everyones, [])


def support_and_query_sets(tasks: Iterable[tuple[Batch, Batch]]) -> Iterable[Sequence[Batch]]:
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, (tuple, list)) and len(task) == 2 for task in tasks):
        raise ValueError("a batch of tasks is a list of pairs (support set, query set), not empty")
    return zip(*tasks)


def check(model: nn.Module, sets: Sequence[Parameters], optimizer: Optimizer, inner_steps: int) -> None:
    """Raises ValueError, with the name and the mend, for what would go wrong in silence."""
    own = dict(model.named_parameters(remove_duplicate=False))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    seen = set()
    for theta in sets:
        for name, parameter in theta.items():
            if own.get(name) is not parameter:
                raise ValueError(f"{name} is not the model's own: take θ from it as it is now")
            if id(parameter) in seen:
                raise ValueError(f"{name} is in θ twice: θp, θa and θh are disjoint")
            if not parameter.requires_grad:
                raise ValueError(f"{name} requires no gradient: call requires_grad_() on all of θ")
            if held.count(id(parameter)) != (theta is not sets[2]):
                raise ValueError(f"{name}: the optimizer must hold θp and θa, each once, and not θh")
            seen.add(id(parameter))
    if inner_steps and not sets[2]:
        raise ValueError("θh is empty: name the head, which the inner loop moves with θa")
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "CheckpointWrapper"
        if wrapped or getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{name}: checkpointing recomputes with θ for θi: turn it off")


def adamw(parameters: Iterable[nn.Parameter], lr: float, steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW (Loshchilov and Hutter 2019); its rate falls linearly from `lr` to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))


class BadInput(Exception):
    """What was wrong, where, and what to do, in one line."""


@contextmanager
def blaming(source: Any) -> Iterator[None]:
    """Whatever is raised inside becomes a BadInput that names `source`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise BadInput(f"{source}: {type(error).__name__}: {told}") from error


def tag_names(types: Sequence[str]) -> list[str]:
    return ["O"] + [f"{position}-{name}" for name in types for position in "BI"]


def read_split(data: str, language: str, split: str, types: Sequence[str]) -> list[tuple[list, list]]:
    """The sentences of a split as words and numbers of tags. `data` is a hub name or a folder with, for
    each language, `train.txt` with the word first and the tag last in a line, the original archives'
    `train` with `language:` before each word, or parquet files. Raises BadInput with the place."""
    folder, tags, prefix, required = Path(data) / language, tag_names(types), f"{language}:", ""
    text, archive = folder / f"{split}.txt", folder / {"validation": "dev"}.get(split, split)
    if text.is_file():
        tokens = read_text(text)
    elif archive.is_file():
        tokens, required = read_text(archive), prefix
    else:
        tokens = read_table(data, language, split)
    rows = [([], [])]
    for place, word, tag in tokens:
        if word == tag == "" or word == "-DOCSTART-":
            rows.append(([], []))
        elif word and word.startswith(required) and tag in tags:
            rows[-1][0].append(word)
            rows[-1][1].append(tags.index(tag))
        else:
            wanted = f"{required}word and tag; --types gives the tags {' '.join(tags)}"
            raise BadInput(f"{place}: {str(word)[:80]!r} {str(tag)[:80]!r} is not {wanted}")
    rows = [row for row in rows if row[0]]
    if not rows:
        raise BadInput(f"{folder}: the {split} split is empty")
    if all(word.startswith(prefix) for words, _ in rows for word in words):
        rows = [([word.removeprefix(prefix) for word in words], numbers) for words, numbers in rows]
    return rows


def read_text(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, first and last column, parted by tabs or blanks; both are empty between sentences."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        with blaming(f"{path}:{number}"):
            text = line.decode().rstrip(" \t\r")
        word, *others = text.split("\t" if "\t" in text else " ")
        yield f"{path}:{number}", word, others[-1] if others else ""


def read_table(data: str, language: str, split: str) -> Iterator[tuple[str, Any, Any]]:
    """The same of the hub's tables; a number that no ClassLabel names stays a number."""
    import datasets

    folder = Path(data) / language
    if files := [*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")]:
        table = datasets.Dataset.from_parquet(sorted(map(str, files)))
    elif Path(data).is_dir():
        found = " ".join(sorted(path.name for path in Path(data).iterdir() if path.is_dir()))
        raise BadInput(f"{folder}: no {split} split there; the languages of {data} are: {found}")
    else:
        table = datasets.load_dataset(data, language, split=split)
    if not {"tokens", "ner_tags"} <= {*table.column_names}:
        raise BadInput(f"needed are columns tokens and ner_tags; there are {table.column_names}")
    names = dict(enumerate(getattr(table.features["ner_tags"].feature, "names", [])))
    for number, (words, tags) in enumerate(zip(table["tokens"], table["ner_tags"]), start=1):
        place = f"{folder}, row {number} of {split}"
        with blaming(place):
            yield from [(place, word, names.get(tag, tag)) for word, tag in zip(words, tags, strict=True)]
        yield place, "", ""


def load(args, tokenizer, language: str, split: str, least: int = 1) -> list[Any]:
    """The sentences of a split in word pieces; for training, those that have one."""
    from adapters import tokenize

    limit = args.limit_train if split == "train" else args.limit_test
    with blaming(f"--data {args.data} (offline: a folder), {language} {split}"):
        rows = read_split(args.data, language, split, args.types)[:limit]
        sentences = tokenize(rows, tokenizer, args.max_length)
        if split == "train":
            sentences = [sentence for sentence in sentences if max(sentence.first) >= 0]
        if len(sentences) < least:
            raise ValueError(f"{len(sentences)} sentences with a word piece, needed are {least}")
    return sentences


def sample_batches(corpora, args, begin=0, rank=0, processes=1):
    """This process's tasks of each step: disjoint random sentences of the languages in turn, the same
    for all methods. FT priming takes both sets as the query set. Dropout is seeded for the step."""
    for step in range(begin, args.steps):
        chance = random.Random(f"{args.seed} {step}")
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
        support = 0 if args.method == "ft" else args.support
        tasks = []
        for number in range(step * args.tasks, (step + 1) * args.tasks):
            drawn = chance.sample(corpora[number % len(corpora)], args.support + args.query)
            tasks.append((drawn[:support], drawn[support:]))
        yield tasks[len(tasks) * rank // processes : len(tasks) * (rank + 1) // processes]


def tag_loss(f: Callable[..., Tensor], sentences: Batch) -> Tensor:
    """L_Ti: the mean cross-entropy over the words that have a piece."""
    scores = f(sentences)
    tags = [tag for s in sentences for first, tag in zip(s.first, s.tags) if first >= 0]
    return nn.functional.cross_entropy(scores, torch.tensor(tags, device=scores.device))


CHECKPOINT, COMPLETE = "checkpoint.pt", "priming.json"  # the second is written last
NOT_IN_IDENTITY = {  # of a run: places, whose contents are in it, and what has no say in the result
    "model", "data", "init", "load", "output", "results", "save", "save_every", "device", "tgt", "seeds",
    "versions",
}


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    flag("--method", choices=["meta", "maml", "ft"], default="meta", help="rows 4, 6, 5 of Table 1")
    flag("--inner-steps", type=int, default=5, help="S; paper: 5, in row 7: 1")
    flag("--inner-lr", type=float, default=0.03, help="α of SGD; paper: 0.03")
    flag("--outer-lr", type=float, default=5e-5, help="β of AdamW, falling to 0; paper: 5e-5")
    flag("--steps", type=int, default=1000, help="meta steps; paper: not said")
    flag("--tasks", type=int, default=2, help="tasks in a batch; paper: not said")
    flag("--support", type=int, default=16, help="sentences of a task; paper: not said")
    flag("--query", type=int, default=16, help="sentences of a task; paper: not said")
    flag("--second-order", action="store_true", help="the exact meta-gradient; paper: first-order")
    flag("--seed", type=int, default=0, help="of initialisation and sampling")
    flag("--save-every", type=int, default=100, metavar="N", help="meta steps between checkpoints")
    flag("--output", type=Path, default=Path("primed"), help="folder for θp* and θa*")
    return parse(parser)


def main() -> None:
    args = parse_arguments()
    from tqdm import tqdm

    from adapters import load_encoder

    rank, processes = join_processes(args)
    torch.manual_seed(args.seed)
    with blaming(f"--model {args.model} (offline: a folder), --max-length {args.max_length}"):
        encoder, tokenizer = load_encoder(args.model, args.max_length)
    least = args.support + args.query
    corpora = [load(args, tokenizer, language, "train", least) for language in args.src]
    identity = identify(args, encoder.parameters(), corpora)
    model = build(args, args.pe, encoder, sum(corpora, []))
    tell_scale(args.inner_lr, model, corpora[0][:100])
    if args.second_order and (args.method == "maml" or not model.on_top):
        encoder.set_attn_implementation("eager")  # fused kernels have no second derivative
    (theta_p, theta_a, theta_h), inner_steps = model.sets(), args.inner_steps
    if args.method == "ft":  # §5.2: without inner steps a meta step is plain fine-tuning
        theta_p, theta_h, inner_steps = {**theta_p, **theta_h}, {}, 0
        model.train()  # dropout is for plain fine-tuning; Algorithm 1 takes f as a fixed function
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, schedule = adamw(outer, args.outer_lr, args.steps)
    parts, stopped = (model, optimizer, schedule), []
    losses = continued(args, identity, *parts)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    batches = sample_batches(corpora, args, len(losses), rank, processes)
    steps = prime(
        model, theta_p, theta_a, theta_h, batches, tag_loss, optimizer, schedule, inner_lr=args.inner_lr,
        inner_steps=inner_steps, maml=args.method == "maml", second_order=args.second_order,
        hoist=model.hoist if model.on_top else None,  # else f changes with θi
    )
    bar = tqdm(steps, f"priming ({args.method})", args.steps, initial=len(losses), disable=rank or None)
    for step, query_losses in enumerate(bar, start=len(losses) + 1):
        losses.append(sum(query_losses))
        norm = nn.utils.get_total_norm([p.grad for p in outer if p.grad is not None])
        if not math.isfinite(losses[-1] + norm):
            told = f"query losses {query_losses} ({args.src} in turn), norm of the meta-gradient {norm:.3g}"
            raise BadInput(f"step {step}: {told}; lower --inner-lr or --outer-lr")
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if rank == 0 and (stopped or step % args.save_every == 0 or step == args.steps):
            with replacing(args.output / CHECKPOINT) as new:
                torch.save((identity, losses, [part.state_dict() for part in parts]), new)
            if stopped:
                raise BadInput(f"stopped after step {step}; the same command goes on")
    if rank == 0:
        save(args, identity, losses, model, tokenizer)


def build(args, pe, encoder, sentences):
    """The model; it packs sentences where that is exact."""
    from adapters import Tagger

    with blaming(f"--pe {pe} (lora: pip install peft), --device {args.device}"):
        model = Tagger(encoder, len(tag_names(args.types)), pe, args.bottleneck, args.bf16)
        model.to(args.device).eval()
        if sentences:
            model.choose_packing(sentences)
    return model


@torch.no_grad()
def tell_scale(inner_lr, model, sentences):
    """A step on the head changes its scores by about α‖f(x)‖²: so α is carried to other encoders."""
    features = torch.cat([sentence.features for sentence in model.encode(sentences)])
    square = features.square().sum(-1).mean()
    print(f"α‖f(x)‖² = {inner_lr} · {square:.1f} = {inner_lr * square:.2f}")


def continued(args, identity, *parts):
    """The losses of the unfinished run in --output, whose state `parts` take; none if it is new."""
    import fcntl

    output, found, losses, states = args.output, identity, [], []
    with blaming(f"--output {output} (does another command write there?)"):
        output.mkdir(parents=True, exist_ok=True)
        if not distributed.is_initialized() or distributed.get_rank() == 0:  # till it ends
            fcntl.flock(os.open(output, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (output / COMPLETE).exists():
            found = json.loads((output / COMPLETE).read_text())["run"]
        elif (output / CHECKPOINT).exists():
            found, losses, states = torch.load(output / CHECKPOINT, args.device, weights_only=True)
        elif {*output.iterdir()} - {output / f"{CHECKPOINT}.new"}:
            found = "not ours"
        if found != identity:
            raise BadInput(f"{output} is of other settings, data or weights, or not ours; name another")
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    if (output / COMPLETE).exists():
        (output / CHECKPOINT).unlink(missing_ok=True)
        print(f"{output} is complete")
        sys.exit()
    return losses


def save(args, identity, losses, model, tokenizer):
    """θp* as `AutoModel` reads it, θa* beside it, and last what tells that all is there."""
    from safetensors.torch import save_file

    with blaming(f"writing {args.output}"):
        model.save_encoder(args.output)
        tokenizer.save_pretrained(args.output)
        save_file(model.sets()[1], args.output / "adapter.safetensors")
    record = {**vars(args), "run": identity, "last_losses": losses[-10:]}
    with replacing(args.output / COMPLETE) as new:
        new.write_text(json.dumps(record, indent=2, default=str))
    (args.output / CHECKPOINT).unlink()
    print(f"{args.output}: {args.steps} meta steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under: what is there takes the place of `path` once it is whole."""
    new = path.with_name(f"{path.name}.new")
    with blaming(f"writing {path}"):
        yield new
        new.replace(path)


def join_processes(args):
    """Under torchrun: the number of this process, and of how many. The first one speaks."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    distributed.init_process_group()
    if args.device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w")
    if args.tasks < distributed.get_world_size():
        raise BadInput(f"--tasks {args.tasks}: fewer than processes")
    return distributed.get_rank(), distributed.get_world_size()


def identify(args, weights, sentences):
    """A checksum of all that decides a result: settings, weights and data."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_IN_IDENTITY}
    return f"{zlib.crc32(repr([settings, checksum(weights), sentences]).encode()):08x}"


def checksum(weights: Iterable[Tensor]) -> int:
    return zlib.crc32(repr([zlib.crc32(tensor.detach().cpu().numpy()) for tensor in weights]).encode())


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that prime.py and finetune.py share."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=with_defaults)
    parser.print_usage = lambda file=None: None  # a wrong flag too ends with one line
    pinned = ("torch", "transformers", "datasets", "seqeval")
    parser.set_defaults(versions={name: metadata.version(name) for name in pinned})
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased", help="on the hub or in a folder")
    flag("--data", default="unimelb-nlp/wikiann", help="on the hub or in a folder")
    flag("--types", nargs="+", default=["PER", "ORG", "LOC"], help="of entities")
    flag("--pe", choices=["adapter", "houlsby", "bitfit", "lora"], default="adapter", help="what θa is")
    flag("--bottleneck", type=int, default=64, help="of an adapter, paper: 64; the rank of LoRA")
    flag("--max-length", type=int, default=128, help="word pieces of a sentence")
    flag("--limit-train", type=int, metavar="N", help="first N sentences of each training split")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--bf16", action="store_true", help="run the encoder under autocast to bfloat16")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, if all numbers are positive and finite; some may be zero."""
    args = parser.parse_args()
    for name, value in vars(args).items():
        may_be_zero = name in ("inner_steps", "seed", "seeds", "min_steps")
        for x in value if type(value) is list else [value]:
            if type(x) in (int, float) and not (0 < x < 2**63 or may_be_zero and x == 0):
                parser.error(f"argument --{name.replace('_', '-')}: {x} is out of range")
    return args


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # some terminals know no θ
        main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
