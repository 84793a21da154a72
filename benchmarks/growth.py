"""How the cost of a meta step grows with inner steps, tasks and support sentences, as a picture.

    python benchmarks/growth.py --model ENCODER --data WIKIANN

Time and peak memory (beyond what is held before) are ratios to the fine-tuning step on the same query
sentences, of Algorithm 1 with the hoist, without it, and of the MAML loop; medians over the rounds. What
encodes more than --longest sentences a step is left out, but for the hoisted. Needs matplotlib.
"""

import argparse
import functools
import statistics
from pathlib import Path

import step
import torch
from step import prime
from tqdm import tqdm

NAMES = {"hoisted": "Algorithm 1", "looped": "without the hoist", "maml": "MAML loop"}
AXES = {"inner_steps": (1, 5, 20, 50, 200), "tasks": (1, 2, 4, 8), "support": (4, 16, 64, 256)}
LABELS = {"inner_steps": "inner steps S", "tasks": "tasks", "support": "support sentences of a task"}


def measure(model, corpora, args):
    """By axis, way and size: the ratios of time and of memory."""
    theta_p, theta_a, theta_h = sets = model.sets()
    outer = [*sets[0].values(), *sets[1].values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer, 1e-6, 10**9)
    whole, _ = prime.adamw_with_linear_decay([p for part in sets for p in part.values()], 1e-6, 10**9)

    def fine_tune(tasks, inner_steps):
        whole.zero_grad()
        prime.tag_loss(model, [sentence for _, query in tasks for sentence in query]).backward()
        whole.step()

    def meta(tasks, inner_steps, **how):
        for _ in prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[tasks], loss=prime.tag_loss,
            optimizer=optimizer, scheduler=scheduler, inner_steps=inner_steps, inner_lr=1e-3, **how,
        ):
            pass

    ways = {"hoisted": {"encode": model.encode_sets}, "looped": {}, "maml": {"maml": True}}
    found = {}
    for axis, sizes in AXES.items():
        for size in tqdm(sizes, axis, disable=None):
            settings = {"inner_steps": 5, "tasks": 2, "support": 16, axis: size}
            vars(args).update(support=settings["support"])
            batches = [step.draw(corpora, args, k, settings["tasks"]) for k in range(args.rounds + 1)]
            base, memory = costs(model, fine_tune, batches, 0)
            for way, how in ways.items():
                encoded = 1 if way == "hoisted" else settings["inner_steps"]  # times a support set
                sentences = settings["tasks"] * (args.query + encoded * settings["support"])
                if way == "hoisted" or sentences <= args.longest:
                    one = functools.partial(meta, **how)
                    time, peak = costs(model, one, batches, settings["inner_steps"])
                    found[axis, way, size] = time / base, peak / memory
    return found


def costs(model, way, batches, inner_steps):
    """Milliseconds, the first round left out, and megabytes."""
    times = [step.milliseconds(way, tasks, inner_steps) for tasks in batches]
    peak = step.peak(model, lambda tasks: way(tasks, inner_steps), batches[0])
    return statistics.median(times[1:]), peak


def draw(found, picture):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same picture has the same bytes
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 3, sharey="row", figsize=(8, 5), layout="constrained")
    for k, axis in enumerate(AXES):
        for way, color in zip(NAMES, ("#0072b2", "0.5", "#d55e00")):
            points = {size: value for (a, w, size), value in found.items() if (a, w) == (axis, way)}
            for quantity in (0, 1):
                values = [value[quantity] for value in points.values()]
                rows[quantity][k].plot([*points], values, "o-", color=color, label=NAMES[way])
        for row in rows:
            row[k].set(xscale="log", yscale="log", xlabel=LABELS[axis])
            row[k].set_xticks(AXES[axis], map(str, AXES[axis]))
            row[k].minorticks_off()
    rows[0][0].set(ylabel="time / fine-tuning step")
    rows[1][0].set(ylabel="memory / fine-tuning step")
    rows[0][0].legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", default=str(step.ROOT / "demo/encoder"))
    flag("--data", default=str(step.ROOT / "demo/wikiann"))
    flag("--src", nargs="+", default=["en", "es"])
    flag("--rounds", type=int, default=2)
    flag("--longest", type=int, default=400)
    flag("--limit-train", type=int, default=5000)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--picture", type=Path, default=Path(__file__).with_suffix(".svg"))
    parser.set_defaults(seed=0, max_length=128, types=["PER", "ORG", "LOC"], bf16=False, query=16, tasks=2,
                        support=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, corpora = step.load(args)
    found = measure(model, corpora, args)
    print("| | " + " | ".join(NAMES.values()) + " |\n|---|---|---|---|")
    for axis, sizes in AXES.items():
        for size in sizes:
            cells = [found.get((axis, way, size)) for way in NAMES]
            told = " | ".join(f"{cell[0]:.2f}; {cell[1]:.2f}" if cell else "" for cell in cells)
            print(f"| {LABELS[axis]} = {size} | {told} |")
    draw(found, args.picture)


if __name__ == "__main__":
    main()
