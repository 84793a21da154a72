"""PE fine-tuning of a primed or pretrained encoder for target languages, and its score.

`python finetune.py --tgt hi` starts from `primed/`; --tune and --init give every row of Table 1."""

import argparse
import copy
import json
import math
import random
from os.path import relpath
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file, save_file
from seqeval.metrics import classification_report
from tqdm import tqdm

import prime
from adapters import Sentence, Tagger, load_encoder

OF_PRIMED = ("model", "pe", "bottleneck")  # settings that a primed folder brings with it
OF_SAVED = (*OF_PRIMED, "priming", "tune", "types", "max_length", "bf16", "seeds", "weights",
            "epochs", "min_steps", "lr", "batch_size", "limit_train")


def parse_arguments() -> argparse.Namespace:
    """The flags; what the folder of --load or --init records takes the place of their defaults."""
    parser = prime.common_parser(__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--tgt", nargs="+", required=True, metavar="LANG", help="paper: hi af az lt et nl")
    flag("--tune", choices=["adapter", "head", "full"], default="adapter", help="rows 3 to 7, 2, 1")
    flag("--init", default="primed", help="folder of prime.py; none (rows 1 to 3): --model")
    flag("--epochs", type=int, default=10, help="passes over the sentences")
    flag("--min-steps", type=int, default=0, metavar="N", help="more epochs, for N steps at least")
    flag("--lr", type=float, default=3e-3, help="of AdamW, falling to 0")
    flag("--batch-size", type=int, default=16, help="sentences")
    flag("--seeds", type=int, nargs="+", default=[0], help="a run for each")
    flag("--split", choices=["test", "validation"], default="test", help="what is scored")
    flag("--limit-test", type=int, metavar="N", help="first N sentences of what is scored")
    flag("--results", type=Path, default=Path("results"), help="a folder; each run leaves a file")
    flag("--save", type=Path, metavar="DIR", help="keep what is tuned there")
    flag("--load", type=Path, metavar="DIR/LANG-SEED", help="score what --save kept")
    parser.set_defaults(priming=None, weights=None)
    args, recorded = prime.parse(parser), {}
    if args.load:
        with prime.blaming(f"--load {args.load}, which --save writes"):
            kept = json.loads((args.load / "tuned.json").read_text())
            recorded = {name: kept[name] for name in OF_SAVED}
            near = args.load / kept["base"]
            parser.set_defaults(**recorded, init=str(near) if near.is_dir() else kept["init"])
    elif args.init != "none":
        with prime.blaming(f"--init {args.init}, which prime.py writes"):
            priming = json.loads((Path(args.init) / "priming.json").read_text())
            recorded = {name: priming[name] for name in OF_PRIMED}
        parser.set_defaults(**recorded, priming=priming)
    args = prime.parse(parser)
    for name, value in recorded.items():
        if (given := vars(args)[name]) != value:
            parser.error(f"--{name.replace('_', '-')} {given}: {args.load or args.init} has {value}")
    return args


def main() -> None:
    args = parse_arguments()
    encoder, tokenizer, saved = load_base(args)
    data, lines = {}, []  # all data first, to tell what is wrong early
    for language in args.tgt:
        train = [] if args.load else prime.load(args, tokenizer, language, "train")
        data[language] = train, prime.load(args, tokenizer, language, args.split)
    args.results.mkdir(parents=True, exist_ok=True)
    for language, (train, test) in data.items():
        identity = prime.identify(args, [*encoder.parameters(), *saved.values()], train + test)
        if args.tune == "head" or args.tune == "adapter" and args.pe == "adapter":
            with torch.no_grad():  # θp stays: f(x; θp) once for all epochs and seeds
                train, test = prime.build(args, None, encoder, train + test).encode_sets([train, test])
        for seed in dict.fromkeys(args.seeds):
            result = args.results / f"{language}-{seed}-{identity}.json"
            folder = args.save and args.save / f"{language}-{seed}"
            if folder and folder.exists() != result.exists():
                raise prime.BadInput(f"{folder}, {result}: one is there: remove it")
            if result.exists():
                print(f"{language} seed {seed}: done before")
            else:
                model, tuned = start(args, encoder, saved, seed, train + test)
                if not args.load:
                    tune(args, model, tuned, train, seed)
                updated = sum(p.numel() for p in tuned.values())
                parameters = sum(p.numel() for theta in model.sets() for p in theta.values())
                line = {
                    **vars(args), "run": identity, "target": language, "seed": seed, "seeds": [seed],
                    **evaluate(model, test, prime.tag_names(args.types)),
                    "updated": updated, "parameters": parameters, "share": updated / parameters,
                    "train_sentences": len(train), "test_sentences": len(test),
                    "weights": prime.checksum(encoder.parameters()),
                }
                keep(args, line, result, folder, tuned)
            with prime.blaming(result):
                lines.append(json.loads(result.read_text()))
    if len(lines) > 1:
        columns = {"F1": ("f1", "mean"), "std": ("f1", "std"), "seeds": ("seed", "size")}
        table = pandas.DataFrame(lines).groupby("target", sort=False).agg(**columns).reset_index()
        print(table.to_string(index=False, float_format="%.2f", na_rep="-"))


def load_base(args):
    """f, its tokenizer, and what is beside it: θa* of a primed folder, or what --save kept."""
    torch.manual_seed(0)  # for a pooler that is in no file
    base = args.model if args.init == "none" else args.init
    with prime.blaming(f"{base} (offline: a folder), --max-length {args.max_length}"):
        encoder, tokenizer = load_encoder(base, args.max_length)
    if args.load and args.weights != prime.checksum(encoder.parameters()):
        raise prime.BadInput(f"{base} is not what {args.load} was tuned on: give --init")
    saved = {}
    if args.load or args.init != "none" and args.tune == "adapter":
        path = args.load / "tuned.safetensors" if args.load else Path(base) / "adapter.safetensors"
        with prime.blaming(path):
            saved = load_file(path)
    return encoder, tokenizer, saved


def start(args, encoder, saved, seed: int, sentences) -> tuple[Tagger, dict]:
    """The model before fine-tuning, its head random unless saved, and what fine-tuning moves."""
    torch.manual_seed(seed % 2**63)
    pe = args.pe if args.tune == "adapter" else None
    model = prime.build(args, pe, copy.deepcopy(encoder), sentences)
    theta_p, theta_a, theta_h = model.sets()
    for parameter in theta_p.values():
        parameter.requires_grad_(args.tune == "full")
    tuned = {**theta_a, **theta_h, **(theta_p if args.tune == "full" else {})}
    if saved:
        with prime.blaming(args.load or args.init):
            if saved.keys() != (tuned if args.load else theta_a).keys():
                raise ValueError("it holds other parameters than the model has")
            model.load_state_dict(saved, strict=False)
    return model, tuned


def tune(args, model: Tagger, tuned: dict, sentences: list[Sentence], seed: int) -> None:
    """Moves `tuned`, as `theta_p`: without inner steps Algorithm 1 is plain fine-tuning (§5.2)."""
    size, batches, epoch = args.batch_size, [], 0
    while epoch < args.epochs or len(batches) < args.min_steps:
        order = random.Random(f"{seed} {epoch}").sample(sentences, len(sentences))
        batches += [[([], order[begin : begin + size])] for begin in range(0, len(order), size)]
        epoch += 1
    model.train(args.tune == "full")  # dropout is for plain fine-tuning
    optimizer, scheduler = prime.adamw_with_linear_decay(tuned.values(), args.lr, len(batches))
    steps = prime.prime(
        model, theta_p=tuned, theta_a={}, theta_h={}, batches=batches, loss=prime.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_steps=0,
    )
    bar = tqdm(steps, f"fine-tuning, seed {seed}", len(batches), disable=None)
    for (loss,) in bar:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if not math.isfinite(loss):
            raise prime.BadInput(f"fine-tuning, seed {seed}: the loss is {loss}; lower --lr")


@torch.no_grad()
def predict(model: Tagger, sentences: list[Sentence], tags: list[str]) -> list[list[str]]:
    """The model's tags for all words of the sentences; a word that has no piece is O."""
    best = iter(model.eval()(sentences).argmax(dim=-1).tolist())
    return [[tags[next(best)] if first >= 0 else "O" for first in s.first] for s in sentences]


def evaluate(model: Tagger, sentences: list[Sentence], tags: list[str]) -> dict[str, float]:
    """Entity-level micro F1, precision and recall in percent, as CoNLL counts."""
    gold = [[tags[tag] for tag in sentence.tags] for sentence in sentences]
    found = predict(model, sentences, tags)
    report = classification_report(gold, found, zero_division=0, output_dict=True)["micro avg"]
    scores = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {name: 100 * float(report[key]) for name, key in scores.items()}


def keep(args, line, result, folder, tuned):
    """What was tuned in the folder, if there is one; the scores as a file, then on the screen."""
    if folder:
        base = relpath(args.model if args.init == "none" else args.init, folder)
        with prime.replacing(folder) as new:
            new.mkdir(parents=True, exist_ok=True)
            save_file(tuned, new / "tuned.safetensors")
            (new / "tuned.json").write_text(json.dumps({**line, "base": base}, indent=2, default=str))
    with prime.replacing(result) as new:
        new.write_text(json.dumps(line, indent=2, default=str))
    print("{target} seed {seed}: F1 {f1:.2f}  P {precision:.2f}  R {recall:.2f}  "
          "updated {updated:,} of {parameters:,} ({share:.4%})".format(**line))


if __name__ == "__main__":
    prime.run(main)
