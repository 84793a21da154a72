"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (Findings of ACL 2023).

`python prime.py --src en es` does the paper's experiment and leaves θp* and θa* in `primed/`. To prime your
own model, copy this file and call `prime`: it needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, NoReturn, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

if TYPE_CHECKING:  # at run time these are imported where a script needs them
    from adapters import Sentence

Batch = Any  # whatever the loss takes
Loss = Callable[[Callable[..., Any], Batch], Tensor]  # L(f_θ, D): of what behaves as the model, and a batch
Parameters = Mapping[str, nn.Parameter]  # a named part of `model.named_parameters()`


def prime(
    model: nn.Module, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    batches: Iterable[Iterable[tuple[Batch, Batch]]], loss: Loss, optimizer: Optimizer,
    schedule: LRScheduler, *, inner_lr: float = 0.03, inner_steps: int = 5, maml: bool = False,
    hoist: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None,
    report: Callable[[float], None] = lambda loss: None,
) -> tuple[Parameters, Parameters]:
    """Algorithm 1, with the first-order meta-gradient of §4.2. θp, θa and θh are moved in place.

    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())`, all of which require
        gradients. A parameter in none of them is a constant.
    batches: each is a batch of tasks, at least one; a task is a support set and a query set, of any form
        that `loss` takes. Convergence is the caller's to judge: the algorithm ends with the last batch.
    loss: L(f, D), a scalar. It calls `f(...)` where it would call `model(...)`.
    optimizer, schedule: the "− β ∇" of line 9; the optimizer holds θp and θa.
    maml: the paper's ablation, MAML proper: the inner loop also moves the task's copy of θp.
    hoist: takes the support sets of all tasks, or the query sets, and replaces their inputs by f(x; θp), which
        `loss` must accept in their place; ignored with `maml`. For a model in which θa and θh come after all
        of θp, with no dropout in θp's part.
    report: is called after every meta step with its query loss, summed over the tasks.

    The mode of the model stays as it is: call `model.eval()` before, unless dropout is wanted. Afterwards
    `.grad` of θp and θa holds the last meta-gradient; `.grad` of θh is untouched.
    """
    outer = [*theta_p.values(), *theta_a.values()]
    # Alg. 1, line 1: not converged as long as the caller has batches
    for tasks in batches:  # Alg. 1, line 2
        optimizer.zero_grad()
        supports, queries = zip(*tasks)
        if hoist and not maml:  # exact: down to line 8 nothing moves θp, so f(x; θp) stays the same ...
            with torch.no_grad():  # ... and line 6 takes no gradient in it
                supports = hoist(supports)
            queries = hoist(queries)
        query_loss = 0.0
        theta_1_h = None
        for support, query in zip(supports, queries):  # Alg. 1, line 3
            theta_i = {**theta_a, **theta_h}  # Alg. 1, line 4: what moves; the model's own θp is θi_p ...
            if maml:
                theta_i |= theta_p  # ... except for the red line of Alg. 1, in MAML only
            for _ in range(inner_steps):  # Alg. 1, line 5
                support_loss = loss(at(model, theta_i), support)
                gradients = torch.autograd.grad(support_loss, list(theta_i.values()), materialize_grads=True)
                for name, gradient in zip(theta_i, gradients):  # Alg. 1, line 6
                    # To autograd this gradient is a constant, so dθi/dθ is the identity: first order.
                    theta_i[name] = theta_i[name] - inner_lr * gradient
            # Alg. 1, line 7: end for
            query_loss = query_loss + loss(at(model, theta_i), query)
            if theta_1_h is None:
                theta_1_h = {name: theta_i[name].detach() for name in theta_h}
        # Alg. 1, line 8: end for
        query_loss.backward(inputs=outer)
        optimizer.step()  # Alg. 1, line 9: θa and θp ...
        schedule.step()
        with torch.no_grad():
            for name, parameter in theta_h.items():
                parameter.copy_(theta_1_h[name])  # ... and θh = θ1_h
        report(query_loss.item())
    # Alg. 1, line 10: end while
    return theta_p, theta_a  # Alg. 1, line 11


def at(model: nn.Module, theta: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The paper's f_θ: what behaves as `model` with the parameters `theta` in the place of its own."""
    return lambda *args, **kwargs: functional_call(model, theta, args, kwargs)


def adamw(parameters: Iterable[nn.Parameter], lr: float, steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW (Loshchilov and Hutter 2019) whose rate falls linearly from `lr` to zero over `steps` steps."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))


# ---- the data: WikiAnn as tasks ----

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
ARCHIVE_NAMES = {"train": "train", "validation": "dev", "test": "test"}  # Rahimi et al. 2019

Row = tuple[list[str], list[int]]  # the words of a sentence and the numbers of their tags


class BadInput(Exception):
    """What was wrong, where, and what to do, in one line."""


def refuse(message: str) -> NoReturn:
    raise BadInput(message)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Whatever the libraries raise while they read `source` becomes a BadInput that names it."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{source}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def read_split(data: str, language: str, split: str, limit: int | None = None) -> tuple[list[Row], list[str]]:
    """The first `limit` sentences of a split ("train", "validation" or "test") and the names of the tags.

    `data` is a hub name or a folder with one folder a language: `train.txt` of `token<TAB>tag` lines, the
    original archives' `train` with `language:` before each token, or the hub's `train-*.parquet`.
    """
    import datasets

    folder, names = Path(data) / language, TAGS
    if (folder / f"{split}.txt").is_file():
        rows = read_lines(folder / f"{split}.txt", "", limit)
    elif (folder / ARCHIVE_NAMES[split]).is_file():
        rows = read_lines(folder / ARCHIVE_NAMES[split], f"{language}:", limit)
    else:
        if parquet := sorted(map(str, folder.glob(f"{split}-*.parquet"))):
            table = datasets.Dataset.from_parquet(parquet)
        elif Path(data).is_dir():
            found = " ".join(sorted(path.name for path in Path(data).iterdir() if path.is_dir()))
            raise BadInput(f"{folder}: no {split} split there; the languages of {data} are: {found}")
        else:
            table = datasets.load_dataset(data, language, split=split)
        names = getattr(table.features["ner_tags"].feature, "names", TAGS)
        rows = list(zip(table["tokens"][:limit], table["ner_tags"][:limit]))
    for number, (words, tags) in enumerate(rows, start=1):
        if len(words) != len(tags) or not {*tags} <= {*range(len(names))}:
            raise BadInput(f"{folder}: row {number} of {split} has not one tag of {names} for each token")
    if not rows:
        raise BadInput(f"{folder}: the {split} split is empty")
    return rows, names


def read_lines(path: Path, prefix: str, limit: int | None) -> list[Row]:
    """The sentences of a text file; a blank line ends one. Raises BadInput with the number of the line."""
    rows: list[Row] = [([], [])]
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip("\r\n")
            if not line and rows[-1][0]:
                rows.append(([], []))
            if len(rows) > (limit or math.inf):
                break
            if line:
                word, *tag = line.removeprefix(prefix).split("\t")
                if not word or len(tag) != 1:
                    raise BadInput(f"{path}:{number}: not a token, a tab and a tag: {line!r}")
                if tag[0] not in TAGS:
                    raise BadInput(f"{path}:{number}: tag {tag[0]!r} is none of {' '.join(TAGS)}")
                rows[-1][0].append(word)
                rows[-1][1].append(TAGS.index(tag[0]))
    return [row for row in rows if row[0]]


def tokenize(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Sentence]:
    """Word pieces and their alignment: the first piece of a word carries its tag, the others carry none."""
    from adapters import Sentence

    texts = [words for words, _ in rows]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    sentences = []
    for i, (_, tags) in enumerate(rows):
        places = {word: place for place, word in reversed([*enumerate(encoded.word_ids(i))])}  # of first pieces
        words = sorted(places.keys() - {None})
        sentences.append(Sentence(encoded["input_ids"][i], [places[word] for word in words], words, tags))
    return sentences


def load(args: Any, tokenizer: Any, language: str, split: str) -> tuple[list[Sentence], list[str]]:
    """The sentences of a split, for training without those that have no word piece, and the tags' names."""
    with reading(f"--data {args.data}, {language} {split}"):
        rows, names = read_split(args.data, language, split, vars(args)[f"limit_{split}"])
        sentences = tokenize(rows, tokenizer, args.max_length)
    return [sentence for sentence in sentences if sentence.words or split != "train"], names


def sample_tasks(corpora: list[list[Sentence]], args: Any, step: int) -> Iterator[tuple[list[Sentence], ...]]:
    """The support and query sets of a meta step: disjoint random sentences of the source languages in turn.

    They depend on `args.seed` and `step` alone: every method draws the same sentences. FT priming takes both
    sets together as the query set.
    """
    chance = random.Random(f"{args.seed} {step}")
    for i in range(step * args.tasks, (step + 1) * args.tasks):
        drawn = chance.sample(corpora[i % len(corpora)], args.support + args.query)
        support = 0 if args.method == "ft" else args.support
        yield drawn[:support], drawn[support:]


def as_batch(sentences: Sequence[Sentence], device: str) -> tuple[Sequence[Sentence], Tensor]:
    """Sentences, and the tags of their words that have a piece: int64, [words]."""
    tags = [sentence.tags[word] for sentence in sentences for word in sentence.words]
    return sentences, torch.tensor(tags, dtype=torch.int64, device=device)


def tag_loss(model: Callable[..., Tensor], batch: tuple[Sequence[Any], Tensor]) -> Tensor:
    """Mean cross-entropy over words; a batch is sentences, or the features of each, and the words' tags."""
    x, tags = batch
    return nn.functional.cross_entropy(model(x), tags)


# ---- the command ----


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages; paper: en es")
    flag("--method", choices=["meta", "maml", "ft"], default="meta",
         help="meta: Algorithm 1 (row 4 of Table 1); maml: with its red line (row 6); ft: plain fine-tuning "
         "of θp, θa and θh on the sentences that the tasks would have drawn (row 5)")
    flag("--inner-steps", type=positive(int, or_zero=True), default=5, help="S; paper: 5, in row 7: 1")
    flag("--inner-lr", type=positive(float), default=0.03, help="α of SGD; paper: 0.03")
    flag("--outer-lr", type=positive(float), default=5e-5, help="β of AdamW, falling to 0; paper: 5e-5")
    flag("--steps", type=positive(int), default=1000, help="meta steps; paper: not said")
    flag("--tasks", type=positive(int), default=2, help="tasks in a batch; paper: not said")
    flag("--support", type=positive(int), default=16, help="sentences of a task; paper: not said")
    flag("--query", type=positive(int), default=16, help="sentences of a task; paper: not said")
    flag("--bottleneck", type=positive(int), default=64, help="of the adapter; paper: 64")
    flag("--seed", type=int, default=0, help="of initialisation and sampling")
    flag("--output", type=Path, default=Path("primed"), help="folder for θp* and θa*")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from adapters import Tagger, load_encoder, save_parameters
    from tqdm import tqdm

    torch.manual_seed(args.seed)
    with reading(f"--model {args.model}, --max-length {args.max_length}, --device {args.device}"):
        encoder, tokenizer = load_encoder(args.model, args.max_length, args.device)
    corpora = []
    for language in args.src:
        sentences, tag_names = load(args, tokenizer, language, "train")
        if len(sentences) < args.support + args.query:
            raise BadInput(f"{language}: {len(sentences)} training sentences do not fill one support and one "
                           f"query set; lower --support {args.support} or --query {args.query}")
        corpora.append(sentences)
    model = Tagger(encoder, len(tag_names), args.bottleneck, args.bf16).to(args.device).eval()
    theta_p, theta_a, theta_h = model.sets()
    batches = ([[as_batch(part, args.device) for part in task] for task in sample_tasks(corpora, args, step)]
               for step in range(args.steps))
    if args.method == "ft":  # §5.2: without inner steps the meta step is plain fine-tuning on the query sets
        theta_p, theta_h, args.inner_steps = {**theta_p, **theta_h}, {}, 0
        model.train()  # dropout is for plain fine-tuning; Algorithm 1 takes f as a fixed function
    optimizer, schedule = adamw([*theta_p.values(), *theta_a.values()], args.outer_lr, args.steps)
    losses: list[float] = []
    bar = tqdm(batches, f"priming ({args.method})", args.steps, unit="step", disable=None)

    def report(loss: float) -> None:
        losses.append(loss)
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} at step {len(losses)}: lower --inner-lr or --outer-lr")
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    with whole_folder(args.output, "priming.json") as folder:
        prime(model, theta_p, theta_a, theta_h, bar, tag_loss, optimizer, schedule,
              inner_lr=args.inner_lr, inner_steps=args.inner_steps, maml=args.method == "maml",
              hoist=model.hoist, report=report)
        record = {**vars(args), "tags": tag_names, "last_losses": losses[-10:]}
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_parameters(theta_a, folder / "adapter.safetensors")
        (folder / "priming.json").write_text(json.dumps(record, indent=2, default=str))
    print(f"{args.output}: θp*, θa* after {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that prime.py and finetune.py share; a wrong one is a BadInput."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=with_defaults)
    parser.error = refuse
    pinned = ("torch", "transformers", "datasets", "seqeval")
    parser.set_defaults(versions={name: metadata.version(name) for name in pinned})
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased",
         help="pretrained encoder: a hub name or a folder that AutoModel loads; paper: mBERT")
    flag("--data", default="unimelb-nlp/wikiann",
         help="WikiAnn: a hub name, or a folder in one of the layouts that README describes")
    flag("--max-length", type=positive(int), default=128,
         help="word pieces of a sentence; words beyond count as O; paper: not said")
    flag("--limit-train", type=positive(int), metavar="N", help="first N sentences of each training split")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one")
    flag("--bf16", action="store_true", help="run the encoder under autocast to bfloat16; paper: not said")
    return parser


def positive(kind: type, or_zero: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number over zero, or zero where that has a meaning."""
    def positive_number(text: str) -> float:
        if 0 < kind(text) < math.inf or or_zero and kind(text) == 0:
            return kind(text)
        raise ValueError
    return positive_number


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """A folder that, once complete, takes its name, and the place of an earlier one with the file `mark`."""
    folder = folder.resolve()
    if folder.exists() and not (folder / mark).exists():
        raise BadInput(f"{folder} exists and was not written by us (no {mark}): name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.partial-", dir=folder.parent) as temporary:
        partial = Path(temporary) / "new"
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        partial.rename(folder)


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
