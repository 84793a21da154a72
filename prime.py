"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (Findings of ACL 2023).

`python prime.py --src en es` does the paper's experiment and leaves θp* and θa* in `primed/`. To prime your
own model, copy this file and call `prime`: it needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
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
    second_order: bool = False,
    hoist: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None,
    report: Callable[[list[float]], None] = lambda query_losses: None,
) -> tuple[Parameters, Parameters]:
    """Algorithm 1, with the first-order meta-gradient of §4.2 or the exact one; moves all θ in place.

    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())`, all of which require
        gradients. A parameter in none of them is a constant.
    batches: each is a batch of tasks, at least one; a task is a support set and a query set, of any form
        that `loss` takes. Convergence is the caller's to judge: the algorithm ends with the last batch.
    loss: L(f, D), a scalar. It calls `f(...)` where it would call `model(...)`.
    optimizer, schedule: the "− β ∇" of line 9; the optimizer holds θp and θa.
    maml: the paper's ablation, MAML proper: the inner loop also moves the task's copy of θp.
    second_order: the exact meta-gradient, through the inner loop. A fused attention kernel has no second
        derivative and raises RuntimeError: take `attn_implementation="eager"`.
    hoist: gives back the support sets, or the query sets, of all tasks with f(x; θp) in the place of x, for
        `loss` to accept; ignored with `maml`. For a model in which θa and θh come after all of θp, with no
        dropout in θp's part.
    report: is called after every meta step with the query losses of its tasks.

    The mode of the model stays as it is: call `model.eval()` before, unless dropout is wanted. Afterwards
    `.grad` of θp and θa holds the last meta-gradient; `.grad` of θh is untouched.
    """
    outer = [*theta_p.values(), *theta_a.values()]
    # Alg. 1, line 1: not converged as long as the caller has batches
    for tasks in batches:  # Alg. 1, line 2
        optimizer.zero_grad()
        supports, queries = zip(*tasks)
        if hoist and not maml:  # exact: down to line 8 nothing moves θp, so f(x; θp) stays the same ...
            with torch.set_grad_enabled(second_order):  # ... and only the exact line 9 has a gradient in it
                supports = hoist(supports)
            queries = hoist(queries)
        query_losses, theta_1_h = [], None
        for support, query in zip(supports, queries, strict=True):  # Alg. 1, line 3
            theta_i = {**theta_a, **theta_h}  # Alg. 1, line 4: what moves; the model's own θp is θi_p ...
            if maml:
                theta_i |= theta_p  # ... except for the red line of Alg. 1, in MAML only
            for _ in range(inner_steps):  # Alg. 1, line 5
                support_loss = loss(at(model, theta_i), support)
                gradients = torch.autograd.grad(support_loss, list(theta_i.values()), materialize_grads=True,
                                                create_graph=second_order)
                for name, gradient in zip(theta_i, gradients):  # Alg. 1, line 6
                    # In first order the gradient is a constant to autograd, and dθi/dθ the identity.
                    theta_i[name] = theta_i[name] - inner_lr * gradient
            # Alg. 1, line 7: end for
            query_losses.append(loss(at(model, theta_i), query))
            if theta_1_h is None:
                theta_1_h = {name: theta_i[name].detach() for name in theta_h}
        # Alg. 1, line 8: end for
        sum(query_losses).backward(inputs=outer)  # Alg. 1, line 9: the gradients of the sum over tasks, ...
        optimizer.step()  # ... the steps on θa and θp, ...
        schedule.step()
        with torch.no_grad():
            for name, parameter in theta_h.items():
                parameter.copy_(theta_1_h[name])  # ... and θh = θ1_h
        report([query_loss.item() for query_loss in query_losses])
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

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
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
    pairs = [(names[before], names[tag]) for _, tags in rows for before, tag in zip([0, *tags], tags)]
    if loose := sum(tag[0] == "I" and before[1:] != tag[1:] for before, tag in pairs):
        print(f"{folder}: {loose} entities of {split} begin with I-; they stay as they are", file=sys.stderr)
    return rows, names


def read_lines(path: Path, prefix: str, limit: int | None) -> list[Row]:
    """The sentences of a text file; a blank line ends one. Raises BadInput with the number of the line."""
    rows: list[Row] = [([], [])]
    for number, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        text = data.decode(errors="replace")
        line = text.rstrip("\r").removeprefix(prefix)
        if not line and rows[-1][0]:
            rows.append(([], []))
        if len(rows) > (limit or math.inf):
            break
        word, tab, tag = line.partition("\t")
        if line and (not word or tag not in TAGS or text.encode() != data):
            raise BadInput(f"{path}:{number}: {line[:80]!r} is not a token, a tab and a tag in UTF-8; "
                           f"the tags are: {' '.join(TAGS)}")
        if line:
            rows[-1][0].append(word)
            rows[-1][1].append(TAGS.index(tag))
    return [row for row in rows if row[0]]


def tokenize(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Sentence]:
    """Word pieces and their alignment: the first piece of a word carries its tag, the others carry none."""
    from adapters import Sentence

    texts = [words for words, _ in rows]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    sentences = []
    for i, (_, tags) in enumerate(rows):
        first = {word: place for place, word in reversed([*enumerate(encoded.word_ids(i))])}  # of its pieces
        words = sorted(first.keys() - {None})
        sentences.append(Sentence(encoded["input_ids"][i], [first[word] for word in words], words, tags))
    return sentences


def load(args: argparse.Namespace, tokenizer: Any, language: str, split: str) -> list[Sentence]:
    """The sentences of a split, for training those that have a word piece; `args.tags` names their tags."""
    with reading(f"--data {args.data} (offline: a folder), {language} {split}"):
        limit = args.limit_train if split == "train" else args.limit_test
        rows, names = read_split(args.data, language, split, limit)
        if names != vars(args).setdefault("tags", names):
            raise BadInput(f"{args.data}, {language} {split}: the tags are {names}, elsewhere {args.tags}")
        sentences = tokenize(rows, tokenizer, args.max_length)
        if split == "train" and not (sentences := [sentence for sentence in sentences if sentence.words]):
            raise BadInput(f"{args.data}, {language} {split}: no word has a word piece")
    return sentences


def sample_tasks(corpora: list[list[Sentence]], args: Any, step: int) -> list[tuple[list[Sentence], ...]]:
    """The support and query sets of a meta step: disjoint random sentences of the source languages in turn.

    They depend on `args.seed` and `step` alone: every method draws the same sentences. FT priming takes both
    sets together as the query set.
    """
    chance = random.Random(f"{args.seed} {step}")
    support = 0 if args.method == "ft" else args.support
    languages = [i % len(corpora) for i in range(step * args.tasks, (step + 1) * args.tasks)]
    drawn = [chance.sample(corpora[i], args.support + args.query) for i in languages]
    return [(sentences[:support], sentences[support:]) for sentences in drawn]


def tag_loss(model: Callable[..., Tensor], sentences: Sequence[Sentence]) -> Tensor:
    """Mean cross-entropy over the words that have a piece."""
    scores = model(sentences)
    tags = [sentence.tags[word] for sentence in sentences for word in sentence.words]
    return nn.functional.cross_entropy(scores, torch.tensor(tags, device=scores.device))


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
    flag("--second-order", action="store_true", help="the exact meta-gradient; paper: first-order")
    flag("--seed", type=positive(int, or_zero=True), default=0, help="of initialisation and sampling")
    flag("--save-every", type=positive(int), default=100, metavar="N", help="meta steps between checkpoints")
    flag("--resume", action="store_true", help="go on with the unfinished run in --output, if there is one")
    flag("--output", type=Path, default=Path("primed"), help="folder for θp* and θa*")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from adapters import Tagger, load_encoder
    from safetensors.torch import save_file
    from tqdm import tqdm

    rank, processes = join(args)
    torch.manual_seed(args.seed)
    with reading(f"--model {args.model} (offline: a folder), --max-length {args.max_length}, {args.device}"):
        encoder, tokenizer = load_encoder(args.model, args.max_length, args.device)
    corpora = []
    for language in args.src:
        corpora.append(load(args, tokenizer, language, "train"))
        if len(corpora[-1]) < args.support + args.query:
            raise BadInput(f"{language}: {len(corpora[-1])} training sentences; lower --support or --query")
    args.data_checksum = zlib.crc32(repr(corpora).encode())
    args.weights_checksum = sum(zlib.crc32(p.detach().cpu().numpy()) for p in encoder.parameters())
    with reading(f"--pe {args.pe} (lora: pip install peft), --bottleneck {args.bottleneck}, {args.device}"):
        model = Tagger(encoder, len(args.tags), args.pe, args.bottleneck, args.bf16).to(args.device).eval()
    hoist = model.hoist if model.on_top and args.method != "maml" else None  # else f changes with θi
    if args.second_order and not hoist:
        encoder.set_attn_implementation("eager")  # fused kernels have no second derivative
    theta_p, theta_a, theta_h = model.sets()
    if args.method == "ft":  # §5.2: without inner steps the meta step is plain fine-tuning on the query sets
        theta_p, theta_h, args.inner_steps = {**theta_p, **theta_h}, {}, 0
        model.train()  # dropout is for plain fine-tuning; Algorithm 1 takes f as a fixed function
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, schedule = adamw(outer, args.outer_lr, args.steps)
    losses = resume(args, model, optimizer, schedule)

    def sum_over_processes(*_: Any) -> None:
        for gradient in [parameter.grad for parameter in outer if parameter.grad is not None]:
            distributed.all_reduce(gradient)

    if processes > 1:  # the sum of line 9 is over the tasks of all
        optimizer.register_step_pre_hook(sum_over_processes)
    signals = torch.zeros(1, device=args.device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signals.fill_(1))

    def batches() -> Iterator[list[tuple[list[Sentence], ...]]]:
        for step in range(len(losses), args.steps):
            torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))  # for dropout
            yield sample_tasks(corpora, args, step)[rank::processes]

    bar = tqdm(batches(), f"priming ({args.method})", args.steps, initial=len(losses), disable=rank or None)

    def report(query_losses: list[float]) -> None:
        gradients = [parameter.grad for parameter in outer if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(sum(query_losses) + norm):
            tasks = range(args.tasks * len(losses), args.tasks * (len(losses) + 1))[rank::processes]
            told = [f"{args.src[i % len(args.src)]} {loss}" for i, loss in zip(tasks, query_losses)]
            raise BadInput(f"step {len(losses) + 1}: query losses of the tasks: {', '.join(told)}; norm of "
                           f"the meta-gradient: {norm}; lower --inner-lr or --outer-lr")
        stopped = signals.clone()
        if processes > 1:
            distributed.all_reduce(stopped)  # all stop after the same step
            for parameter in theta_h.values():
                distributed.broadcast(parameter.detach(), 0)  # θ1_h: the first process has the first task
        losses.append(sum(query_losses))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if rank == 0 and (stopped or len(losses) % args.save_every == 0):
            save_checkpoint(args, losses, model, optimizer, schedule)
        if stopped:
            launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
            again = shlex.join([*sys.argv, *([] if args.resume else ["--resume"])])
            raise BadInput(f"stopped after step {len(losses)} of {args.steps}; to go on: {launcher} {again}")

    with reading("priming"):
        prime(model, theta_p, theta_a, theta_h, bar, tag_loss, optimizer, schedule,
              inner_lr=args.inner_lr, inner_steps=args.inner_steps, maml=args.method == "maml",
              second_order=args.second_order, hoist=hoist, report=report)
    if rank == 0:
        with whole_folder(args.output, "priming.json") as folder:
            record = {**vars(args), "last_losses": losses[-10:]}
            model.save_encoder(folder)
            tokenizer.save_pretrained(folder)
            save_file(theta_a, folder / "adapter.safetensors")
            (folder / "priming.json").write_text(json.dumps(record, indent=2, default=str))
        (args.output / CHECKPOINT).unlink(missing_ok=True)
        print(f"{args.output}: {args.steps} meta steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


# ---- long runs ----

CHECKPOINT = "checkpoint.pt"  # of an unfinished run, in its output folder
NO_SAY = {"output", "resume", "save_every", "device", "tgt", "seeds", "results", "save", "cache_gb"}


def save_checkpoint(args: argparse.Namespace, losses: list[float], *parts: Any) -> None:
    """Everything that the rest of a run depends on, in one file that takes its name once it is whole."""
    states = [part.state_dict() for part in parts]
    with whole_folder(args.output, CHECKPOINT) as folder:
        settings = json.dumps(vars(args), default=str)
        torch.save({"settings": settings, "losses": losses, "states": states}, folder / CHECKPOINT)


def resume(args: argparse.Namespace, *parts: Any) -> list[float]:
    """Puts what `save_checkpoint` kept back in its place; the losses so far, none if --output is new."""
    checkpoint, complete = args.output / CHECKPOINT, args.output / "priming.json"
    claim(args.output, complete.name)
    if checkpoint.exists() and not args.resume:
        raise BadInput(f"{args.output} holds an unfinished run: go on with it by --resume, or remove it")
    if not args.resume or not (checkpoint.exists() or complete.exists()):
        return []
    with reading(f"--resume, {args.output}"):
        kept = torch.load(checkpoint, args.device, weights_only=True) if checkpoint.exists() else {}
        if changed := differences(json.loads(kept.get("settings") or complete.read_text()), vars(args)):
            raise BadInput(f"--resume: {args.output} is of a run with other settings: {changed}")
        for part, state in zip(parts, kept.get("states", ())):
            part.load_state_dict(state)
    if not kept:
        print(f"{args.output} is complete")
        sys.exit()
    return kept["losses"]


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ between two runs, of those that have a say in what comes out."""
    now = json.loads(json.dumps(now, default=str))
    names = [name for name in now if name not in NO_SAY and now[name] != before.get(name)]
    return ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in names)


def join(args: argparse.Namespace) -> tuple[int, int]:
    """The number of this process under torchrun, and of how many; each takes some tasks of every batch."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    if args.device.startswith("cuda"):
        args.device = f"cuda:{distributed.get_node_local_rank()}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group()
    if (processes := distributed.get_world_size()) > args.tasks:
        raise BadInput(f"--tasks {args.tasks} are too few for {processes} processes")
    return distributed.get_rank(), processes


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that prime.py and finetune.py share."""
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=with_defaults)
    parser.print_usage = lambda file=None: None  # a wrong flag too ends with one line and exit status 2
    pinned = ("torch", "transformers", "datasets", "seqeval")
    parser.set_defaults(versions={name: metadata.version(name) for name in pinned})
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased", help="on the hub or in a folder; paper: mBERT")
    flag("--data", default="unimelb-nlp/wikiann", help="WikiAnn on the hub or a folder, in README's layouts")
    flag("--pe", choices=["adapter", "houlsby", "bitfit", "lora"], default="adapter",
         help="θa: an adapter on top, as in the paper; adapters in every layer; the encoder's biases; LoRA")
    flag("--bottleneck", type=positive(int), default=64, help="of an adapter, paper: 64; the rank of LoRA")
    flag("--max-length", type=positive(int), default=128, help="word pieces of a sentence; paper: not said")
    flag("--limit-train", type=positive(int), metavar="N", help="first N sentences of each training split")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one")
    flag("--bf16", action="store_true", help="run the encoder under autocast to bfloat16; paper: not said")
    return parser


def positive(kind: type, or_zero: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number over zero, or zero where that has a meaning."""
    def positive_number(text: str) -> float:
        if 0 < kind(text) < 2**63 or or_zero and kind(text) == 0:
            return kind(text)
        raise ValueError
    return positive_number


def claim(folder: Path, mark: str) -> None:
    """Makes an output folder, or takes one that `mark` or a checkpoint shows to be ours. Raises BadInput."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [*folder.glob(".writing-*")]  # by a process that was killed
    names = {path.name for path in folder.iterdir()}
    if names and not left and not names & {mark, CHECKPOINT}:
        raise BadInput(f"{folder} exists and was not written by us (no {mark}): name another folder")
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """Takes files that go into `folder` once all are written, `mark` last: without it, it is not whole."""
    with reading(f"writing {folder}"), TemporaryDirectory(prefix=".writing-", dir=folder) as partial:
        yield Path(partial)
        files = sorted(Path(partial).iterdir(), key=lambda path: path.name == mark)
        if len(files) > 1:
            (folder / mark).unlink(missing_ok=True)
        for path in files:
            path.replace(folder / path.name)


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
