"""Searches settings for what is not primed: adapter tuning (AT) and head tuning (HT) on a validation split.

    python benchmarks/baseline_search.py --model ENCODER --data WIKIANN

The encoder is frozen in both, so the sentences are encoded once and each try takes seconds. A try trains for
whole epochs, for at least the number of steps in its column. Results are appended to a JSON-lines file; a try
that is in it is not repeated. Prints all tries and the best setting per method and size, as flags of
finetune.py.
"""

import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import finetune
import report

TYPES = ["PER", "ORG", "LOC"]
PE = {"AT": "adapter", "HT": None}
RATES = {"AT": [1e-3, 3e-3, 1e-2, 3e-2], "HT": [1e-2, 3e-2, 1e-1, 3e-1]}
BATCH_SIZE = 16  # finetune.py's default


def try_setting(encoder, train, validation, *, method, lr, min_steps, seed, device):
    """Tunes a new adapter and head, or a new head, on encoded sentences; F1 is that of finetune.py."""
    torch.manual_seed(seed)
    model = adapters.build_tagger(
        encoder, types=TYPES, pe=PE[method], bottleneck=64, device=device, bf16=False)
    _, theta_a, theta_h = model.split_parameters()
    steps_per_epoch = math.ceil(len(train) / BATCH_SIZE)
    epochs = math.ceil(min_steps / steps_per_epoch)
    began = time.perf_counter()
    finetune.fine_tune(
        model, {**theta_a, **theta_h}, train, epochs=epochs, min_steps=0, batch_size=BATCH_SIZE, lr=lr,
        seed=seed, dropout=False)
    f1 = finetune.evaluate(model, validation, adapters.tag_names(TYPES))["f1"]
    seconds = time.perf_counter() - began
    return {"epochs": epochs, "steps": epochs * steps_per_epoch, "f1": f1, "seconds": round(seconds, 1)}


def search(settings, source, encoder, train, validation, *, steps, device, results):
    """All tries for one number of training sentences. Each record holds `settings` and `source`."""
    source_now = {name: source[name] for name in ("model_crc32", "data_crc32")}
    for method, lr, min_steps in ((m, lr, n) for m in RATES for lr in RATES[m] for n in steps):
        key = {**settings, "method": method, "lr": lr, "min_steps": min_steps}
        if any((key | source_now).items() <= line.items() for line in report.read_lines(results)):
            continue
        outcome = try_setting(
            encoder, train, validation, method=method, lr=lr, min_steps=min_steps, seed=settings["seed"],
            device=device)
        report.append_line(results, {**key, **outcome, **source})
        print(f"{settings['train_size']} sentences, {method}, {lr:g}: {outcome}", file=sys.stderr, flush=True)


def show_tables(lines):
    """F1 by rate and steps, with the real number of steps; then the best per method and size."""
    asked = sorted({line["min_steps"] for line in lines})
    groups, best = {}, {}
    for line in lines:
        group = line["train_size"], line["method"]
        cells = groups.setdefault((*group, line["lr"]), {})
        cells[line["min_steps"]] = f"{line['f1']:.2f} ({line['steps']:,})"
        best[group] = max(best.get(group, line), line, key=lambda line: line["f1"])
    head = ["training sentences", "method", "rate", *(f"F1 at ≥ {steps:,} steps (steps)" for steps in asked)]
    rows = [[f"{size:,}", method, f"{lr:g}", *(cells.get(steps, "–") for steps in asked)]
            for (size, method, lr), cells in groups.items()]
    print(report.markdown(head, rows))
    rows = [[f"{size:,}", method, f"`--lr {line['lr']:g} --epochs {line['epochs']}`", f"{line['f1']:.2f}"]
            for (size, method), line in best.items()]
    print("\n" + report.markdown(["training sentences", "method", "best flags of finetune.py", "F1"], rows))


def main() -> None:
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--language", default="de", help="language to tune and score")
    add("--split", choices=["validation", "test"], default="validation", help="split to score")
    add("--limit-test", type=int, default=3000, help="score only the first N sentences")
    add("--sizes", type=int, nargs="+", default=[200, 5000], help="numbers of training sentences")
    add("--steps", type=int, nargs="+", default=[250, 750, 3000], help="least numbers of steps")
    add("--seed", type=int, default=0, help="seed of adapter, head and order of sentences")
    add("--max-length", type=int, default=128, help="word pieces per sentence")
    add("--device", default="cpu", help="torch device")
    add("--results", type=Path, default=report.RESULTS / "baseline_search.jsonl",
        help="JSON-lines file of all tries")
    args = parser.parse_args()
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    options = {"types": TYPES, "max_length": args.max_length}
    sets = [
        adapters.load_sentences(args.data, args.language, split, tokenizer, limit=limit, **options)
        for split, limit in [(args.split, args.limit_test), *(("train", size) for size in args.sizes)]]
    tagger = adapters.build_tagger(
        encoder, types=TYPES, pe=None, bottleneck=64, device=args.device, bf16=False)
    with torch.no_grad():
        validation, *trains = tagger.encode_sets(sets)
    source = report.provenance(args.model, args.data, [args.language])
    for size, train in zip(args.sizes, trains):
        settings = {
            "language": args.language, "split": args.split, "train_size": size, "seed": args.seed,
            "scored_sentences": len(validation), "max_length": args.max_length}
        search(settings, source, encoder, train, validation, steps=args.steps, device=args.device,
               results=args.results)
    lines = report.read_lines(args.results)
    varying = ("method", "train_size", "lr", "min_steps", "epochs", "steps", "f1", "seconds", "commit",
               "versions")
    show_tables(report.lines_of_last_run(lines, varying))


if __name__ == "__main__":
    adapters.cli(main)
