"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (ACL 2023).

`python prime.py --src en es` does the paper's experiment and leaves θp* and θa* in `primed/`. To prime your
own model, copy this file and iterate over `prime`. It needs torch alone: 2.4 or newer, tested with 2.13.0."""

import argparse
import json
import math
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Batch = Any  # whatever the loss accepts
Task = tuple[Batch, Batch]  # a support set and a query set
Loss = Callable[[nn.Module, Batch], Tensor]  # L(f_θ, D)
Parameters = Mapping[str, nn.Parameter]  # a named part of `model.named_parameters()`


def prime(
    model: nn.Module, *, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    batches: Iterable[Iterable[Task]], loss: Loss,
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None = None,
    inner_lr: float = 0.03, inner_steps: int = 5, maml: bool = False, second_order: bool = False,
    encode: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None,
) -> Iterator[list[float]]:
    """Algorithm 1 as a generator. Each iteration runs one meta step (lines 2 to 9), which updates the
    parameters in place, and yields one query loss per task. Nothing happens until you iterate.

    model: f, g and h in one module. Call `model.eval()` first, so that the inner loop has no dropout.
    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())` that require gradients:
        pretrained, PE and head parameters (§3.1). A parameter in none of them is a constant.
    batches: one list of (support, query) pairs per meta step; both sets are in any form that `loss`
        accepts. Training ends when `batches` is exhausted or the caller breaks out of the loop.
    loss: loss(model, batch) returns L_Ti, a scalar. The model's parameters are θi while it runs; use
        those, because a tensor or module that the loss keeps from elsewhere is still at θ.
    optimizer, scheduler: the "− β ∇" of line 9. The optimizer holds θp and θa, and not θh.
    inner_lr, inner_steps: α and S. maml: the red line, which updates θi_p too (the paper's ablation).
    second_order: differentiate through the inner steps. Otherwise their gradients are constants, so that
        dθi/dθ = 1: the first-order approximation of §4.2. Fused attention has no second derivative.
    encode: for θa and θh that follow all of θp, such as an adapter on top. It receives the support or
        the query sets of all tasks and returns as many, in the same order, with f(x; θp) instead of x.
        Then the inner steps do not run the encoder, and change nothing else. Not used with `maml`.

    Raises ValueError, before anything is updated, for mistakes that would otherwise go unnoticed (see
    `check_arguments`). Gradient hooks on tensors (`register_hook`) do not act on the inner loop.
    """
    encode = None if maml else encode
    inner_sets = {"theta_a": theta_a, "theta_h": theta_h}
    if maml:
        inner_sets["theta_p"] = theta_p  # the red line: line 6 updates θi_p too
    check_arguments(model, theta_p, theta_a, theta_h, optimizer, scheduler, inner_lr, inner_steps)
    check_checkpointing(model, inner_sets, second_order, encode)
    inner_params = {name: p for part in inner_sets.values() for name, p in part.items()}
    outer_params = [*theta_p.values(), *theta_a.values()]
    f = FunctionalModel(model, loss, inner_sets)
    # 1: while not converged do
    for tasks in batches:  # 2: sample a batch of tasks T
        supports, queries = support_and_query_sets(tasks, encode, second_order)
        optimizer.zero_grad()
        query_losses, theta_of_first_task = [], {}
        for support, query in zip(supports, queries):  # 3: for all Ti in T do
            theta_i = {name: p.clone() for name, p in inner_params.items()}  # 4: θi = θ
            for _ in range(inner_steps):  # 5: for s = 1..S do
                grads = f.gradients(theta_i, support, create_graph=second_order)
                theta_i = {name: theta_i[name] - inner_lr * grads[name] for name in theta_i}  # 6
            # 7: end for
            # L_Ti of line 9; backward() adds this task's term to ∇ Σ L_Ti, unless the tasks share f(x; θp)
            query_losses.append(f.query_loss(theta_i, query, backward_to=None if encode else outer_params))
            theta_of_first_task = theta_of_first_task or theta_i
        # 8: end for
        if encode:
            sum(query_losses).backward(inputs=outer_params)  # 9: ∇ Σ L_Ti
        check_gradients(encode, theta_p=theta_p, theta_a=theta_a)
        optimizer.step()  # 9: θa and θp
        if scheduler:
            scheduler.step()
        for name, p in theta_h.items():
            p.data.copy_(theta_of_first_task[name])  # 9: θh = θ1_h
        torch.clear_autocast_cache()  # a caller's autocast would otherwise reuse casts of the old θp
        yield [query_loss.item() for query_loss in query_losses]
    # 10: end while
    return theta_p, theta_a  # 11: they were updated in place


class FunctionalModel(nn.Module):
    """The paper's f_θ: the loss and its gradient with `theta` instead of the model's own parameters.

    The gradient is computed before the parameters are put back, because the backward pass may read them
    again (activation checkpointing, parametrizations). Tied weights are replaced under all their names."""

    def __init__(self, model: nn.Module, loss: Loss, sets: Mapping[str, Parameters]):
        super().__init__()
        self.model, self.loss, self.sets = model, loss, sets
        names = {id(p): name for part in sets.values() for name, p in part.items()}
        named = model.named_parameters(remove_duplicate=False)
        self.aliases = {f"model.{alias}": names[id(p)] for alias, p in named if id(p) in names}

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()

    def with_parameters(self, theta: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """Returns function(), called while the parameters of `self.model` are `theta`."""
        replaced = {alias: theta[name] for alias, name in self.aliases.items()}
        return functional_call(self, replaced, (function,), tie_weights=False)

    def scalar_loss(self, batch: Batch) -> Tensor:
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(f"loss must return a scalar tensor, not {type(value).__name__}{shape}")
        if not value.requires_grad:
            raise ValueError("the loss depends on no parameter: does it use the model that it receives?")
        return value

    def gradients(self, theta: Mapping[str, Tensor], batch: Batch, create_graph: bool) -> dict[str, Tensor]:
        """∇_θ L(f_θ, D), by name; zero for a parameter on which the loss does not depend."""

        def compute() -> Sequence[Tensor | None]:
            inputs, options = [*theta.values()], {"create_graph": create_graph, "allow_unused": True}
            return torch.autograd.grad(self.scalar_loss(batch), inputs, **options)

        grads = dict(zip(theta, self.with_parameters(theta, compute)))
        for name, part in self.sets.items():
            if part and all(grads[n] is None for n in part):
                raise ValueError(f"the loss of the support set does not depend on {name}")
        return {n: torch.zeros_like(theta[n]) if grad is None else grad for n, grad in grads.items()}

    def query_loss(self, theta: Mapping[str, Tensor], batch: Batch, backward_to: list | None) -> Tensor:
        """L(f_θ, D), whose gradient is added to the .grad of the parameters in `backward_to`."""

        def compute() -> Tensor:
            value = self.scalar_loss(batch)
            if backward_to is None:
                return value
            value.backward(inputs=backward_to)
            return value.detach()

        return self.with_parameters(theta, compute)


def support_and_query_sets(
    tasks: Iterable[Task], encode: Callable | None, second_order: bool
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """The support sets and the query sets of a batch of tasks, after `encode` if there is one."""
    if not torch.is_grad_enabled():
        raise ValueError("gradients are disabled: do not iterate over prime() under torch.no_grad()")
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, (tuple, list)) and len(task) == 2 for task in tasks):
        raise ValueError("a batch of tasks must be a non-empty list of (support, query) pairs")
    if any(isinstance(batch, Iterator) for task in tasks for batch in task):
        raise ValueError("a support or query set must not be a generator: line 6 reads it in each step")
    supports, queries = zip(*tasks)
    if encode:
        # queries first: autocast caches casts, and those made under no_grad would cut off θp's gradient
        queries = list(encode(queries))
        with torch.set_grad_enabled(second_order):
            supports = list(encode(supports))
        if not len(supports) == len(queries) == len(tasks):
            found = f"{len(supports)} support and {len(queries)} query sets for {len(tasks)} tasks"
            raise ValueError(f"encode must return one set for each that it receives, not {found}")
    return supports, queries


def check_arguments(
    model: nn.Module, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    optimizer: torch.optim.Optimizer, scheduler: Any, inner_lr: float, inner_steps: int,
) -> None:
    """Raises ValueError for mistakes that would otherwise go unnoticed, with what to do."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("pass model.module, and sum gradients over processes in an optimizer hook")
    if not isinstance(inner_steps, int) or inner_steps < 0:
        raise ValueError(f"inner_steps must be an integer of at least 0, not {inner_steps}")
    if not 0 < inner_lr < math.inf:
        raise ValueError(f"inner_lr must be positive and finite, not {inner_lr}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau needs a metric in each step: step it in your own loop")
    sets = {"theta_p": theta_p, "theta_a": theta_a, "theta_h": theta_h}
    for set_name, part in sets.items():
        if not isinstance(part, Mapping):
            kind = type(part).__name__
            raise ValueError(f"{set_name} must be a dict of parameters by name, not a {kind}")
    if inner_steps and not theta_p:
        raise ValueError("theta_p is empty: collect it before a PE library freezes the model")
    if inner_steps and not theta_a and not theta_h:
        raise ValueError("theta_a and theta_h are empty: the inner loop has nothing to update")
    model_params = dict(model.named_parameters(remove_duplicate=False))
    optimized = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    seen = set()
    for set_name, part in sets.items():
        for name, p in part.items():
            if model_params.get(name) is not p:
                todo = "build the sets from model.named_parameters() after wrapping or moving it"
                raise ValueError(f"{name} in {set_name} is not a parameter of this model: {todo}")
            if id(p) in seen:
                raise ValueError(f"{name} is in two sets: theta_p, theta_a, theta_h must be disjoint")
            if not p.requires_grad:
                raise ValueError(f"{name} in {set_name} is frozen: call requires_grad_() on it first")
            if part is theta_h and optimized[id(p)]:
                raise ValueError(f"{name}: the optimizer must not hold theta_h, which line 9 sets")
            if part is not theta_h and optimized[id(p)] != 1:
                found = f"it holds it {optimized[id(p)]} times"
                raise ValueError(f"{name}: the optimizer must hold theta_p and theta_a once; {found}")
            seen.add(id(p))
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.requires_grad and id(p) not in seen:
            names = [name for name, q in model_params.items() if q is p] or ["a parameter"]
            raise ValueError(f"the optimizer holds {names[0]}, which is in neither theta_p nor theta_a")


def check_checkpointing(
    model: nn.Module, inner_sets: Mapping[str, Parameters], second_order: bool, encode: Any
) -> None:
    """Raises ValueError where activation checkpointing would recompute a layer with θ instead of θi."""
    inner = {id(p) for part in inner_sets.values() for p in part.values()}
    for name, module in model.named_modules():
        by_torch = type(module).__name__ == "CheckpointWrapper"
        by_transformers = getattr(module, "gradient_checkpointing", False) and module.training
        if by_torch or by_transformers:
            if second_order:
                raise ValueError(f"{name}: turn off activation checkpointing, or second_order")
            if encode and any(id(p) in inner for p in module.parameters()):
                raise ValueError(f"{name} is in the inner loop: turn off its activation checkpointing")


def check_gradients(encode: Any, **sets: Parameters) -> None:
    """Raises ValueError if the sum of the query losses depends on no parameter of a set."""
    for set_name, part in sets.items():
        if part and all(p.grad is None for p in part.values()):
            cause = ": does encode detach what it returns?" if encode else ""
            raise ValueError(f"the query losses do not depend on {set_name}{cause}")


def adamw_with_linear_decay(
    parameters: Iterable[Tensor], lr: float, steps: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW (Loshchilov and Hutter 2019) with weight decay 0.01 (not in the paper), whose rate falls
    linearly from `lr` to 0 in `steps` steps. Raises ValueError if `steps` is not positive."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
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


def tag_loss(model: nn.Module, sentences: Batch) -> Tensor:
    """L_Ti: the mean cross-entropy over the words that have a piece."""
    scores = model(sentences)
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
    optimizer, scheduler = adamw_with_linear_decay(outer, args.outer_lr, args.steps)
    parts = (model, optimizer, scheduler)
    losses = continued(args, identity, *parts)
    steps = prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, loss=tag_loss,
        batches=sample_batches(corpora, args, len(losses)), optimizer=optimizer, scheduler=scheduler,
        inner_lr=args.inner_lr, inner_steps=inner_steps,
        maml=args.method == "maml", second_order=args.second_order,
        encode=model.encode_sets if args.pe == "adapter" else None,  # bitfit: θa is in f
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
