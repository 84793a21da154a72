"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (ACL 2023).

`python prime.py --src en es` does the paper's experiment and leaves θp* and θa* in `primed/`. To prime
your own model, copy this file and iterate over `prime`: it needs torch and nothing else."""

import argparse
import json
import math
import os
import random
import sys
import zlib
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Batch = Any  # whatever the loss takes
Loss = Callable[[Callable[..., Any], Batch], Tensor]  # L(f_θ, D)
Parameters = Mapping[str, nn.Parameter]  # a named part of `model.named_parameters()`


def prime(
    model: nn.Module, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    batches: Iterable[Iterable[tuple[Batch, Batch]]], loss: Loss,
    optimizer: torch.optim.Optimizer, schedule: LRScheduler, *,
    inner_lr: float = 0.03, inner_steps: int = 5, maml: bool = False, second_order: bool = False,
    hoist: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None,
) -> Iterator[list[float]]:
    """Algorithm 1 as a generator: each turn of the caller's loop is one meta step, which moves θ in
    place and gives the query losses of its tasks. A call that nobody iterates does nothing.

    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())` that require gradients
        (theta_p is §3.1's θp without θa). A parameter in none of them is a constant.
    batches: each is a list of tasks; a task is a pair of support and query set, in any form that
        `loss` takes. They end, or the caller breaks the loop, when θ has "converged".
    loss: L_Ti(f, D), a scalar, one function for all tasks. It calls `f(...)`, never `model(...)`.
    optimizer, schedule: the "− β ∇" of line 9; the optimizer holds θp and θa.
    inner_lr, inner_steps: α and S. maml: the red line, which moves θi_p too (the paper's ablation).
    second_order: the exact meta-gradient; else line 4's `clone` alone ties θi to θ: dθi/dθ = 1 (§4.2).
        Unless hoisted, f then needs attn_implementation="eager": fused attention raises RuntimeError.
    hoist: gives back the support, or the query, sets of all tasks with f(x; θp) in the place of x.
        Exact where θa and θh come after all of θp, without dropout there. Not used with `maml`.

    Call `model.eval()` before, unless `inner_steps` is 0. Raises ValueError as `check` says; that does
    not see checkpointing in your own code, which would recompute activations with θ and not θi.
    """
    check(model, [theta_p, theta_a, theta_h], optimizer, inner_steps)
    outer = [*theta_p.values(), *theta_a.values()]
    inner = {**theta_a, **theta_h, **(theta_p if maml else {})}  # line 6's; θp: the red line
    # 1: while not converged do
    for tasks in batches:  # 2: sample a batch of tasks T
        supports, queries = support_and_query_sets(tasks)
        if hoist and not maml:  # f(x; θp) once for all of lines 3 to 8, which do not move θp
            queries = hoist(queries)  # first: older autocasts reuse casts of no_grad
            with torch.set_grad_enabled(second_order):
                supports = hoist(supports)
        query_losses, theta_1 = [], {}
        for support, query in zip(supports, queries, strict=True):  # 3: for all Ti in T do
            theta_i = {n: p.clone() for n, p in inner.items()}  # 4: θi = θ
            for _ in range(inner_steps):  # 5: for s = 1..S do
                gradient = gradient_of(loss(at(model, theta_i), support), theta_i, second_order)
                theta_i = {n: theta_i[n] - inner_lr * gradient[n] for n in theta_i}  # 6
            # 7: end for
            query_losses.append(loss(at(model, theta_i), query))  # 9's L_Ti
            theta_1 = theta_1 or theta_i  # 9's θ1
        # 8: end for
        optimizer.zero_grad()
        sum(query_losses).backward(inputs=outer)  # 9: ∇ of the sum over tasks
        if any(t and all(p.grad is None for p in t.values()) for t in (theta_p, theta_a)):
            raise ValueError("no gradient reaches θp or θa: does `hoist` detach the queries?")
        optimizer.step()  # 9: θa and θp
        schedule.step()
        for name, parameter in theta_h.items():
            parameter.data.copy_(theta_1[name])  # 9: θh = θ1_h
        torch.clear_autocast_cache()  # or a caller's autocast would reuse the old θp
        yield [query_loss.item() for query_loss in query_losses]
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


def support_and_query_sets(tasks: Iterable[tuple[Batch, Batch]]) -> Iterable[Sequence[Batch]]:
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, (tuple, list)) and len(task) == 2 for task in tasks):
        raise ValueError("a batch of tasks is a list of pairs (support, query), not empty")
    return zip(*tasks)


def check(model: nn.Module, sets: Sequence[Parameters], optimizer: Any, inner_steps: int):
    """Raises ValueError, with the name and the remedy, for what would go wrong in silence."""
    own = dict(model.named_parameters(remove_duplicate=False))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    in_theta = [id(p) for theta in sets for p in theta.values()]
    for theta in sets:
        for name, p in theta.items():
            if own.get(name) is not p:
                raise ValueError(f"{name} is not the model's own: take θ from it as it is now")
            if in_theta.count(id(p)) > 1:
                raise ValueError(f"{name} is in θ twice: θp, θa and θh are disjoint")
            if not p.requires_grad:
                raise ValueError(f"{name} requires no gradient: call requires_grad_() first")
            if held.count(id(p)) != (theta is not sets[2]):
                raise ValueError(f"{name}: the optimizer must hold θp, θa once, not θh")
    if inner_steps and not sets[2]:
        raise ValueError("θh is empty: name the head, which line 6 moves")
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "CheckpointWrapper"  # torch's
        if wrapped or getattr(module, "gradient_checkpointing", False):
            raise ValueError(f"{name}: checkpointing recomputes with θ for θi: turn it off")


def adamw(parameters: Iterable[Tensor], lr: float, steps: int) -> tuple[Any, LRScheduler]:
    """AdamW (Loshchilov and Hutter 2019), weight decay 0.01 (paper: not said); its rate falls to zero."""
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
        raise BadInput(" ".join(f"{source}: {type(error).__name__}: {error}".split())[:500]) from error


def tag_names(types: Sequence[str]) -> list[str]:
    return ["O"] + [f"{position}-{name}" for name in types for position in "BI"]


def read_split(data: str, language: str, split: str, types: Sequence[str]) -> list[tuple[list, list]]:
    """The sentences of a split: words and tag numbers. `data` is a hub name, or a folder with one for each
    language that has `train.txt` (word first, tag last in a line), the archives' `train` (`language:`
    before each word), or parquet files. Raises BadInput with the place."""
    folder, tags, prefix = Path(data) / language, tag_names(types), f"{language}:"
    text, archive = folder / f"{split}.txt", folder / {"validation": "dev"}.get(split, split)
    tokens = [*read_tokens(text if text.is_file() else archive, data, language, split)]
    required = prefix if archive.is_file() and not text.is_file() else ""
    prefixed = all(word.startswith(prefix) for _, word, _ in tokens if word)
    rows = [([], [])]
    for place, word, tag in tokens:
        if word == tag == "":
            rows.append(([], []))
        elif word and word.startswith(required) and tag in tags:
            rows[-1][0].append(word.removeprefix(prefix if prefixed else ""))
            rows[-1][1].append(tags.index(tag))
        else:
            wanted = f"{required}word and tag, of {' '.join(tags)} (--types)"
            raise BadInput(f"{place}: {str(word)[:80]!r} {str(tag)[:80]!r} is not {wanted}")
    if rows := [row for row in rows if row[0]]:
        return rows
    raise BadInput(f"{folder}: the {split} split is empty")


def read_tokens(file: Path, data: str, language: str, split: str) -> Iterator[tuple[str, Any, Any]]:
    """Place, word and tag of a file, or of parquet or hub tables; both are empty between sentences.
    The columns of a file are parted by tabs or blanks; a number that no ClassLabel names stays one."""
    if file.is_file():
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, start=1):
            with blaming(f"{file}:{number}"):
                text = line.decode().rstrip(" \t\r")
            word, *others = text.split("\t" if "\t" in text else " ")
            if word == "-DOCSTART-":
                word, others = "", []
            yield f"{file}:{number}", word, others[-1] if others else ""
        return
    import datasets

    folder = Path(data) / language
    if files := [*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")]:
        table = datasets.Dataset.from_parquet(sorted(map(str, files)))
    elif Path(data).is_dir():
        raise BadInput(f"{folder}: no {split} split; there are {sorted(os.listdir(data))}")
    else:
        table = datasets.load_dataset(data, language, split=split)
    names = dict(enumerate(getattr(table.features["ner_tags"].feature, "names", [])))
    for number, (words, tags) in enumerate(zip(table["tokens"], table["ner_tags"]), start=1):
        place = f"{folder}, row {number} of {split}"
        with blaming(place):
            for word, tag in zip(words, tags, strict=True):
                yield place, word, names.get(tag, tag)
        yield place, "", ""


def load(args, tokenizer, language: str, split: str, least: int = 1) -> list[Any]:
    """The sentences of a split in word pieces; for training, only those that have a piece."""
    from adapters import tokenize

    limit = args.limit_train if split == "train" else args.limit_test
    with blaming(f"--data {args.data} (offline: a folder), {language} {split}"):
        rows = read_split(args.data, language, split, args.types)[:limit]
        sentences = tokenize(rows, tokenizer, args.max_length)
        if split == "train":
            sentences = [sentence for sentence in sentences if max(sentence.first) >= 0]
        if len(sentences) < least:
            raise ValueError(f"{len(sentences)} sentences with a word piece, {least} needed")
    return sentences


def sample_batches(corpora, args, begin=0):
    """The tasks of each step: disjoint random sentences of the languages in turn, the same for all
    methods. FT priming takes both sets as the query set. Dropout is seeded for the step."""
    for step in range(begin, args.steps):
        chance = random.Random(f"{args.seed} {step}")
        tasks, support = [], 0 if args.method == "ft" else args.support
        for number in range(step * args.tasks, (step + 1) * args.tasks):
            drawn = chance.sample(corpora[number % len(corpora)], args.support + args.query)
            tasks.append((drawn[:support], drawn[support:]))
        torch.manual_seed(chance.getrandbits(63))
        yield tasks


def tag_loss(f: Callable[..., Tensor], sentences: Batch) -> Tensor:
    """L_Ti: the mean cross-entropy over the words that have a piece."""
    scores = f(sentences)
    tags = [tag for s in sentences for first, tag in zip(s.first, s.tags) if first >= 0]
    return nn.functional.cross_entropy(scores, torch.tensor(tags, device=scores.device))


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    flag("--method", choices=["meta", "maml", "ft"], default="meta", help="rows 4, 6, 5 (S = 0)")
    flag("--inner-steps", type=int, default=5, help="S; paper: 5, in row 7: 1")
    flag("--inner-lr", type=float, default=0.03, help="α of SGD; paper: 0.03")
    flag("--outer-lr", type=float, default=5e-5, help="β of AdamW, falling to 0; paper: 5e-5")
    flag("--steps", type=int, default=1000, help="meta steps; paper: not said")
    flag("--tasks", type=int, default=2, help="of a batch; paper: not said")
    flag("--support", type=int, default=16, help="sentences of a task; paper: not said")
    flag("--query", type=int, default=16, help="sentences of a task; paper: not said")
    flag("--second-order", action="store_true", help="exact meta-gradient; paper: first-order")
    flag("--seed", type=int, default=0, help="of initialisation and sampling")
    flag("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints")
    flag("--output", type=Path, default=Path("primed"), help="folder for θp* and θa*")
    return parse(parser)


def main() -> None:
    args = parse_arguments()
    from tqdm import tqdm

    from adapters import load_encoder

    torch.manual_seed(args.seed)
    with blaming(f"--model {args.model} (offline: a folder), --max-length {args.max_length}"):
        encoder, tokenizer = load_encoder(args.model, args.max_length)
    corpora = [load(args, tokenizer, src, "train", args.support + args.query) for src in args.src]
    identity = identify(args, encoder.parameters(), corpora)
    model = build(args, args.pe, encoder, sum(corpora, []))
    with torch.no_grad():  # a head step changes scores by about that
        features = torch.cat([s.features for s in model.encode(corpora[0][:100])])
        square = features.square().sum(-1).mean()
    print(f"α‖f(x)‖² = {args.inner_lr} · {square:.1f} = {args.inner_lr * square:.2f}")
    if args.second_order and (args.method == "maml" or args.pe != "adapter"):
        encoder.set_attn_implementation("eager")  # fused: no second derivative
    (theta_p, theta_a, theta_h), inner_steps = model.sets(), args.inner_steps
    if args.method == "ft":  # §5.2: no inner steps; AdamW moves θh too
        theta_p, theta_h, inner_steps = {**theta_p, **theta_h}, {}, 0
        model.train()  # dropout is for plain fine-tuning
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, schedule = adamw(outer, args.outer_lr, args.steps)
    parts = (model, optimizer, schedule)
    losses = continued(args, identity, *parts)
    steps = prime(
        model, theta_p, theta_a, theta_h, sample_batches(corpora, args, len(losses)), tag_loss,
        optimizer, schedule, inner_lr=args.inner_lr, inner_steps=inner_steps,
        maml=args.method == "maml", second_order=args.second_order,
        hoist=model.hoist if args.pe == "adapter" else None,  # bitfit: θa is in f
    )
    bar = tqdm(steps, f"priming ({args.method})", args.steps, initial=len(losses), disable=None)
    for step, query_losses in enumerate(bar, start=len(losses) + 1):
        losses.append(sum(query_losses))
        norm = nn.utils.get_total_norm([p.grad for p in outer if p.grad is not None])
        if not math.isfinite(losses[-1] + norm):
            told = f"losses {query_losses} of {args.src} in turn, gradient {norm:.3g}"
            raise BadInput(f"step {step}: {told}; lower --inner-lr, --outer-lr")
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if step % args.save_every == 0 or step == args.steps:
            with replacing(args.output / "checkpoint.pt") as new:
                torch.save((identity, losses, [part.state_dict() for part in parts]), new)
    save(args, identity, losses, model, tokenizer)


def build(args, pe, encoder, sentences):
    """The model; sentences share rows of its encoder's input (`Tagger.encode`) where that is exact."""
    from adapters import Tagger

    with blaming(f"--pe {pe}, --device {args.device}"):
        model = Tagger(encoder, len(tag_names(args.types)), pe, args.bottleneck)
        model.to(args.device).eval()
        if sentences:
            model.choose_packing(sentences)
        model.bf16 = args.bf16
    return model


def continued(args, identity, *parts):
    """The losses of the unfinished run in --output, loaded into `parts`; exits if it is complete."""
    import fcntl

    checkpoint, complete = args.output / "checkpoint.pt", args.output / "priming.json"
    found, losses, states = identity, [], ()
    with blaming(f"--output {args.output} (does another command write there?)"):
        args.output.mkdir(parents=True, exist_ok=True)
        fcntl.flock(os.open(args.output, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # till the end
        if complete.exists():
            found = json.loads(complete.read_text())["run"]
        elif checkpoint.exists():
            found, losses, states = torch.load(checkpoint, args.device, weights_only=True)
        elif {*os.listdir(args.output)} - {"checkpoint.pt.new"}:
            found = "not ours"
        if found != identity:
            raise BadInput(f"{args.output} is another run's or not ours; name another")
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    if complete.exists():
        checkpoint.unlink(missing_ok=True)
        print(f"{args.output} is complete")
        sys.exit()
    return losses


def save(args, identity, losses, model, tokenizer):
    """θp* as `AutoModel` reads it, θa* beside it, and last what tells that all is there."""
    from safetensors.torch import save_file

    with replacing(args.output / "priming.json") as new:
        model.encoder.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        save_file(model.sets()[1], args.output / "adapter.safetensors")
        record = {**vars(args), "run": identity, "last_losses": losses[-10:]}
        new.write_text(json.dumps(record, indent=2, default=str))
    (args.output / "checkpoint.pt").unlink()
    print(f"{args.output}: {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under: what is there takes the place of `path` once it is whole."""
    new = path.with_name(f"{path.name}.new")
    with blaming(f"writing {path}"):
        yield new
        new.replace(path)


def identify(args, weights, sentences):
    """A checksum of settings, weights and data; without places, versions, and seeds in file names."""
    places = {"model", "data", "init", "load", "output", "results", "save", "device"}
    others = places | {"save_every", "tgt", "seeds", "versions", "priming"}
    settings = {name: value for name, value in vars(args).items() if name not in others}
    return f"{zlib.crc32(repr([settings, checksum(weights), sentences]).encode()):08x}"


def checksum(weights: Iterable[Tensor]) -> int:
    return zlib.crc32(repr([zlib.crc32(tensor.detach().cpu().numpy()) for tensor in weights]).encode())


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that prime.py and finetune.py share."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=with_defaults)
    parser.print_usage = lambda file=None: None  # a wrong flag ends with one line
    pinned = ("torch", "transformers", "datasets", "seqeval")
    parser.set_defaults(versions={name: metadata.version(name) for name in pinned})
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased", help="on the hub or in a folder")
    flag("--data", default="unimelb-nlp/wikiann", help="on the hub or in a folder")
    flag("--types", nargs="+", default=["PER", "ORG", "LOC"], help="of entities")
    flag("--pe", choices=["adapter", "bitfit"], default="adapter", help="what θa is")
    flag("--bottleneck", type=int, default=64, help="width of the adapter, paper: 64")
    flag("--max-length", type=int, default=128, help="word pieces of a sentence")
    flag("--limit-train", type=int, metavar="N", help="first N sentences of a training split")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--bf16", action="store_true", help="autocast the encoder to bfloat16")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, if all numbers are positive and finite; some may be zero."""
    args = parser.parse_args()
    for name, value in vars(args).items():
        zero_fits = value == 0 and name in ("inner_steps", "seed", "min_steps")
        if type(value) in (int, float) and not (zero_fits or 0 < value < 2**63):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is out of range")
    return args


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # some terminals know no θ
        main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        told = " ".join(str(error).split()) or "interrupted; the same command goes on"
        print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
