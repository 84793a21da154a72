"""Table 1: its seven settings, and one more, × targets × seeds, by the commands that a user would type.

    python benchmarks/table1.py --model ENCODER --data WIKIANN --tgt nl hi af et

Without flags it takes mBERT and the whole of WikiAnn from the hub, as the paper does. A seed is that of
priming and of fine-tuning alike. What is done is not done again: stop it and start it again with the same
flags, or more targets, rows or seeds. A second process may do other rows into the same --output meanwhile; a
last call with all rows prints all.

Prints mean ± standard deviation over the seeds; for each priming the share of the gap between AT (row 3) and
Full FT (row 1) that it closes, the two ends being means over the seeds; and differences between rows, seed by
seed. The mean is that of the targets' values. What has no ± is of the first seed alone. Draws the shares,
with the seeds as dots (matplotlib, in benchmarks/requirements.txt).
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prime

# row 8 is not in the paper, which could not afford it
NAMES = {1: "Full FT", 2: "HT", 3: "AT", 4: "Meta Priming → AT", 5: "FT Priming → AT",
         6: "MP [MAML Loop] → AT", 7: "MP [1 Inner Step] → AT", 8: "MP [50 Inner Steps] → AT"}
PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", "1"],
           8: ["--inner-steps", "50"]}
TYPES = ["PER", "ORG", "LOC"]
DIFFERENCES = [(4, 3), (4, 5), (4, 6), (4, 7), (8, 3), (8, 4), (8, 5)]
FEW = ["--min-steps", "750"]  # on 400 sentences settings without priming gain by it, row 4 loses
TUNING = {1: ["--tune", "full", "--lr", "5e-5", "--epochs", "3", *FEW],
          2: ["--tune", "head", "--lr", "3e-2", *FEW], 3: FEW}


def run(script: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("$", *command, file=sys.stderr, flush=True)
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if status:
        sys.exit(status)
    print(f"# {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def measure(row: int, args: argparse.Namespace) -> list[dict]:
    """The lines of `finetune.py` for a row, by target, seed and split; does what is not done yet."""
    folder, data, model = args.output / f"row-{row}", ["--data", args.data], ["--model", args.model]
    official, distinct = folder / "official", folder / "distinct"
    limits = [word for name in ("train", "test") if (limit := vars(args)[f"limit_{name}"])
              for word in (f"--limit-{name}", limit)]
    keep = ["--save", folder / "tuned"] if args.distinct else []
    seeds = args.seeds[:1] if row in args.one_seed else args.seeds
    inits = {folder / f"primed-{seed}": [seed] for seed in seeds} if row in PRIMING else {"none": seeds}
    for init, of_init in inits.items():
        if not found(official).keys() >= {(target, seed) for target in args.tgt for seed in of_init}:
            if row in PRIMING:
                run("prime.py", "--src", *args.src, *model, *data, "--steps", args.steps,
                    "--outer-lr", args.outer_lr, *PRIMING[row], "--seed", *of_init, "--output", init)
            base = ["--init", init] if row in PRIMING else ["--init", "none", *model]
            run("finetune.py", "--tgt", *args.tgt, *base, *data, *TUNING.get(row, []), *limits,
                "--seeds", *of_init, *keep, "--results", official)
        for target in args.distinct if seeds[0] in of_init else []:
            if (target, seeds[0]) not in found(distinct):
                run("finetune.py", "--tgt", target, "--data", args.output / "distinct",
                    "--load", folder / "tuned" / f"{target}-{seeds[0]}", "--results", distinct)
    return [{**line, "row": row, "split": path.name} for path in (official, distinct)
            for (target, seed), line in found(path).items() if target in args.tgt and seed in seeds]


def found(results: Path) -> dict[tuple[str, int], dict]:
    """What runs left in a folder of results."""
    lines = [json.loads(path.read_text()) for path in results.glob("*.json")]
    return {(line["target"], line["seed"]): line for line in lines}


def write_distinct(target: str, args: argparse.Namespace) -> None:
    """Writes the test split without the sentences that the training split has too, in a folder of data."""
    train = prime.read_split(args.data, target, "train", TYPES)[: args.limit_train]
    test = prime.read_split(args.data, target, "test", TYPES)[: args.limit_test]
    known, tags = {tuple(words) for words, _ in train}, prime.tag_names(TYPES)
    rows = [row for row in test if tuple(row[0]) not in known]
    sentences = ["".join(f"{word}\t{tags[tag]}\n" for word, tag in zip(*row, strict=True)) for row in rows]
    folder = args.output / "distinct" / target
    folder.mkdir(parents=True, exist_ok=True)
    with prime.replacing(folder / "test.txt") as new:
        new.write_text("\n".join(sentences), encoding="utf-8")
    print(f"{target}: {len(test) - len(rows)} of {len(test)} test sentences are training sentences too")


def print_table(title: str, values: pandas.DataFrame, targets: list[str], form: str = ".2f") -> None:
    """A line for each column of `values`: over the seeds, for each target and for the mean of the targets."""
    groups = {target: values.loc[target] for target in targets if target in values.index}
    groups["mean"] = values.groupby("seed").mean()
    print(f"\n| {title} | {' | '.join(groups)} |\n|{'---|' * (len(groups) + 1)}")
    for name in values:
        cells = []
        for seeds in (group[name].dropna() for group in groups.values()):
            cells.append(f"{seeds.mean():{form}}" + (f" ± {seeds.std():{form}}" if len(seeds) > 1 else ""))
        print(f"| {name} | {' | '.join(cells)} |")


def draw(shares: pandas.DataFrame, targets: list[str], picture: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{picture} needs matplotlib: python -m pip install -r benchmarks/requirements.txt")

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "table1"  # the same picture has the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    width = 0.8 / len(shares.columns)
    for i, name in enumerate(shares):
        seeds = [shares[name].loc[target].dropna() for target in targets]
        places = [place + (i - (len(shares.columns) - 1) / 2) * width for place in range(len(targets))]
        bars = axes.bar(places, [column.mean() for column in seeds], 0.9 * width, alpha=0.5, label=name)
        for place, column in zip(places, seeds, strict=True):
            axes.plot([place] * len(column), column, ".", color=bars[0].get_facecolor()[:3])
    axes.set(ylabel="gap between AT and Full FT closed, %")
    axes.set_xticks(range(len(targets)), targets)
    figure.legend(frameon=False, ncols=2, loc="outside upper center")
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased")
    flag("--data", default="unimelb-nlp/wikiann")
    flag("--src", nargs="+", default=["en", "es"])
    flag("--tgt", nargs="+", default=["hi", "af", "az", "lt", "et", "nl"])
    flag("--rows", type=int, nargs="+", choices=[*NAMES], default=[*NAMES])
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag("--one-seed", type=int, nargs="*", choices=[*NAMES], default=[], metavar="ROW",
         help="rows for which the first seed must do")
    flag("--steps", type=int, default=1000, help="meta steps")
    flag("--outer-lr", type=float, default=5e-5)
    flag("--limit-train", type=int, metavar="N", help="sentences of each target's training split")
    flag("--limit-test", type=int, metavar="N")
    flag("--distinct", nargs="*", default=[], metavar="LANG",
         help="targets to score, with the first seed, also without the test sentences that are training "
         "sentences; all that is tuned is kept for it in --output")
    flag("--output", type=Path, default=Path("table1"), help="folder for what is primed, tuned and found")
    flag("--picture", type=Path, help="default: table1.svg in --output")
    args = prime.parse(parser)
    if not {*args.distinct} <= {*args.tgt}:
        parser.error(f"--distinct {' '.join(args.distinct)} is not among --tgt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    fixed = ("model", "data", "src", "steps", "outer_lr", "limit_train", "limit_test", "distinct")
    settings = json.dumps([{name: vars(args)[name] for name in fixed}, PRIMING, TUNING])
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "settings.json"
    if not kept.exists():
        with prime.replacing(kept) as new:
            new.write_text(settings)
    if kept.read_text() != settings:
        raise prime.BadInput(f"{args.output} is of other settings: {kept.read_text()}; take another --output")
    for target in args.distinct:
        write_distinct(target, args)
    lines = [line for row in dict.fromkeys(args.rows) for line in measure(row, args)]
    scores = pandas.DataFrame(lines).set_index(["split", "target", "seed", "row"])["f1"].unstack("row")
    f1, with_number = scores.loc["official"], {row: f"{row} {name}" for row, name in NAMES.items()}
    print_table("F1", f1.rename(columns=with_number), args.tgt)
    if args.distinct:
        without = scores.loc["distinct"]
        print_table("F1 without duplicates", without.rename(columns=with_number), args.tgt)
        print_table("change", (without - f1.loc[without.index]).rename(columns=with_number), args.tgt)
    differences = {f"{a} − {b}": f1[a] - f1[b] for a, b in DIFFERENCES if {a, b} <= {*f1}}
    if differences:
        print_table("difference", pandas.DataFrame(differences), args.tgt)
    primed = f1[[row for row in f1 if row in PRIMING]].rename(columns=NAMES)
    if {1, 3} <= {*f1} and len(primed.columns):
        means = f1.groupby("target").mean()
        above = primed.sub(means[3], axis=0, level="target")
        shares = 100 * above.div(means[1] - means[3], axis=0, level="target")
        print_table("% of the gap between AT and Full FT closed", shares, args.tgt, ".0f")
        draw(shares, args.tgt, args.picture or args.output / "table1.svg")


if __name__ == "__main__":
    prime.run(main)
