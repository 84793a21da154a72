"""Compares ways of priming on a real encoder: runs over seeds, and tables with paired intervals.

    python benchmarks/experiments.py --model ENCODER --data WIKIANN --priming none meta ft --seeds 0 1 2
    python benchmarks/experiments.py --report

One `prime.py` command per priming and seed makes a primed folder, and `finetune.py` tunes it for every target
and number of training sentences, with the same seed. Each result is a line of results/evidence.jsonl in this
folder: --report needs no run, a result that is in the file is not computed again, and several processes may
run different seeds at the same time.

Results of the same priming and seed share a primed encoder, so they are not independent: intervals are over
seeds, and the mean over targets is taken per seed before.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import report

LORA = ["--pe", "lora"]
STEPS = ["--outer-lr", "2e-4", "--steps", "300"]
PRIMING = {  # flags of prime.py; None: no priming
    "none": None,  # AT
    "none-head": None,  # HT
    "full": None,
    "none-bitfit": None,
    "meta": [*STEPS, "--inner-lr", "0.3"],
    "paper-alpha": [*STEPS],
    "ft": [*STEPS, "--method", "ft"],
    "maml": [*STEPS, "--method", "maml"],
    "one-step": [*STEPS, "--inner-lr", "0.3", "--inner-steps", "1"],
    "fifty-steps": [*STEPS, "--inner-steps", "50"],
    "ft-5e-4": ["--method", "ft", "--outer-lr", "5e-4", "--steps", "300"],
    "ft-1e-4": ["--method", "ft", "--outer-lr", "1e-4", "--steps", "300"],
    "ft-1000": ["--method", "ft", "--outer-lr", "2e-4", "--steps", "1000"],
    "meta-5e-4": ["--inner-lr", "0.3", "--outer-lr", "5e-4", "--steps", "300"],
    "meta-1e-4": ["--inner-lr", "0.3", "--outer-lr", "1e-4", "--steps", "300"],
    "one-step-1000": ["--inner-lr", "0.3", "--inner-steps", "1", "--outer-lr", "2e-4", "--steps", "1000"],
    "meta-1000": ["--inner-lr", "0.3", "--outer-lr", "2e-4", "--steps", "1000"],
    "ft-half": [*STEPS, "--method", "ft", "--support", "8", "--query", "8"],  # as many as in line 9
    "new-heads": [*STEPS, "--inner-lr", "0.3"],
    "meta-bf16": [*STEPS, "--inner-lr", "0.3", "--bf16"],
    "meta-bitfit": [*STEPS, "--pe", "bitfit"],
    "ft-bitfit": [*STEPS, "--method", "ft", "--pe", "bitfit"],
    "joint": [*STEPS],
    "lora-none": None,
    "lora-ft": [*STEPS, "--method", "ft", *LORA],
    "lora-meta": [*STEPS, "--inner-lr", "0.1", *LORA],
    "lora-joint": [*STEPS, *LORA],
    "lora-meta-0.03": [*STEPS, "--inner-lr", "0.03", *LORA],
    "lora-meta-0.3": [*STEPS, "--inner-lr", "0.3", *LORA],
}
SCRIPTS = {  # for the primings that prime.py does not offer
    "new-heads": "benchmarks/ablate_new_heads.py",
    "joint": "benchmarks/joint_priming.py",
    "lora-joint": "benchmarks/joint_priming.py",
}
TUNING = {  # flags of finetune.py by number of training sentences; None: any other number
    # none and none-head: found by baseline_search.py
    "none": {50: "--min-steps 250", 200: "--min-steps 250", 400: "--min-steps 250 --lr 1e-2",
             1000: "--min-steps 750 --lr 1e-2", None: "--min-steps 750"},
    "none-head": {200: "--min-steps 750 --tune head --lr 1e-2", 5000: "--epochs 3 --tune head --lr 1e-1",
                  None: "--min-steps 750 --tune head --lr 3e-2"},
    "full": {None: "--tune full --lr 5e-5 --epochs 3 --min-steps 750"},
    "none-bitfit": {None: "--pe bitfit --min-steps 750"},
    "meta-bf16": {None: "--bf16"},
    **dict.fromkeys(  # the best of 1e-3, 3e-3 and, for lora-none, 1e-2, on German
        ["lora-none", "lora-meta"],
        {200: "--pe lora --min-steps 250 --lr 3e-3", None: "--pe lora --epochs 3 --min-steps 750 --lr 1e-3"}),
    **dict.fromkeys(
        ["lora-ft", "lora-joint", "lora-meta-0.03", "lora-meta-0.3"],
        {200: "--pe lora --min-steps 250 --lr 1e-3", None: "--pe lora --epochs 3 --min-steps 750 --lr 1e-3"}),
}
PAIRS = [
    ("meta", "ft"), ("meta", "maml"), ("meta", "one-step"), ("meta", "paper-alpha"), ("paper-alpha", "maml"),
    ("meta", "none"),
    ("ft", "none"), ("one-step", "ft"), ("ft", "ft-half"), ("meta", "new-heads"), ("meta", "meta-bf16"),
    ("meta-1000", "ft-1000"), ("meta-1000", "one-step-1000"), ("one-step-1000", "ft-1000"),
    ("meta-1000", "meta"), ("ft-1000", "ft"), ("meta", "ft-1000"), ("meta-bitfit", "none-bitfit"),
    ("ft-bitfit", "none-bitfit"), ("meta-bitfit", "ft-bitfit"),
    ("lora-meta", "lora-none"), ("lora-ft", "lora-none"), ("lora-meta", "lora-ft"),
    ("joint", "ft"), ("one-step", "joint"), ("meta", "joint"), ("lora-joint", "lora-ft"),
    ("lora-meta", "lora-joint")]
SECOND_PAIRS = [(("meta", "ft"), ("meta-1000", "ft-1000"))]  # differences of differences
SHARES = ("meta", "ft", "maml", "one-step", "meta-1000", "ft-1000", "one-step-1000")
KEPT = ("target", "seed", "split", "train_sentences", "test_sentences", "lr", "epochs", "min_steps", "f1")
LANGUAGES = {
    "nl": "Dutch", "ru": "Russian", "de": "German", "hi": "Hindi", "af": "Afrikaans", "et": "Estonian"}


def run_command(script: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("+", " ".join(command[1:]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"{script} failed")


def tuning_flags(priming: str, train_size: int) -> list[str]:
    """The flags of finetune.py for a priming, if it does not use that command's defaults."""
    by_size = TUNING.get(priming, {})
    return by_size.get(train_size, by_size.get(None, "")).split()


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of the results file, with `train_size` for its key `asked`, and `none-head` for head tuning,
    which older lines call `none` with `--tune head`. Older lines with LoRA omit flags of finetune.py that
    were the defaults of a script."""
    lines = report.read_lines(path)
    for line in lines:
        line["train_size"] = line["asked"]
        if line["priming"] == "none" and "--tune head" in line["tuning"]:
            line["priming"] = "none-head"
        if line["priming"].startswith("lora") and "--pe lora" not in line["tuning"]:
            default_lr = "" if "--lr" in line["tuning"] else " --lr 1e-3"
            line["tuning"] = f"--pe lora {line['tuning']}{default_lr}"
    return lines


def run_experiments(
    priming: str, seed: int, *, model: str, data: str, targets: Sequence[str], sizes: Sequence[int],
    split: str, limit_test: int, more_tuning: Sequence[str], output: Path, results: Path,
    run: Callable[..., None] = run_command,
) -> None:
    """Primes, unless no result is missing, and tunes for each target and size of which there is none yet."""
    folder = output / f"{priming}-{seed}"
    start = ["--init", folder] if PRIMING[priming] else ["--init", "none", "--model", model]
    output.mkdir(parents=True, exist_ok=True)
    for target, size in ((target, size) for target in targets for size in sizes):
        tuning = [*tuning_flags(priming, size), *more_tuning]
        key = {"priming": priming, "tuning": " ".join(tuning), "split": split, "seed": seed}
        wanted = {**key, "target": target, "train_size": size}
        if any(wanted.items() <= line.items() for line in read_results(results)):
            print(f"{priming}, seed {seed}, {target}, {size} sentences: in {results} already")
            continue
        if PRIMING[priming] and not (folder / "priming.json").exists():
            flags = ["--model", model, "--data", data, *PRIMING[priming], "--seed", seed, "--output", folder]
            run(SCRIPTS.get(priming, "prime.py"), *flags, "--save-every", 10**6)
        written = output / f"{priming}-{seed}-{target}-{size}-{split}"
        shutil.rmtree(written, ignore_errors=True)
        run("finetune.py", "--tgt", target, "--data", data, *start, "--limit-train", size, "--limit-test",
            limit_test, "--split", split, *tuning, "--seeds", seed, "--results", written)
        (path,) = written.glob("*.json")
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: record[name] for name in KEPT}
        source = report.provenance(model, data, ["en", "es", target])
        report.append_line(results, {**key, "asked": size, "prime": PRIMING[priming], **kept, **source})


def f1_table(lines: Sequence[dict[str, Any]], split: str, targets: Sequence[str]) -> pandas.Series:
    """F1 by priming, tuning, target, train_size and seed. The tuning is "" for the default of `TUNING`. If a
    run was repeated, its last line counts."""
    keys = ["priming", "tuning", "target", "train_size", "seed"]
    frame = pandas.DataFrame(line for line in lines if line["split"] == split and line["target"] in targets)
    if frame.empty:
        raise adapters.UserError(f"there are no results for {' '.join(targets)} on the {split} split")
    default = [" ".join(tuning_flags(*pair)) for pair in zip(frame["priming"], frame["train_size"])]
    frame["tuning"] = frame["tuning"].mask(frame["tuning"] == default, "")
    return frame.drop_duplicates(keys, keep="last").set_index(keys)["f1"]


def default_tuning_only(f1: pandas.Series) -> pandas.DataFrame:
    """A column per priming; rows by train_size, target and seed."""
    columns = f1.xs("", level="tuning").unstack("priming")
    return columns.reorder_levels(["train_size", "target", "seed"]).sort_index()


def with_mean_of_targets(columns: pandas.DataFrame) -> pandas.DataFrame:
    """Adds the target "mean": for each seed the mean over the targets, if it has all of them."""
    targets = columns.index.unique("target")
    per_seed = columns.groupby(level=["train_size", "seed"])
    mean = per_seed.agg(lambda column: column.mean() if column.count() == len(targets) else None)
    mean = pandas.concat({"mean": mean}, names=["target"]).reorder_levels(columns.index.names)
    return pandas.concat([columns, mean])


def paired_differences(columns: pandas.DataFrame) -> pandas.DataFrame:
    """Differences between primings, seed by seed, and differences of such differences."""
    differences = {}
    for pair in PAIRS:
        if {*pair} <= {*columns}:
            differences[" − ".join(pair)] = columns[pair[0]] - columns[pair[1]]
    for first, second in SECOND_PAIRS:
        first, second = " − ".join(first), " − ".join(second)
        if {first, second} <= {*differences}:
            differences[f"({first}) − ({second})"] = differences[first] - differences[second]
    return pandas.DataFrame(differences).rename_axis(columns="difference")


def gap_shares(columns: pandas.DataFrame) -> pandas.DataFrame:
    """Percent of the gap from AT to full fine-tuning that each priming closes, per seed. The ends of the gap
    are means over seeds, because a gap of one seed has the noise of three runs."""
    means = columns.groupby(level=["train_size", "target"]).mean()
    primed = columns[[name for name in SHARES if name in columns]]
    levels = columns.index.droplevel("seed")
    low, high = (means[name].reindex(levels).set_axis(columns.index) for name in ("none", "full"))
    return 100 * primed.sub(low, axis=0).div(high - low, axis=0)


def wide(values: pandas.DataFrame, name: str, cell: Callable[[pandas.Series], str]) -> pandas.DataFrame:
    """A cell of text per column of `values`, train_size and target, over the seeds; targets as columns."""
    stacked = values.rename_axis(columns=name).stack().dropna()
    cells = stacked.groupby(level=[name, "train_size", "target"], sort=False).agg(cell)
    table = cells.unstack("target").rename_axis(index={"train_size": "training sentences"})
    return table[[*table.columns.drop("mean"), "mean"]] if "mean" in table else table


def with_count(f1: pandas.Series) -> str:
    return f"{report.mean_std(f1)} ({len(f1)})"


def print_tables(f1: pandas.Series, split: str) -> None:
    cells = f1.groupby(level=["priming", "tuning", "target", "train_size"]).agg(with_count)
    cells = cells.unstack(["target", "train_size"]).sort_index(axis=1)
    show(f"F1 on {split}, mean ± standard deviation (seeds)", report.markdown_frame(cells))
    settings = [
        (priming, "any other" if size is None and len(by_size) > 1 else size or "all", f"`{flags}`")
        for priming, by_size in TUNING.items() if priming in cells.index.unique("priming")
        for size, flags in by_size.items()]
    head = ["priming", "training sentences", "flags of finetune.py"]
    show("Tuning, where it is not that of finetune.py's defaults", report.markdown(head, settings))
    columns = with_mean_of_targets(default_tuning_only(f1))
    differences = paired_differences(columns)
    if f1.index.unique("seed").size > 1 and len(differences.columns):
        table = wide(differences, "difference", report.interval_text)
        show("Paired differences, 95 % interval of Student's t (seeds)", report.markdown_frame(table))
    if {"none", "full"} <= {*columns}:
        table = wide(gap_shares(columns), "priming", lambda s: f"{report.mean_std(s, 1)} ({len(s)})")
        title = "Percent of the gap from AT to full fine-tuning that priming closes"
        show(f"{title}, mean ± standard deviation (seeds)", report.markdown_frame(table))


def show(title: str, table: str) -> None:
    print(f"\n{title}:\n\n{table}")


def draw(columns: pandas.DataFrame, targets: Sequence[str], path: Path) -> None:
    """Above, F1 by number of training sentences; below, Algorithm 1 − FT priming with its 95 % interval."""
    if not {"meta", "ft"} <= {*columns}:
        raise adapters.UserError("--picture needs results of --priming meta and ft")
    pyplot = report.import_pyplot("experiments")
    figure, (f1_panels, difference_panels) = pyplot.subplots(
        2, len(targets), sharex=True, sharey="row", squeeze=False, figsize=(6.5, 5.5), layout="constrained",
        height_ratios=[2, 1])
    for axes, target in zip(f1_panels, targets):
        draw_f1(axes, columns.xs(target, level="target"))
        axes.set_title(LANGUAGES.get(target, target))
    f1_panels[0].set_ylabel("F1")
    difference = (columns["meta"] - columns["ft"]).dropna()
    for axes, target in zip(difference_panels, targets):
        sizes = difference.xs(target, level="target").groupby(level="train_size")
        means, halves = zip(*sizes.agg(report.paired_interval))
        axes.axhline(0, color="0.7", zorder=0)
        axes.errorbar([*sizes.groups], means, halves, fmt="o", color=report.BLUE, capsize=4)
        axes.set(xscale="log", xlabel="training sentences")
        ticks = columns.index.unique("train_size")
        axes.set_xticks(ticks, [f"{n // 1000}k" if n >= 1000 else n for n in ticks])
        axes.minorticks_off()
    difference_panels[0].set_ylabel("Algorithm 1 −\nFT priming")
    report.save_picture(figure, path)


def draw_f1(axes: Any, columns: pandas.DataFrame) -> None:
    """Means over seeds as lines, full fine-tuning as points, and seeds as dots. Labels stand at the lines."""
    below, right_below = {"xytext": (8, -18), "ha": "left"}, {"xytext": (8, -10), "ha": "left"}
    for priming, label, style, color, at, position in (
        ("meta", "Algorithm 1", "o-", report.BLUE, 0, below),
        ("ft", "FT priming", "s-", report.ORANGE, -1, {"xytext": (6, -28), "ha": "right"}),
        ("none", "AT, not primed", "^-", report.GRAY, 1, right_below),
        ("full", "Full FT", "D", report.BLACK, -1, {"xytext": (-8, -3), "ha": "right"}),
    ):
        seeds = columns[priming].dropna() if priming in columns else pandas.Series(dtype=float)
        if len(seeds):
            mean = seeds.groupby(level="train_size").mean()
            axes.plot(seeds.index.get_level_values("train_size"), seeds, ".", color=color, alpha=0.5)
            axes.plot(mean.index, mean, style, color=color)
            point = min(at, len(mean) - 1)
            axes.annotate(label, (mean.index[point], mean.iloc[point]), textcoords="offset points",
                          color=color, **position)


def main() -> None:
    parser = report.make_parser(__doc__, report.HUB)
    add = parser.add_argument
    add("--priming", nargs="+", choices=[*PRIMING], default=["none", "meta", "ft"], metavar="PRIMING",
        help=f"ways of priming to run, of {', '.join(PRIMING)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, each of priming and of fine-tuning")
    add("--tgt", nargs="+", default=["nl", "ru"], metavar="LANG", help="target languages")
    add("--sizes", type=int, nargs="+", default=[200, 5000], help="numbers of training sentences")
    add("--split", choices=["test", "validation"], default="test", help="split to score")
    add("--limit-test", type=int, default=3000, help="score only the first N sentences")
    add("--tuning", nargs="...", default=[],
        help="as the last flag: more flags of finetune.py, such as --tuning --lr 1e-2")
    add("--output", type=Path, default=ROOT / "primed-experiments", help="folder for the primed encoders")
    add("--results", type=Path, default=report.RESULTS / "evidence.jsonl",
        help="JSON-lines file of the results")
    add("--report", action="store_true", help="print the tables, and run nothing")
    add("--picture", type=Path, help="with --report: draw the results to this file")
    args = parser.parse_args()
    if args.report:
        f1 = f1_table(read_results(args.results), args.split, args.tgt)
        print_tables(f1, args.split)
        if args.picture:
            draw(default_tuning_only(f1), args.tgt, args.picture)
        return
    for seed in args.seeds:
        for priming in args.priming:
            run_experiments(
                priming, seed, model=args.model, data=args.data, targets=args.tgt, sizes=args.sizes,
                split=args.split, limit_test=args.limit_test, more_tuning=args.tuning, output=args.output,
                results=args.results)


if __name__ == "__main__":
    adapters.cli(main)
