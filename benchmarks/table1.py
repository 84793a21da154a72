"""Reproduces Table 1: its seven settings and one more, for all targets and seeds, by the two commands.

    python benchmarks/table1.py --model ENCODER --data WIKIANN --tgt nl hi af et

Without flags it takes mBERT and the whole of WikiAnn from the hub, as the paper does. A seed is that of
priming and of fine-tuning. An interrupted run continues when it is started again with the same flags;
targets, rows and seeds may be added. Several processes may run different rows into the same --output, and a
last call with all rows prints the tables.

Prints F1 as mean ± standard deviation over seeds; the share of the gap between AT (row 3) and Full FT (row 1)
that each priming closes, where the ends of the gap are means over seeds; and differences between rows, seed
by seed. The column "mean" averages over targets for each seed. A cell without ± is from the first seed alone.
The picture shows the shares, with the seeds as dots.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from load import load_tagger

import adapters
import finetune
import report

NAMES = {1: "Full FT", 2: "HT", 3: "AT", 4: "Meta Priming → AT", 5: "FT Priming → AT",
         6: "MP [MAML Loop] → AT", 7: "MP [1 Inner Step] → AT",
         8: "MP [50 Inner Steps] → AT"}  # not in the paper
PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", "1"],
           8: ["--inner-steps", "50"]}
TYPES = ["PER", "ORG", "LOC"]
DIFFERENCES = [(4, 3), (4, 5), (4, 6), (4, 7), (8, 3), (8, 4), (8, 5)]
MIN_STEPS = ["--min-steps", "750"]  # with 400 sentences, better for rows without priming, worse for row 4
TUNING = {1: ["--tune", "full", "--lr", "5e-5", "--epochs", "3", *MIN_STEPS],
          2: ["--tune", "head", "--lr", "3e-2", *MIN_STEPS], 3: MIN_STEPS}


class Settings(NamedTuple):
    """What all runs in an output folder have in common."""

    model: str
    data: str
    src: list[str]
    steps: int
    outer_lr: float
    limit_train: int | None
    limit_test: int | None
    distinct: list[str]


def run_command(script: str, *flags: object) -> None:
    """Runs a script. It is terminated, too, if this process is."""
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


def run_row(
    row: int, settings: Settings, targets: Sequence[str], seeds: Sequence[int], output: Path,
    run: Callable[..., None] = run_command,
) -> list[dict[str, Any]]:
    """Runs what is missing of a row. Returns the results of finetune.py, with `row` and `split`, which is
    "official" or, for test sentences that are not in the training split, "distinct"."""
    folder, model, data = output / f"row-{row}", ["--model", settings.model], ["--data", settings.data]
    official, distinct = folder / "official", folder / "distinct"
    limits = {"--limit-train": settings.limit_train, "--limit-test": settings.limit_test}
    options = [*data, *TUNING.get(row, [])]
    options += [word for flag, limit in limits.items() if limit for word in (flag, limit)]
    if settings.distinct:
        options += ["--save", folder / "tuned"]
    inits = {folder / f"primed-{seed}": [seed] for seed in seeds} if row in PRIMING else {"none": seeds}
    for init, seeds_of_init in inits.items():
        wanted = {(target, seed) for target in targets for seed in seeds_of_init}
        if not wanted <= read_results(official).keys():
            if row in PRIMING:
                run("prime.py", "--src", *settings.src, *model, *data, "--steps", settings.steps,
                    "--outer-lr", settings.outer_lr, *PRIMING[row], "--seed", *seeds_of_init,
                    "--output", init)
            start = ["--init", init] if row in PRIMING else ["--init", "none", *model]
            run("finetune.py", "--tgt", *targets, *start, *options, "--seeds", *seeds_of_init,
                "--results", official)
    for target in settings.distinct:
        if (target, seeds[0]) not in read_results(distinct):
            score_distinct(folder / "tuned" / f"{target}-{seeds[0]}", output / "distinct", distinct)
    return [{**record, "row": row, "split": path.name} for path in (official, distinct)
            for (target, seed), record in read_results(path).items() if target in targets and seed in seeds]


def read_results(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The records that finetune.py wrote to a folder of --results, by target and seed."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return {(record["target"], record["seed"]): record for record in records}


def score_distinct(tuned: Path, data: Path, results: Path) -> None:
    """Scores a model on the test sentences that `write_distinct` wrote, and writes a record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # finetune.py's default
    model, tokenizer, tags = load_tagger(tuned, device=device)
    record = adapters.read_record(tuned / "tuned.json", check_weights=True)
    sentences = adapters.load_sentences(
        str(data), record["target"], "test", tokenizer, TYPES, record["max_length"])
    score = finetune.evaluate(model, sentences, tags)
    results.mkdir(parents=True, exist_ok=True)
    new = {**record, **score, "test_sentences": len(sentences)}
    adapters.write_record(results / f"{tuned.name}.json", new)


def write_distinct(target: str, settings: Settings, output: Path) -> None:
    """Writes the test sentences that are not in the training split, as a folder of --data."""
    train = adapters.read_split(settings.data, target, "train", TYPES)[: settings.limit_train]
    test = adapters.read_split(settings.data, target, "test", TYPES)[: settings.limit_test]
    known, tags = {tuple(words) for words, _ in train}, adapters.tag_names(TYPES)
    distinct = [sentence for sentence in test if tuple(sentence[0]) not in known]
    texts = ["".join(f"{word}\t{tags[tag]}\n" for word, tag in zip(*sentence)) for sentence in distinct]
    folder = output / "distinct" / target
    folder.mkdir(parents=True, exist_ok=True)
    with adapters.atomic_write(folder / "test.txt") as new:
        new.write_text("\n".join(texts), encoding="utf-8")
    repeated = len(test) - len(distinct)
    print(f"{target}: {repeated} of {len(test)} test sentences are training sentences too")


def print_table(title: str, values: pandas.DataFrame, targets: Sequence[str], digits: int = 2) -> None:
    """A row per column of `values`, over seeds, for each target and for the mean of the targets."""
    groups = {target: values.loc[target] for target in targets if target in values.index}
    groups["mean"] = values.groupby("seed").mean()
    rows = [[name, *(report.mean_std(group[name], digits) for group in groups.values())] for name in values]
    print("\n" + report.markdown([title, *groups], rows))


def gap_shares(f1: pandas.DataFrame) -> pandas.DataFrame:
    """Percent of the gap between AT and Full FT that each priming closes, by target and seed."""
    means = f1.groupby("target").mean()
    primed = f1[[row for row in f1 if row in PRIMING]].rename(columns=NAMES)
    above = primed.sub(means[3], axis=0, level="target")
    return 100 * above.div(means[1] - means[3], axis=0, level="target")


def print_tables(records: Sequence[dict[str, Any]], targets: Sequence[str], picture: Path) -> None:
    """Prints all tables of the results, and draws the shares of the gap."""
    results = pandas.DataFrame(records).set_index(["split", "target", "seed", "row"])["f1"].unstack("row")
    f1, numbered = results.loc["official"], {row: f"{row} {name}" for row, name in NAMES.items()}
    print_table("F1", f1.rename(columns=numbered), targets)
    if "distinct" in results.index:
        distinct = results.loc["distinct"]
        print_table("F1 without duplicates", distinct.rename(columns=numbered), targets)
        print_table("change", (distinct - f1.loc[distinct.index]).rename(columns=numbered), targets)
    differences = {f"{a} − {b}": f1[a] - f1[b] for a, b in DIFFERENCES if {a, b} <= {*f1}}
    if differences:
        print_table("difference", pandas.DataFrame(differences), targets)
    if {1, 3} <= {*f1} and {*PRIMING} & {*f1}:
        shares = gap_shares(f1)
        print_table("% of the gap between AT and Full FT closed", shares, targets, digits=0)
        draw(shares, targets, picture)


def draw(shares: pandas.DataFrame, targets: Sequence[str], picture: Path) -> None:
    pyplot = report.import_pyplot("table1")
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    width = 0.8 / len(shares.columns)
    for i, name in enumerate(shares):
        seeds = [shares[name].loc[target].dropna() for target in targets]
        positions = [k + (i - (len(shares.columns) - 1) / 2) * width for k in range(len(targets))]
        bars = axes.bar(positions, [values.mean() for values in seeds], 0.9 * width, alpha=0.5, label=name)
        for position, values in zip(positions, seeds):
            axes.plot([position] * len(values), values, ".", color=bars[0].get_facecolor()[:3])
    axes.set(ylabel="gap between AT and Full FT closed, %")
    axes.set_xticks(range(len(targets)), targets)
    figure.legend(frameon=False, ncols=2, loc="outside upper center")
    report.save_picture(figure, picture)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a folder, or raises UserError if it has others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with adapters.atomic_write(path) as new:
            new.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if saved.get(name) != value:
            found = f"{name} {saved.get(name)} (now {value})"
            raise adapters.UserError(f"{path.parent} holds runs with {found}: choose another --output")


def run_table(
    settings: Settings, rows: Sequence[int], targets: Sequence[str], seeds: Sequence[int], *,
    one_seed: Sequence[int], output: Path, run: Callable[..., None] = run_command,
) -> list[dict[str, Any]]:
    """The results of all rows; runs what is missing. Raises UserError if `output` has other settings."""
    flags = {f"flags of row {row}": PRIMING.get(row, []) + TUNING.get(row, []) for row in NAMES}
    check_settings(output / "settings.json", settings._asdict() | flags)
    for target in settings.distinct:
        write_distinct(target, settings, output)
    records = []
    for row in dict.fromkeys(rows):
        records += run_row(row, settings, targets, seeds[:1] if row in one_seed else seeds, output, run)
    return records


def main() -> None:
    parser = report.make_parser(__doc__, report.HUB)
    add = parser.add_argument
    add("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    add("--tgt", nargs="+", default=["hi", "af", "az", "lt", "et", "nl"], metavar="LANG",
        help="target languages")
    add("--rows", type=int, nargs="+", choices=[*NAMES], default=[*NAMES], help="rows of the table to run")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, each of priming and of fine-tuning")
    add("--one-seed", type=int, nargs="*", choices=[*NAMES], default=[], metavar="ROW",
        help="rows to run with the first seed only")
    add("--steps", type=int, default=1000, help="number of meta steps")
    add("--outer-lr", type=float, default=5e-5, help="β, AdamW's rate in priming")
    add("--limit-train", type=int, metavar="N", help="only the first N training sentences of each target")
    add("--limit-test", type=int, metavar="N", help="score only the first N sentences of each target")
    add("--distinct", nargs="*", default=[], metavar="LANG",
        help="targets to score, for the first seed, also without the test sentences that are training "
             "sentences; keeps all tuned parameters in --output for it")
    add("--output", type=Path, default=Path("table1"), help="folder for primed encoders and results")
    add("--picture", type=Path, help="file to draw the shares to; default: table1.svg in --output")
    args = parser.parse_args()
    if not {*args.distinct} <= {*args.tgt}:
        parser.error(f"--distinct {' '.join(args.distinct)} is not among --tgt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Settings(**{name: value for name, value in vars(args).items() if name in Settings._fields})
    records = run_table(
        settings, args.rows, args.tgt, args.seeds, one_seed=args.one_seed, output=args.output)
    print_tables(records, args.tgt, args.picture or args.output / "table1.svg")


if __name__ == "__main__":
    adapters.cli(main)
