"""§5.1: how much Algorithm 1 and its MAML loop depend on the inner rate α.

    python benchmarks/inner_lr_sweep.py --model ENCODER --data WIKIANN
    python benchmarks/inner_lr_sweep.py --report

Runs `prime.py` for both methods and every α from 1e-3 to 1, and draws the query loss (mean per task over the
last ten meta steps). Flags that this script does not have go to `prime.py`. A run that stops because its loss
is not finite has diverged. Each result is a line of a JSON-lines file; --report draws the last runs in it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import report

RATES = ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"]
NAMES = {"meta": "Algorithm 1", "maml": "MAML loop"}
MEASURED = ("method", "inner_lr", "query_loss", "commit", "versions")


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, stderr=subprocess.PIPE, text=True)


def query_loss(
    method: str, rate: str, *, model: str, data: str, steps: int, tasks: int, flags: Sequence[str],
    output: Path, run: Callable[[Sequence[str]], Any] = run_command,
) -> float | None:
    """Runs prime.py. Returns its last query losses, as a mean per task; None if it diverged."""
    folder = output / f"{method}-{rate}"
    settings = ["--method", method, "--inner-lr", rate, "--steps", str(steps), "--tasks", str(tasks)]
    inputs = ["--model", model, "--data", data, *flags]
    done = run([sys.executable, str(ROOT / "prime.py"), *inputs, *settings, "--output", str(folder)])
    if done.returncode and "lower --inner-lr" in done.stderr:
        return None
    if done.returncode:
        sys.exit(done.stderr)
    losses = json.loads((folder / "priming.json").read_text(encoding="utf-8"))["last_losses"]
    return sum(losses) / len(losses) / tasks


def sweep(
    *, model: str, data: str, steps: int, tasks: int, flags: Sequence[str], output: Path, results: Path,
    run: Callable[[Sequence[str]], Any] = run_command,
) -> None:
    """Appends a result per method and rate, unless the file has one from the same model, data and flags."""
    source = report.provenance(model, data, ["en", "es"])
    checksums = {name: source[name] for name in ("model_crc32", "data_crc32")}
    for method, rate in ((method, rate) for method in NAMES for rate in RATES):
        key = {"method": method, "inner_lr": rate, "steps": steps, "tasks": tasks, "flags": [*flags]}
        if not any((key | checksums).items() <= line.items() for line in report.read_lines(results)):
            loss = query_loss(
                method, rate, model=model, data=data, steps=steps, tasks=tasks, flags=flags, output=output,
                run=run)
            report.append_line(results, {**key, "query_loss": loss, **source})


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    pyplot = report.import_pyplot("inner_lr_sweep")
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    top = 1.1 * max(line["query_loss"] or 0 for line in lines)
    for (method, name), style, color in zip(NAMES.items(), ("o-", "s-"), (report.BLUE, report.ORANGE)):
        losses = {float(line["inner_lr"]): line["query_loss"] for line in lines if line["method"] == method}
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        axes.plot([*finite], [*finite.values()], style, color=color)
        above = {"xytext": (12, 10), "ha": "right", "color": color, "textcoords": "offset points"}
        for point in [*finite.items()][-1:]:
            axes.annotate(name, point, **above)
        for rate in losses.keys() - finite.keys():
            axes.plot([rate], [top], "x", color=color, ms=9, mew=2)
            axes.annotate("diverged", (rate, top), **above)
    axes.axvline(0.03, color="0.7", zorder=0)
    axes.annotate("the paper's α", (0.03, 0), (5, 6), textcoords="offset points", color="0.4")
    axes.set(xscale="log", xlabel="inner rate α", ylim=(0, 1.15 * top), title="one seed")
    axes.set_xticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    axes.set_ylabel(f"query loss (mean of the last 10\nof {lines[-1]['steps']} steps)")
    report.save_picture(figure, path)


def main() -> None:
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--steps", type=int, default=40, help="meta steps per run")
    add("--tasks", type=int, default=2, help="tasks per meta step")
    add("--output", type=Path, default=Path("primed-inner-lr"), help="folder for the primed encoders")
    add("--results", type=Path, default=report.RESULTS / "inner_lr_sweep.jsonl",
        help="JSON-lines file of the results")
    add("--picture", type=Path, default=Path(__file__).with_suffix(".svg"), help="file to draw to")
    add("--report", action="store_true", help="draw and print the results in the file, and run nothing")
    args, flags = parser.parse_known_args()
    if not args.report:
        sweep(model=args.model, data=args.data, steps=args.steps, tasks=args.tasks, flags=flags,
              output=args.output, results=args.results)
    lines = report.lines_of_last_run(report.read_lines(args.results), MEASURED)
    table = {method: dict.fromkeys(RATES, "–") for method in NAMES}
    for line in lines:
        loss = line["query_loss"]
        table[line["method"]][line["inner_lr"]] = "diverged" if loss is None else f"{loss:.3f}"
    print(report.markdown(["α", *RATES], [[NAMES[method], *row.values()] for method, row in table.items()]))
    draw(lines, args.picture)


if __name__ == "__main__":
    adapters.cli(main)
