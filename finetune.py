"""Parameter-efficient fine-tuning of a primed or pretrained encoder for target languages, and its score.

`python finetune.py --tgt hi` starts from `primed/`; with --tune and --init it does every row of Table 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pandas
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from adapters import Parameters, Sentence, Tagger, load_encoder, load_parameters
from prime import NO_SAY, BadInput, adamw, claim, common_parser, differences, load, positive
from prime import reading, run, tag_loss, whole_folder


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--tgt", nargs="+", required=True, metavar="LANG", help="targets; paper: hi af az lt et nl")
    flag("--tune", choices=["adapter", "head", "full"], default="adapter",
         help="θa, θh (rows 3 to 7 of Table 1), or without an adapter θh (row 2) or θp, θh (row 1)")
    flag("--init", default="primed",
         help="a folder that prime.py wrote (rows 4 to 7), or none: --model and a random θa (rows 1 to 3)")
    flag("--epochs", type=positive(int), default=10, help="paper: not said")
    flag("--min-steps", type=positive(int, or_zero=True), default=0, metavar="N",
         help="whole epochs beyond --epochs up to so many steps: for targets of few sentences")
    flag("--lr", type=positive(float), default=3e-3, help="of AdamW, falling to 0; paper: not said")
    flag("--batch-size", type=positive(int), default=16, help="sentences; paper: not said")
    flag("--seeds", type=positive(int, or_zero=True), nargs="+", default=[0], help="a run for each")
    flag("--split", choices=["test", "validation"], default="test", help="what is scored")
    flag("--limit-test", type=positive(int), metavar="N", help="first N sentences of what is scored")
    flag("--cache-gb", type=positive(float, or_zero=True), default=4.0,
         help="memory for f(x; θp), where θp stays; what needs more is encoded in every epoch")
    flag("--results", type=Path, default=Path("results.jsonl"), help="each run adds a line")
    flag("--resume", action="store_true", help="skip the runs whose line --results already has")
    flag("--save", type=Path, metavar="DIR", help="keep what each run tuned in DIR/LANG-SEED")
    flag("--score", type=Path, metavar="DIR/LANG-SEED", help="score what --save kept, with its settings")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    resolve(args)
    source = args.model if args.init == "none" else args.init
    with reading(f"{source} (offline: a folder), --max-length {args.max_length}, {args.device}"):
        encoder, tokenizer = load_encoder(source, args.max_length, args.device)
    data = {}  # all of it first: what is wrong there is told before anything is trained
    for language in args.tgt:
        train = [] if args.score else load(args, tokenizer, language, "train")
        data[language] = train, load(args, tokenizer, language, args.split)
    for folder in [args.save / f"{language}-{seed}" for language in data for seed in args.seeds if args.save]:
        claim(folder, "tuned.json")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with reading(f"--results {args.results}"), open(args.results, "a+", encoding="utf-8") as file:
        file.seek(0)
        kept = map(json.loads, file) if args.resume else []
        earlier = {(line["target"], line["seed"]): line for line in kept if not differences(line, vars(args))}
    lines = []
    for language, (train, test) in data.items():
        words = sum(len(sentence.words) for sentence in train + test)
        gigabytes = words * encoder.config.hidden_size * 4 / 1e9  # of f(x; θp) in float32
        for seed in dict.fromkeys(args.seeds):
            folder = args.save and args.save / f"{language}-{seed}"
            if (language, seed) in earlier and (not folder or (folder / "tuned.json").exists()):
                lines.append(earlier[language, seed])
                continue
            began = time.perf_counter()
            model, tuned = start(args, encoder, len(args.tags), seed)
            fixed = model.on_top and args.tune != "full"
            cached_gb = gigabytes if fixed and gigabytes <= args.cache_gb else 0.0
            if cached_gb and isinstance(test[0].x, list):
                with torch.no_grad():  # θp stays: f(x; θp) is computed once, for all epochs and seeds
                    train, test = model.hoist([train, test])
            if args.score:
                with reading(f"--score {args.score}"):
                    load_parameters(tuned, args.score / "tuned.safetensors")
            else:
                tune(args, model, tuned, train, seed)
            updated = sum(parameter.numel() for parameter in tuned.values())
            parameters = sum(parameter.numel() for part in model.sets() for parameter in part.values())
            line = {"target": language, "seed": seed, **vars(args), **evaluate(model, test, args.tags),
                    "updated": updated, "parameters": parameters, "share": updated / parameters,
                    "train_sentences": len(train), "test_sentences": len(test), "cached_gb": cached_gb,
                    "seconds": time.perf_counter() - began}
            lines.append(line)
            types = " ".join(f"{name} {f1:.2f}" for name, f1 in line["types"].items())
            print(f"{language} seed {seed}: F1 {line['f1']:.2f}  P {line['precision']:.2f}  "
                  f"R {line['recall']:.2f}  ({types})  updated {updated:,} of {parameters:,} "
                  f"({line['share']:.4%})  cached {cached_gb:.2f} GB  {line['seconds']:.1f} s")
            if folder:
                with whole_folder(folder, "tuned.json") as new:
                    save_file(tuned, new / "tuned.safetensors")
                    (new / "tuned.json").write_text(json.dumps(line, indent=2, default=str))
            append(args.results, line)
    if len(lines) > 1:
        columns = dict(F1=("f1", "mean"), std=("f1", "std"), P=("precision", "mean"), R=("recall", "mean"))
        table = pandas.DataFrame(lines).groupby("target", sort=False).agg(**columns, seeds=("seed", "size"))
        print(table.reset_index().to_string(index=False, float_format="%.2f"))


def resolve(args: argparse.Namespace) -> None:
    """Puts into `args` the settings recorded in the folders that --score and --init name."""
    kept, args.priming = {}, None
    if args.score:
        own = {*NO_SAY, "score", "data", "split", "limit_test", "versions", "priming"}
        with reading(f"--score {args.score}"):
            kept = json.loads((args.score / "tuned.json").read_text())
            vars(args).update({key: kept[key] for key in {"tags", *vars(args)} - own}, seeds=[kept["seed"]])
    if args.init != "none":
        with reading(f"--init {args.init}, which prime.py writes"):
            args.priming = json.loads((Path(args.init) / "priming.json").read_text())
            vars(args).update({name: args.priming[name] for name in ("model", "pe", "bottleneck")})
    if args.score and kept.get("priming") != args.priming:
        raise BadInput(f"{args.init} has changed since --score {args.score} was tuned on it: prime it again")


def start(args: argparse.Namespace, encoder: nn.Module, tags: int, seed: int) -> tuple[Tagger, Parameters]:
    """The model before fine-tuning, always with a random head, and the parameters that fine-tuning moves."""
    torch.manual_seed(seed)
    pe = args.pe if args.tune == "adapter" else None
    with reading(f"--pe {pe} (lora: pip install peft), --bottleneck {args.bottleneck}, {args.device}"):
        encoder = copy.deepcopy(encoder)  # the next run starts from the same one
        model = Tagger(encoder, tags, pe, args.bottleneck, args.bf16).to(args.device).eval()
    theta_p, theta_a, theta_h = model.sets()
    for parameter in theta_p.values():
        parameter.requires_grad_(args.tune == "full")
    if pe and args.init != "none":
        with reading(f"--init {args.init}"):
            load_parameters(theta_a, Path(args.init) / "adapter.safetensors")
    return model, {**theta_a, **theta_h, **(theta_p if args.tune == "full" else {})}


def tune(args: Any, model: Tagger, tuned: Parameters, sentences: list[Sentence], seed: int) -> None:
    """Fine-tunes the parameters `tuned`."""
    size, batches, epoch = args.batch_size, [], 0
    while epoch < args.epochs or len(batches) < args.min_steps:
        order = random.Random(f"{seed} {epoch}").sample(sentences, len(sentences))
        batches += [order[begin : begin + size] for begin in range(0, len(order), size)]
        epoch += 1
    optimizer, schedule = adamw(tuned.values(), args.lr, len(batches))
    model.train(args.tune == "full")  # dropout is for plain fine-tuning
    for batch in (bar := tqdm(batches, f"fine-tuning, seed {seed}", unit="step", disable=None)):
        optimizer.zero_grad()
        loss = tag_loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if not loss.isfinite():
            raise BadInput(f"fine-tuning, seed {seed}: the loss is {loss.item()}; lower --lr")
    model.eval()


@torch.no_grad()
def evaluate(model: Tagger, sentences: list[Sentence], tag_names: list[str]) -> dict[str, Any]:
    """The `score` of the model's tags for all words of the sentences; a word that has no piece is O."""
    best = iter(model(sentences).argmax(dim=-1).tolist())
    gold = [[tag_names[tag] for tag in sentence.tags] for sentence in sentences]
    predicted = [["O"] * len(sentence.tags) for sentence in sentences]
    for sentence, tags in zip(sentences, predicted):
        for word in sentence.words:
            tags[word] = tag_names[next(best)]
    return score(gold, predicted)


def score(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Entity-level micro F1, precision and recall, and F1 a type, in percent (seqeval, IOB2, strict)."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    strict = dict(mode="strict", scheme=IOB2, zero_division=0, output_dict=True)
    report = classification_report(gold, predicted, **strict)
    f1, precision, recall = ({name: 100 * float(row[key]) for name, row in report.items()}
                             for key in ("f1-score", "precision", "recall"))
    micro, types = "micro avg", {name: score for name, score in f1.items() if not name.endswith(" avg")}
    return {"f1": f1[micro], "precision": precision[micro], "recall": recall[micro], "types": types}


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line in one write, for processes may share the file; what a full disk cuts off is taken back."""
    data = json.dumps(line, default=str).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        if (written := file.write(data)) < len(data):
            file.truncate(file.tell() - written)
            raise OSError(f"{path}: no space left for the line of this run")


if __name__ == "__main__":
    run(main)
