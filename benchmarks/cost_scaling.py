"""How the cost of a meta step grows with inner steps, tasks and support sentences.

    python benchmarks/cost_scaling.py --model ENCODER --data WIKIANN
    python benchmarks/cost_scaling.py --report

Time and peak memory (beyond what is in use before the step) are ratios to the fine-tuning step on the same
query sentences: medians over the rounds, after one to warm up. The script measures Algorithm 1 with `encode`
and without it, and its MAML loop. Each result is a line of a JSON-lines file; --report draws the last run in
it.
"""

import functools
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime
import report
import step_cost

NAMES = {"encode": "Algorithm 1", "no-encode": "Algorithm 1 without encode", "maml": "MAML loop"}
AXES = {"inner_steps": (1, 5, 20, 50, 200), "tasks": (1, 2, 4, 8), "support": (4, 16, 64, 256)}
LABELS = {"inner_steps": "inner steps S", "tasks": "tasks", "support": "support sentences per task"}
MEASURED = ("axis", "size", "implementation", "time_ratio", "memory_ratio")


def measure(model, corpora, *, rounds, query, longest):
    """A record per axis, size and implementation."""
    theta_p, theta_a, theta_h = model.split_parameters()
    optimizer, scheduler, plain_optimizer = step_cost.make_optimizers(model)
    fine_tuning_step = functools.partial(step_cost.fine_tune_once, model, plain_optimizer)

    def meta_step(tasks, inner_steps, **options):
        meta_training = prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[tasks], loss=adapters.tag_loss,
            optimizer=optimizer, scheduler=scheduler, inner_steps=inner_steps, inner_lr=1e-3, **options)
        for _query_losses in meta_training:
            pass

    options = {"encode": {"encode": model.encode_sets}, "no-encode": {}, "maml": {"maml": True}}
    points = [(axis, size) for axis, axis_sizes in AXES.items() for size in axis_sizes]
    for axis, size in tqdm(points, disable=None):
        sizes = {"inner_steps": 5, "tasks": 2, "support": 16, axis: size}
        inner_steps, tasks, support = sizes.values()
        batches = [
            step_cost.sample_tasks(corpora, tasks=tasks, support=support, query=query, step=step)
            for step in range(rounds + 1)]
        base_time, base_memory = time_and_memory(model, fine_tuning_step, batches)
        for name in NAMES:
            passes = 1 if name == "encode" else inner_steps  # of the encoder over a support set
            if name == "encode" or tasks * (query + passes * support) <= longest:
                step = functools.partial(meta_step, inner_steps=inner_steps, **options[name])
                time, memory = time_and_memory(model, step, batches)
                yield {"axis": axis, "size": size, "implementation": name, "time_ratio": time / base_time,
                       "memory_ratio": memory / base_memory}


def time_and_memory(model, step, batches):
    """Milliseconds, without the first batch, and megabytes."""
    times = [step_cost.milliseconds(step, tasks) for tasks in batches]
    return statistics.median(times[1:]), step_cost.peak_memory(model, step, batches[0])


def print_table(lines):
    cells = {(line["axis"], line["size"], line["implementation"]):
             f"{line['time_ratio']:.2f}; {line['memory_ratio']:.2f}" for line in lines}
    rows = [[f"{LABELS[axis]} = {size}", *(cells.get((axis, size, name), "") for name in NAMES)]
            for axis in AXES for size in AXES[axis]]
    print(report.markdown(["time; memory", *NAMES.values()], rows))


def draw(lines, path):
    pyplot = report.import_pyplot("cost_scaling")
    figure, panels = pyplot.subplots(2, 3, sharex="col", sharey="row", figsize=(6.5, 5), layout="constrained")
    styles = zip(NAMES, ("o-", "^-", "s-"), (report.BLUE, report.GRAY, report.ORANGE))
    for implementation, style, color in styles:
        for column, axis in enumerate(AXES):
            points = {line["size"]: line for line in lines
                      if (line["axis"], line["implementation"]) == (axis, implementation)}
            for row, quantity in zip(panels, ("time_ratio", "memory_ratio")):
                values = [line[quantity] for line in points.values()]
                row[column].plot([*points], values, style, color=color, label=NAMES[implementation])
    for row, quantity, ticks in zip(panels, ("time", "memory"), ((1, 2, 5, 10), (1, 2, 5))):
        row[0].set(yscale="log", ylabel=f"{quantity}, relative\nto fine-tuning")
        row[0].set_yticks(ticks, map(str, ticks))
        for axes in row:
            axes.minorticks_off()
            axes.grid(axis="y", color="0.9")
    for axes, axis in zip(panels[1], AXES):
        axes.set(xscale="log", xlabel=LABELS[axis].replace(" per", "\nper"))
        axes.set_xticks(AXES[axis], map(str, AXES[axis]))
        axes.minorticks_off()
    legend = panels[0][0].get_legend_handles_labels()
    figure.legend(*legend, frameon=False, ncols=3, loc="outside upper center")
    report.save_picture(figure, path)


def main() -> None:
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    add("--query", type=int, default=16, help="query sentences per task")
    add("--rounds", type=int, default=2, help="rounds to time, after one to warm up")
    add("--longest", type=int, default=400,
        help="leave out a step that encodes more than N sentences, except for Algorithm 1 with encode")
    add("--limit-train", type=int, default=5000, help="only the first N sentences of each language")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--results", type=Path, default=report.RESULTS / "cost_scaling.jsonl",
        help="JSON-lines file of the results")
    add("--picture", type=Path, default=Path(__file__).with_suffix(".svg"), help="file to draw to")
    add("--report", action="store_true", help="draw and print the last run in the file, and run nothing")
    args = parser.parse_args()
    if not args.report:
        torch.manual_seed(0)
        model, corpora = step_cost.load(
            args.model, args.data, languages=args.src, limit_train=args.limit_train, device=args.device,
            bf16=False)
        settings = {"rounds": args.rounds, "query": args.query, "longest": args.longest}
        source = {"device": args.device, **report.provenance(args.model, args.data, args.src)}
        for record in measure(model, corpora, **settings):
            report.append_line(args.results, {**record, **settings, **source})
    lines = report.lines_of_last_run(report.read_lines(args.results), MEASURED)
    print_table(lines)
    draw(lines, args.picture)


if __name__ == "__main__":
    adapters.cli(main)
