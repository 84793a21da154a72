"""What priming is worth, with seeds and intervals, on a real encoder and complete test splits.

    python benchmarks/evidence.py --model ENCODER --data WIKIANN --priming none meta ft --seeds 0 1 2
    python benchmarks/evidence.py --report

Each way of priming and seed is one `prime.py` command; what it leaves is tuned by `finetune.py` for every
target and number of training sentences. What came out is kept as JSON lines in
benchmarks/results/evidence.jsonl, so that the tables of `--report` need no run; what is there is not run
again, and several processes may take other seeds.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pandas
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/evidence.jsonl"
STEPS = ["--outer-lr", "2e-4", "--steps", "300"]
PRIMING = {  # the flags of prime.py; none: not primed, full: full fine-tuning too
    "none": None,
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
}
TUNING = {  # the flags of finetune.py, where they are not the defaults
    "none": ["--min-steps", "750"],
    "full": ["--tune", "full", "--lr", "5e-5", "--epochs", "3", "--min-steps", "750"],
    "none-bitfit": ["--pe", "bitfit", "--min-steps", "750"],
    "meta-bf16": ["--bf16"],
}
PAIRS = [("meta", "ft"), ("meta", "maml"), ("meta", "one-step"), ("meta", "paper-alpha"), ("meta", "none"),
         ("ft", "none"), ("ft", "ft-half"), ("meta", "new-heads"), ("meta", "meta-bf16"),
         ("meta-1000", "ft-1000"), ("meta-1000", "meta"), ("ft-1000", "ft"),
         ("meta-bitfit", "none-bitfit")]
KEPT = ("target", "seed", "split", "train_sentences", "test_sentences", "lr", "epochs", "min_steps", "f1")


def run(script: str, *flags: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print("+", " ".join(command[1:]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"{script} failed")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def provenance(args: argparse.Namespace, target: str) -> dict:
    """What the run was made from: the commit, and CRC-32 checksums of the weights and data files."""
    model = sorted(Path(args.model).glob("*.safetensors"))
    folders = [Path(args.data) / language for language in ("en", "es", target)]
    data = [path for folder in folders for path in sorted(folder.iterdir())]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    checksums = {"model_crc32": file_checksum(model), "data_crc32": file_checksum(data)}
    return {"commit": revision.stdout.strip(), **checksums}


def file_checksum(paths: list[Path]) -> str:
    """CRC-32 of the files' bytes, one after the other; "hub" where there is no file."""
    total = 0
    for path in paths:
        total = zlib.crc32(path.read_bytes(), total)
    return f"{total:08x}" if paths else "hub"


def measure(priming: str, seed: int, args: argparse.Namespace) -> None:
    """Primes once, if something is missing in the results, and tunes what is missing."""
    wanted = [(target, size) for target in args.tgt for size in args.sizes]
    tuning = [*TUNING.get(priming, []), *args.tuning]
    told = {"priming": priming, "tuning": " ".join(tuning), "split": args.split, "seed": seed}
    done = {(line["target"], line["asked"]) for line in lines(RESULTS) if told.items() <= line.items()}
    missing = [pair for pair in wanted if pair not in done]
    if not missing:
        print(f"{priming}, seed {seed}: all in {RESULTS}; move it away to run again, or for another model")
        return
    base = ["--model", args.model, "--data", args.data]
    folder = args.output / f"{priming}-{seed}"
    start = ["--init", folder]
    if PRIMING[priming] is None:
        start = ["--init", "none", "--model", args.model]
    elif not (folder / "priming.json").exists():
        script = "benchmarks/new_heads.py" if priming == "new-heads" else "prime.py"
        run(script, *base, *PRIMING[priming], "--seed", seed, "--save-every", 10**6, "--output", folder)
    for target, size in missing:
        results = args.output / f"{priming}-{seed}-{target}-{size}-{args.split}"
        shutil.rmtree(results, ignore_errors=True)
        limits = ["--limit-train", size, "--limit-test", args.limit_test]
        run("finetune.py", "--tgt", target, "--data", args.data, *start, "--seeds", seed, *limits,
            "--split", args.split, *tuning, "--results", results)
        (path,) = results.glob("*.json")
        line = json.loads(path.read_text())
        slim = {**told, "asked": size, "prime": PRIMING[priming], **{name: line[name] for name in KEPT},
                "versions": line["versions"], **provenance(args, target)}
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(slim) + "\n")


def spread(f1: pandas.Series) -> str:
    """Mean ± standard deviation over seeds, and how many there are."""
    return f"{f1.mean():.2f} (1)" if len(f1) == 1 else f"{f1.mean():.2f} ± {f1.std():.2f} ({len(f1)})"


def interval(differences: pandas.Series) -> str:
    """Mean ± half of the 95 % interval (Student's t) over seeds; one seed has no interval."""
    seeds = differences.dropna()
    if len(seeds) < 2:
        return f"{seeds.mean():+.2f} (1)" if len(seeds) else "–"
    half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std() / len(seeds) ** 0.5
    return f"{seeds.mean():+.2f} ± {half:.2f} ({len(seeds)})"


def show(title: str, table: pandas.DataFrame) -> None:
    """Prints a table in Markdown."""
    table = table.fillna("–").reset_index()
    heads = [" ".join(map(str, name)).strip() if type(name) is tuple else str(name) for name in table]
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in table.itertuples(index=False):
        print(f"| {' | '.join(map(str, row))} |")


def results(split: str) -> pandas.Series:
    """F1 by sentences, tuning, priming, target and seed."""
    keys = ["asked", "tuning", "priming", "target", "seed"]
    table = pandas.DataFrame(line for line in lines(RESULTS) if line["split"] == split)
    return table.drop_duplicates(keys, keep="last").set_index(keys)["f1"]


def with_usual_tuning(f1: pandas.Series) -> pandas.DataFrame:
    """A column for each way of priming; rows by sentences, target and seed."""
    usual = [tuning == " ".join(TUNING.get(priming, [])) for _, tuning, priming, *_ in f1.index]
    columns = f1[usual].droplevel("tuning").unstack("priming")
    return columns.reorder_levels(["asked", "target", "seed"]).sort_index()


def report(split: str, targets: list[str]) -> None:
    f1 = results(split)
    f1 = f1[f1.index.isin(targets, "target")]
    cells = f1.groupby(level=["priming", "tuning", "target", "asked"]).agg(spread)
    cells = cells.unstack(["target", "asked"]).sort_index(axis=1)
    show(f"F1 on {split}, mean ± standard deviation (seeds):", cells)
    if f1.index.unique("seed").size == 1:
        return  # no differences over seeds
    columns = with_usual_tuning(f1)
    of_seed = columns.groupby(level=["asked", "seed"])
    mean = of_seed.agg(lambda column: column.mean() if column.count() == len(targets) else None)
    mean = pandas.concat({"mean": mean}, names=["target"]).reorder_levels(columns.index.names)
    columns = pandas.concat([columns, mean])
    pairs = [(one, other) for one, other in PAIRS if {one, other} <= {*columns}]
    paired = pandas.DataFrame({f"{one} − {other}": columns[one] - columns[other] for one, other in pairs})
    paired.columns.name = "difference"
    paired = paired.stack().groupby(level=["difference", "asked", "target"], sort=False).agg(interval)
    paired = paired.unstack("target")
    show("Paired differences, 95 % interval of Student's t (seeds):", paired[(paired != "–").any(axis=1)])
    if {"meta", "full"} <= {*columns}:
        means = columns.groupby(level=["asked", "target"]).mean()
        shares = means[["meta", "ft"]].sub(means["none"], axis=0).div(means["full"] - means["none"], axis=0)
        shares = shares.dropna().map("{:.1%}".format).rename_axis(columns="priming").stack()
        show("Share of the gap from AT to full fine-tuning that priming closes:", shares.unstack("target"))


def draw(split: str, targets: list[str], picture: Path) -> None:
    """F1 against the number of training sentences, with and without priming; dots are seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"  # the same picture has the same bytes
    from matplotlib import pyplot

    names = {"meta": "Meta Priming → AT", "ft": "FT Priming → AT", "none": "AT", "full": "Full FT"}
    columns = with_usual_tuning(results(split))
    figure, (panels,) = pyplot.subplots(
        1, len(targets), sharey=True, squeeze=False, figsize=(7, 3), layout="constrained")
    for axes, target in zip(panels, targets):
        f1 = columns.xs(target, level="target")
        for (priming, name), color in zip(names.items(), ("#0072b2", "#d55e00", "0.5", "0")):
            of_seeds = f1[priming].dropna()
            mean = of_seeds.groupby(level="asked").mean()
            axes.plot(mean.index, mean, "-", color=color, label=name)
            axes.plot(of_seeds.index.get_level_values("asked"), of_seeds, ".", color=color)
        axes.set(xscale="log", title=target, xlabel="training sentences")
        sizes = f1.index.unique("asked")
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
    panels[0].set(ylabel="F1")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", default="bert-base-multilingual-cased")
    flag("--data", default="unimelb-nlp/wikiann")
    flag("--priming", nargs="+", choices=[*PRIMING], default=["none", "meta", "ft"])
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flag("--tgt", nargs="+", default=["nl", "ru"])
    flag("--sizes", type=int, nargs="+", default=[200, 5000], help="training sentences of a target")
    flag("--split", choices=["test", "validation"], default="test")
    flag("--limit-test", type=int, default=3000)
    flag("--tuning", nargs=argparse.REMAINDER, default=[],
         help="the last flag: what follows goes to finetune.py")
    flag("--output", type=Path, default=ROOT / "evidence", help="folder for the primed models")
    flag("--report", action="store_true", help="print the tables and run nothing")
    flag("--picture", type=Path, help="with --report: draw them there (needs matplotlib)")
    args = parser.parse_args()
    if args.report:
        report(args.split, args.tgt)
        return draw(args.split, args.tgt, args.picture) if args.picture else None
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for priming in args.priming:
            measure(priming, seed, args)


if __name__ == "__main__":
    main()
