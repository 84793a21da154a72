"""PE fine-tuning of a primed or pretrained encoder for target languages, and its score.
`python finetune.py --tgt hi` starts from `primed/`; --tune and --init give every row of Table 1."""

import copy
import math
import os
import random
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file, save_file
from seqeval.metrics import f1_score, precision_score, recall_score
from tqdm import tqdm

import adapters
from adapters import Sentence, Tagger, expect, load_sentences, read_record, tag_names
from prime import adamw_with_linear_decay

SCORE = ("{target} seed {seed}: F1 {f1:.2f}  P {precision:.2f}  R {recall:.2f}  "
         "updated {updated:,} of {parameters:,} ({share:.4%})")

def parse_arguments():
    parser = adapters.common_parser(
        "Fine-tune an encoder, and score it. If --init is a folder, it determines --model, "
        "--types, --pe and --bottleneck; if it is none, these default to the paper's values. The "
        "defaults of --data and --tgt are always the paper's; all others are ours.")
    add, positive, paper = parser.add_argument, adapters.positive, ["hi", "af", "az", "lt", "et", "nl"]
    add("--tgt", nargs="+", default=paper, metavar="LANG", help="target languages")
    add("--tune", choices=["adapter", "head", "full"], default="adapter",
        help="adapter: θa (see --pe) and θh; head: θh; full: θp and θh")
    add("--init", default="primed", help="folder that prime.py wrote; none: start from --model")
    add("--epochs", type=positive(int), default=10, help="passes over the sentences")
    add("--min-steps", type=positive(int, zero=True), default=0, help="least number of steps")
    add("--lr", type=positive(float), default=3e-3, help="AdamW's rate, which falls to 0")
    add("--batch-size", type=positive(int), default=16, help="sentences per step")
    add("--seeds", type=positive(int, zero=True), nargs="+", default=[0], help="one run for each")
    add("--split", choices=["test", "validation"], default="test", help="split to score")
    add("--limit-test", type=positive(int), help="score only the first N sentences")
    add("--results", type=Path, default=Path("results"), help="folder for one file per run")
    add("--save", type=Path, help="write tuned parameters to SAVE/LANG-SEED")
    args = parser.parse_args()
    args.priming = {} if args.init == "none" else read_record(
        Path(args.init) / "priming.json", check_weights=True)
    for name, default in adapters.MODEL_DEFAULTS.items():
        # a flag takes the primed folder's value, or must agree with it; with --init none it is free
        expected = args.priming.get(name, default)
        value = getattr(args, name, expected)
        expect(value == expected or not args.priming, f"--{name} {value}: {args.init} has {expected}")
        setattr(args, name, value)
    return args

def main() -> None:
    args = parse_arguments()
    pe = args.pe if args.tune == "adapter" else None  # rows 1, 2: θa is empty
    base = args.init if args.priming else args.model
    encoder, tokenizer = adapters.load_encoder(base, args.max_length)
    primed_theta_a = load_file(Path(base) / "adapter.safetensors") if args.priming and pe else {}
    data, options = {}, (tokenizer, args.types, args.max_length)
    for language in args.tgt:
        train = load_sentences(args.data, language, "train", *options, args.limit_train)
        test = load_sentences(args.data, language, args.split, *options, args.limit_test)
        data[language] = train, test
    not_compared = ("model", "init", "data", "device", "tgt", "seeds", "results", "save", "priming")
    common = {n: v for n, v in sorted(vars(args).items()) if n not in not_compared}
    common["primed_weights"] = args.priming.get("files")
    records, runs = [], [*plan_runs(common, args.seeds, data, encoder, args.results, args.save)]
    for settings, result_file, save_folder, done, train, test in runs:
        if done:
            record = read_record(result_file, settings)
        else:
            torch.manual_seed(settings["seed"])
            model = adapters.build_tagger(
                copy.deepcopy(encoder), args.types, pe, args.bottleneck, args.device, args.bf16)
            model.load_state_dict(model.state_dict() | primed_theta_a)
            theta_p, theta_a, theta_h = model.split_parameters()
            tuned = theta_a | theta_h | (theta_p if args.tune == "full" else {})
            for p in theta_p.values():
                p.requires_grad_(args.tune == "full")
            if (pe == "adapter" or args.tune == "head") and test[0].features is None:
                # f is frozen: encode once, in place, as all seeds of a language share the two lists
                train[:], test[:] = model.encode_sets([train, test])
            fine_tune(
                model, tuned, train, epochs=args.epochs, min_steps=args.min_steps, lr=args.lr,
                batch_size=args.batch_size, seed=settings["seed"], dropout=args.tune == "full")
            record = {**vars(args), **settings, **evaluate(model, test, tag_names(args.types))}
            updated = sum(p.numel() for p in tuned.values())
            parameters = sum(p.numel() for p in (theta_p | theta_a | theta_h).values())
            record |= {"updated": updated, "parameters": parameters, "share": updated / parameters}
        with suppress(OSError):  # a closed pipe, a full disk
            print(SCORE.format(**record) + ("  (done before)" if done else ""), flush=True)
        if not done:
            adapters.write_record(result_file, record)
        if save_folder and not done:
            save_tuned(save_folder, settings, record, model, tuned)
        records.append(record)
    if len(records) > 1:
        f1 = pandas.DataFrame(records).groupby("target", sort=False)["f1"]
        table = f1.agg(F1="mean", std="std", seeds="size").reset_index()
        print(table.to_string(index=False, float_format="%.2f", na_rep="-"))

def plan_runs(common, seeds, data, encoder, results: Path, save: Path | None):
    """Yields for each run: settings, result file, folder of --save, whether it is done, sentences.
    Raises an error if a folder is another run's or cannot be written."""
    for parent in filter(None, (results, save)):
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    for language, (train, test) in data.items():
        sizes = {"train_sentences": len(train), "test_sentences": len(test)}
        shared = common | sizes | adapters.fingerprint(encoder, (train, test))
        for seed in dict.fromkeys(seeds):
            settings, name = shared | {"target": language, "seed": seed}, f"{language}-{seed}"
            result = results / f"{name}-{zlib.crc32(repr(settings).encode())}.json"
            folder = save / name if save else None
            saved = None  # the record of this run's saved parameters, if they exist
            # raises an error if the folder is another run's
            if folder and folder.exists():
                saved = adapters.find_run_or_claim(folder, settings, "tuned.json")
            # with --save, a run is done only if its parameters are saved too
            done = result.exists() and bool(saved or not folder)
            yield settings, result, folder, done, train, test

def fine_tune(model, tuned, sentences, *, epochs, min_steps, batch_size, lr, seed, dropout) -> None:
    """Plain fine-tuning of `tuned` by AdamW, for `epochs` or, if that is more, `min_steps`."""
    batches, steps_per_epoch = [], math.ceil(len(sentences) / batch_size)
    for epoch in range(max(epochs, math.ceil(min_steps / steps_per_epoch))):
        order = random.Random(f"{seed} {epoch}").sample(sentences, len(sentences))
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer, scheduler = adamw_with_linear_decay(tuned.values(), lr, len(batches))
    model.train(dropout)
    for batch in tqdm(batches, f"fine-tuning, seed {seed}", disable=None):
        loss = adapters.tag_loss(model, batch)
        expect(loss.isfinite(), f"fine-tuning, seed {seed}: the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

@torch.no_grad()
def predict(model: Tagger, sentences: list[Sentence], tags: list[str]) -> list[list[str]]:
    """The model's tags of all words of the sentences; O for a word without a piece."""
    predicted = iter(model.eval()(sentences).argmax(dim=-1).tolist())
    return [[tags[next(predicted)] if start >= 0 else "O" for start in s.word_starts] for s in sentences]

def evaluate(model: Tagger, sentences: list[Sentence], tags: list[str]) -> dict:
    """Entity-level micro F1, precision and recall in percent, by CoNLL's convention."""
    gold = [[tags[tag] for tag in s.tags] for s in sentences]
    if not any(tag for s in sentences for tag in s.tags):
        print("the scored sentences have no entity, so F1 is 0", file=sys.stderr)
    predicted = predict(model, sentences, tags)
    metrics = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: 100 * float(f(gold, predicted, zero_division=0)) for name, f in metrics.items()}

def save_tuned(folder: Path, settings, record: dict, model: Tagger, tuned) -> None:
    """Claims the folder and writes what examples/load.py reads; tuned.json, last, marks the end."""
    adapters.find_run_or_claim(folder, settings, "tuned.json")
    base = model.encoder.name_or_path
    if os.path.isdir(base):  # relative, so that base and folder can be moved together
        base = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
    with adapters.atomic_write(folder / "tuned.safetensors") as new:
        save_file(tuned, new)
    files = {"base": base, "files": adapters.file_checksums(folder)}
    adapters.write_record(folder / "tuned.json", record | files)

if __name__ == "__main__":
    adapters.cli(main)
