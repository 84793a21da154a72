"""Table 1 on the demo, by the two commands; with --rates, AT with and without priming at many rates.

    python benchmarks/demo_table.py                                  # the seven rows for Hindi
    python benchmarks/demo_table.py --rates --tgt hi                 # AT, primed and not: rates × epochs

The settings were chosen on the validation splits: --split validation prints the scores that they were chosen
by. Each call deletes the runs of an earlier one from --output. Prints Markdown tables of mean ± standard
deviation over the seeds of fine-tuning.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import report

DEMO = ["--model", report.DEMO["model"], "--data", report.DEMO["data"]]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
NAMES = {1: "Full FT", 2: "HT", 3: "AT", 4: "Meta Priming → AT", 5: "FT Priming → AT",
         6: "MP [MAML Loop] → AT", 7: "MP [1 Inner Step] → AT"}
PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", 1]}
TUNING = {1: ["--tune", "full", "--lr", 1e-3], 2: ["--tune", "head", "--lr", 3e-2]}
SLOWEST = (6, 1)  # rows to start first


def run_command(script: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr, env=ENVIRONMENT)


def prime_row(row: int, steps: int, output: Path) -> Path:
    folder = output / f"primed-{row}"
    run_command("prime.py", *DEMO, "--steps", steps, *PRIMING[row], "--output", folder)
    return folder


def tune(
    results: Path, targets: Sequence[str], seeds: Sequence[int], split: str, *flags: object
) -> pandas.Series:
    """F1 by target and seed."""
    run_command("finetune.py", "--tgt", *targets, *DEMO, "--split", split, "--seeds", *seeds,
                "--results", results, *flags)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    return pandas.DataFrame(records).set_index(["target", "seed"]).sort_index()["f1"]


def measure_rows(
    output: Path, targets: Sequence[str], seeds: Sequence[int], split: str, *, epochs: int, lr: float,
    steps: int, workers: int,
) -> dict[int, pandas.Series]:
    """F1 by row of Table 1."""
    def measure(row):
        init = prime_row(row, steps, output) if row in PRIMING else "none"
        flags = ["--init", init, "--epochs", epochs, *TUNING.get(row, ["--lr", lr])]
        return tune(output / f"results-{row}", targets, seeds, split, *flags)

    rows = sorted(NAMES, key=lambda row: row not in SLOWEST)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(rows, pool.map(measure, rows)))


def measure_rates(
    output: Path, targets: Sequence[str], seeds: Sequence[int], split: str, *, epochs: Sequence[int],
    rates: Sequence[float], steps: int, workers: int,
) -> dict[tuple[int, int, float], pandas.Series]:
    """F1 by row (3 or 4), epochs and rate."""
    inits = {3: "none", 4: prime_row(4, steps, output)}

    def measure(key):
        row, number, lr = key
        flags = ["--init", inits[row], "--epochs", number, "--lr", lr]
        return tune(output / f"results-{row}-{number}-{lr:g}", targets, seeds, split, *flags)

    keys = [(row, number, lr) for row in inits for number in epochs for lr in rates]
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(keys, pool.map(measure, keys)))


def print_rows(f1: dict[int, pandas.Series], targets: Sequence[str]) -> None:
    """Table 1, and the share of the gap between AT and Full FT that each priming closes."""
    rows = [[f"{row} {NAMES[row]}", *(cell(f1[row][target]) for target in targets)] for row in NAMES]
    mean = {row: values.groupby("target").mean() for row, values in f1.items()}
    for row in PRIMING:
        share = 100 * (mean[row] - mean[3]) / (mean[1] - mean[3])
        rows.append([f"% of the gap that {row} closes", *(f"{share[target]:.0f}" for target in targets)])
    print("\n" + report.markdown(["", *targets], rows))


def print_rates(
    f1: dict[tuple[int, int, float], pandas.Series], targets: Sequence[str], rates: Sequence[float]
) -> None:
    """AT and row 4 at every rate, by number of epochs, and the gain of the best rate over the best rate."""
    for target in targets:
        best, rows = {}, []
        for row, epochs in dict.fromkeys(key[:2] for key in f1):
            columns = [f1[row, epochs, lr][target] for lr in rates]
            best[row, epochs] = max(columns, key=lambda column: column.mean())
            rows.append([NAMES[row], epochs, *map(cell, columns), f"{best[row, epochs].mean():.1f}"])
        print("\n" + report.markdown([target, "epochs", *(f"{lr:g}" for lr in rates), "best"], rows))
        for epochs in dict.fromkeys(epochs for _, epochs in best):
            gain = best[4, epochs] - best[3, epochs]
            print(f"\n{target}, {epochs} epochs, best − best: {cell(gain)}, lowest {gain.min():.1f}")


def cell(f1: pandas.Series) -> str:
    return report.mean_std(f1, digits=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--tgt", nargs="+", default=["hi"], metavar="LANG", help="target languages")
    add("--rates", type=float, nargs="*", metavar="LR",
        help="tune AT, primed and not, at these rates; without values: 1e-3 3e-3 1e-2 3e-2")
    add("--epochs", type=int, nargs="+", default=[10, 30], help="with --rates all of them, else the first")
    add("--lr", type=float, default=1e-2, help="rate of rows 3 to 7")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of fine-tuning")
    add("--steps", type=int, default=400, help="number of meta steps")
    add("--split", choices=["test", "validation"], default="test", help="split to score")
    add("--jobs", type=int, default=2, help="commands to run at a time, with one thread each")
    add("--output", type=Path, default=Path("demo-table"), help="folder for primed encoders and results")
    args = parser.parse_args()
    for folder in [*args.output.glob("results-*"), *args.output.glob("primed-*")]:
        shutil.rmtree(folder)
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    common = args.output, args.tgt, args.seeds, args.split
    options = {"steps": args.steps, "workers": args.jobs}
    if args.rates is None:
        f1 = measure_rows(*common, epochs=args.epochs[0], lr=args.lr, **options)
        print_rows(f1, args.tgt)
    else:
        rates = args.rates or [1e-3, 3e-3, 1e-2, 3e-2]
        f1 = measure_rates(*common, epochs=args.epochs, rates=rates, **options)
        print_rates(f1, args.tgt, rates)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
