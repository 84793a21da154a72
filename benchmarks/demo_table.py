"""Table 1 on the demo, by the commands that a user would type; with --rates, priming at many rates.

    python benchmarks/demo_table.py                                  # the seven rows for Hindi
    python benchmarks/demo_table.py --rates --tgt hi                 # AT, primed and not: rate × epochs

Settings were chosen on the validation splits: --split validation prints what they were chosen by. What the
runs leave is in --output, which each call begins anew. Prints Markdown: mean ± standard deviation of the
seeds of fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
DEMO = ["--model", ROOT / "demo/encoder", "--data", ROOT / "demo/wikiann"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
NAMES = {1: "Full FT", 2: "HT", 3: "AT", 4: "Meta Priming → AT", 5: "FT Priming → AT",
         6: "MP [MAML Loop] → AT", 7: "MP [1 Inner Step] → AT"}
PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", 1]}
TUNING = {1: ["--tune", "full", "--lr", 1e-3], 2: ["--tune", "head", "--lr", 3e-2]}


def run(script: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr, env=ENVIRONMENT)


def prime(args: argparse.Namespace, row: int) -> Path:
    folder = args.output / f"primed-{row}"
    run("prime.py", *DEMO, "--steps", args.steps, *PRIMING[row], "--output", folder)
    return folder


def tune(args: argparse.Namespace, name: object, *flags: object) -> pandas.Series:
    """F1 of every target and seed."""
    results = args.output / f"results-{name}"
    run("finetune.py", "--tgt", *args.tgt, *DEMO, "--split", args.split, "--seeds", *args.seeds,
        "--results", results, *flags)
    lines = [json.loads(path.read_text()) for path in results.glob("*.json")]
    return pandas.DataFrame(lines).set_index(["target", "seed"]).sort_index()["f1"]


def rows(args: argparse.Namespace) -> None:
    """The table of all seven rows."""
    def measure(row: int) -> pandas.Series:
        init = prime(args, row) if row in PRIMING else "none"
        flags = TUNING.get(row, ["--lr", args.lr])
        return tune(args, row, "--init", init, "--epochs", args.epochs[0], *flags)

    order = sorted(NAMES, key=lambda row: row not in (6, 1))  # what takes longest first
    with ThreadPoolExecutor(args.jobs) as pool:
        scores = dict(zip(order, pool.map(measure, order)))
    print(f"\n| | {' | '.join(args.tgt)} |\n|{'---|' * (len(args.tgt) + 1)}")
    for row in NAMES:
        print(f"| {row} {NAMES[row]} | {' | '.join(cell(scores[row][target]) for target in args.tgt)} |")
    mean = {row: f1.groupby("target").mean() for row, f1 in scores.items()}
    for row in PRIMING:
        share = 100 * (mean[row] - mean[3]) / (mean[1] - mean[3])
        cells = " | ".join(f"{share[target]:.0f}" for target in args.tgt)
        print(f"| % of the gap that {row} closes | {cells} |")


def rates(args: argparse.Namespace) -> None:
    """AT with priming and without it, at every rate; the best of the one against the best of the other."""
    inits = {"AT": "none", "Meta Priming → AT": prime(args, 4)}
    runs = [(name, epochs, lr) for name in inits for epochs in args.epochs for lr in args.rates]

    def measure(run: tuple[str, int, float]) -> pandas.Series:
        name, epochs, lr = run
        return tune(args, runs.index(run), "--init", inits[name], "--epochs", epochs, "--lr", lr)

    with ThreadPoolExecutor(args.jobs) as pool:
        scores = dict(zip(runs, pool.map(measure, runs)))
    table = pandas.DataFrame(scores)
    for target in args.tgt:
        print(f"\n| {target} | epochs | {' | '.join(f'{lr:g}' for lr in args.rates)} | best |")
        print("|" + "---|" * (len(args.rates) + 3))
        f1, best = table.loc[target], {}
        for name, epochs in dict.fromkeys(column[:2] for column in f1):
            columns = [f1[name, epochs, lr] for lr in args.rates]
            best[name, epochs] = max(columns, key=lambda column: column.mean())
            cells = " | ".join(map(cell, columns))
            print(f"| {name} | {epochs} | {cells} | {best[name, epochs].mean():.1f} |")
        for epochs in args.epochs:
            gain = best["Meta Priming → AT", epochs] - best["AT", epochs]
            print(f"\n{target}, {epochs} epochs, best against best: {cell(gain)}, at least {gain.min():.1f}")


def cell(seeds: pandas.Series) -> str:
    return f"{seeds.mean():.1f} ± {seeds.std():.1f}" if len(seeds) > 1 else f"{seeds.mean():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--tgt", nargs="+", default=["hi"], metavar="LANG")
    flag("--rates", type=float, nargs="*", metavar="LR", help="AT, at these or 1e-3 3e-3 1e-2 3e-2")
    flag("--epochs", type=int, nargs="+", default=[10, 30], help="with --rates each of them, else the first")
    flag("--lr", type=float, default=1e-2, help="of rows 3 to 7")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of fine-tuning")
    flag("--steps", type=int, default=400, help="meta steps")
    flag("--split", choices=["test", "validation"], default="test")
    flag("--jobs", type=int, default=2, help="commands at a time, of one thread each")
    flag("--output", type=Path, default=Path("demo-table"), help="folder for what the runs leave")
    args = parser.parse_args()
    for mark in [*args.output.glob("results-*"), *args.output.glob("primed-*")]:  # of an earlier call
        shutil.rmtree(mark)
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if args.rates is None:
        rows(args)
    else:
        args.rates = args.rates or [1e-3, 3e-3, 1e-2, 3e-2]
        rates(args)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
