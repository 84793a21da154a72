"""Records, tables and pictures: what the benchmarks share."""

import argparse
import json
import subprocess
import zlib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DEMO = {"model": str(ROOT / "demo/encoder"), "data": str(ROOT / "demo/wikiann")}
HUB = {"model": "bert-base-multilingual-cased", "data": "unimelb-nlp/wikiann"}
BLUE, ORANGE, GRAY, BLACK = "#0072b2", "#d55e00", "0.45", "0"


def make_parser(docstring: str, defaults: dict[str, str]) -> argparse.ArgumentParser:
    """A parser that is described by a docstring's first paragraph and has --model and --data."""
    parser = argparse.ArgumentParser(
        description=docstring.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=defaults["model"], help="encoder: hub name or folder")
    parser.add_argument("--data", default=defaults["data"], help="labelled sentences: hub name or folder")
    return parser


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, none if it does not exist."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def append_line(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def lines_of_last_run(lines: list[dict[str, Any]], measured: Sequence[str]) -> list[dict[str, Any]]:
    """The records that differ from the last one in the keys `measured` only."""
    if not lines:
        raise SystemExit("there are no results yet: run the script without --report")

    def settings(line):
        return {name: value for name, value in line.items() if name not in measured}

    return [line for line in lines if settings(line) == settings(lines[-1])]


def provenance(model: str, data: str, languages: Iterable[str]) -> dict[str, Any]:
    """What a run was made from: the commit, CRC-32 checksums of weights and data, and versions."""
    weights = sorted(Path(model).glob("*.safetensors"))
    folders = [Path(data) / language for language in languages]
    texts = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    revision = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    packages = ("torch", "transformers", "datasets", "seqeval")
    return {
        "commit": revision.stdout.strip(), "model_crc32": file_checksum(weights),
        "data_crc32": file_checksum(texts), "versions": {name: metadata.version(name) for name in packages}}


def file_checksum(paths: Iterable[Path]) -> str:
    """CRC-32 of the files' bytes, one after the other; "hub" if there is no file."""
    checksum = None
    for path in paths:
        checksum = zlib.crc32(path.read_bytes(), checksum or 0)
    return "hub" if checksum is None else f"{checksum:08x}"


def mean_std(values: pandas.Series, digits: int = 2) -> str:
    """Mean ± standard deviation; the mean alone if there is one value, – if there is none."""
    values = values.dropna()
    if values.empty:
        return "–"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def paired_interval(differences: pandas.Series) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of Student's t; the half-width of one value is NaN.

    The values must be independent. Results that share a priming are not: average them first."""
    values = differences.dropna()
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return values.mean(), quantile * values.std() / len(values) ** 0.5


def interval_text(differences: pandas.Series) -> str:
    """Mean ± half-width of the 95 % interval, with the number of values; – if there is none."""
    mean, half = paired_interval(differences)
    count = differences.count()
    if not count:
        return "–"
    return f"{mean:+.2f} (1)" if count == 1 else f"{mean:+.2f} ± {half:.2f} ({count})"


def markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def markdown_frame(frame: pandas.DataFrame) -> str:
    """A table in Markdown of a DataFrame with its index; – for a missing value."""
    frame = frame.fillna("–").reset_index()
    head = [" ".join(map(str, name)).strip() if isinstance(name, tuple) else name for name in frame]
    return markdown(head, frame.itertuples(index=False))


def import_pyplot(name: str) -> Any:
    """matplotlib.pyplot, set up so that the same picture has the same bytes. `name` seeds its ids."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is missing: pip install -r benchmarks/requirements.txt") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": name, "font.size": 11})
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path) -> None:
    """Writes the picture in the format of the file's suffix, without a date."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
