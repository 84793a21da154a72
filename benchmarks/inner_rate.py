"""§5.1: how much Algorithm 1 and its MAML loop depend on the inner rate α.

    python benchmarks/inner_rate.py --model ENCODER --data WIKIANN

Runs `prime.py` for both methods and every α from 1e-3 to 1, draws the query loss (mean of a task, over the
last ten meta steps) to inner_rate.svg, and prints it. Flags that this script does not know go to `prime.py`.
A run that stops because a loss is not finite is drawn as a cross at the top. The same command goes on where
it was stopped. Needs matplotlib (benchmarks/requirements.txt).
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATES = ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"]
NAMES = {"meta": "Algorithm 1", "maml": "MAML loop"}


def query_loss(method: str, rate: str, args: argparse.Namespace, rest: list[str]) -> float:
    """What a run of prime.py ends with; NaN if it was stopped by a loss that is not finite."""
    output = args.output / f"{method}-{rate}"
    flags = ["--method", method, "--inner-lr", rate, "--steps", args.steps, "--tasks", args.tasks]
    command = [sys.executable, ROOT / "prime.py", *rest, *flags, "--output", output]
    done = subprocess.run([*map(str, command)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        if "lower --inner-lr" not in done.stderr:
            sys.exit(done.stderr)
        print(f"{method}, α = {rate}: {done.stderr.strip().splitlines()[-1]}")
        return math.nan
    losses = json.loads((output / "priming.json").read_text())["last_losses"]
    return sum(losses) / len(losses) / args.tasks


def draw(losses: dict[str, list[float]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "inner_rate"  # the same picture has the same bytes
    from matplotlib import pyplot

    rates = [float(rate) for rate in RATES]
    top = 1.05 * max((x for row in losses.values() for x in row if math.isfinite(x)), default=1)
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for (method, row), color in zip(losses.items(), ("#0072b2", "#d55e00"), strict=True):
        axes.plot(rates, row, "o-", color=color, label=NAMES[method])
        if stopped := [rate for rate, x in zip(rates, row, strict=True) if math.isnan(x)]:
            label = f"{NAMES[method]}, stopped: not finite"
            axes.plot(stopped, [top] * len(stopped), "x", color=color, label=label)
    axes.axvline(0.03, color="0.8", zorder=0, label="the paper's α")
    axes.set(xscale="log", xlabel="inner rate α", ylim=(0, None))
    axes.set(ylabel=f"query loss after {args.steps} meta steps")
    axes.legend(frameon=False)
    figure.savefig(args.picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="meta steps of each run")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("inner_rate"), help="holds the primed folders")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".svg"))
    args, rest = parser.parse_known_args()
    losses = {method: [query_loss(method, rate, args, rest) for rate in RATES] for method in NAMES}
    print("| α | " + " | ".join(RATES) + " |\n|" + "---|" * (len(RATES) + 1))
    for method, row in losses.items():
        print(f"| {NAMES[method]} | " + " | ".join(f"{x:.3f}" for x in row) + " |")
    draw(losses, args)


if __name__ == "__main__":
    main()
