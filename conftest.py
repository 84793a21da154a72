"""What the tests share. What primes or tunes is made once for the whole run."""

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import runpy
import shutil
import stat
import sys
from argparse import Namespace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the demo's encoder gains nothing from more

import pytest
import torch

HERE = Path(__file__).parent
DEMO = ["--model", "demo/encoder", "--data", "demo/wikiann"]
HINDI = ["--tgt", "hi", "--data", "demo/wikiann"]
TYPES = ["PER", "ORG", "LOC"]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
EXTRA = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="an extra: pip install peft")
PE = ["adapter", "bitfit"]

SMALL_PRIMING = ["--steps", 2, "--support", 4, "--query", 4, "--limit-train", 50, "--bottleneck", 8]
SMALL_TUNING = ["--epochs", 2, "--limit-train", 30, "--limit-test", 30]
LONG = [*DEMO, *SMALL_PRIMING, "--steps", 12, "--save-every", 1]
FLOCK = fcntl.flock
os.chdir(HERE)


@contextlib.contextmanager
def own_locks():
    """A script locks its output until its process ends. One may run another."""
    before, locked = fcntl.flock, []

    def noted(file, how):
        FLOCK(file, how)
        locked.append(file)

    fcntl.flock = noted
    try:
        yield
    finally:
        fcntl.flock = before
        for file in locked:
            if isinstance(file, int) and stat.S_ISDIR(os.fstat(file).st_mode):
                os.close(file)


def command(script, *flags, status=0, encoding="utf-8"):
    """Runs a script as `python script flags` does, in this process: importing the libraries takes seconds."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    argv, sys.argv, ended = sys.argv, [script, *map(str, flags)], 0
    try:
        streams = contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr)
        with own_locks(), streams[0], streams[1]:
            runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as exit:
        ended = exit.code or 0
    finally:
        sys.argv = argv
    told = {name: stream.buffer.getvalue().decode(encoding) for name, stream in
            (("stdout", stdout), ("stderr", stderr))}
    assert ended == status, told["stderr"]
    return Namespace(**told)


def tensors(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def moved(after, before):
    return {name for name in after if not torch.equal(after[name], before[name])}


def read_results(folder):
    """What the runs left in the folder of --results, in their order."""
    files = sorted(Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in files]


def contents(folder):
    """All that is in a folder, with the time at which it was written."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def random_encoder(architecture, pieces, **more):
    """An encoder of another architecture, of two small layers, in float64."""
    import transformers

    special = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    sizes = {
        "hidden_size": 16, "dim": 16, "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 2,
        "n_heads": 2, "intermediate_size": 32, "hidden_dim": 32, "vocab_size": pieces,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**dict.fromkeys(special, 1), **sizes, **more})
    return transformers.AutoModel.from_config(config).double().eval()


def folder_of(encoder, folder):
    """A folder with an encoder and the demo's tokenizer."""
    shutil.copytree("demo/encoder", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    encoder.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo's encoder in float64, its tokenizer, and Hindi training sentences."""
    import adapters
    import prime

    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    rows = prime.read_split("demo/wikiann", "hi", "train", TYPES)
    return encoder.double().eval(), tokenizer, adapters.tokenize(rows, tokenizer, 128)


PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", 1]}
START = ["--init", "none", "--model", "demo/encoder"]
TUNING = {
    1: [*START, "--tune", "full"], 2: [*START, "--tune", "head"], 3: [*START, "--bottleneck", 8],
}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """What the commands of the seven rows of Table 1 leave, a folder a row, and what they print."""
    root = tmp_path_factory.mktemp("table")

    def make_row(row):
        folder = root / str(row)
        if row in PRIMING:
            command("prime.py", *DEMO, *SMALL_PRIMING, *PRIMING[row], "--output", folder / "primed")
        start = TUNING.get(row, ["--init", folder / "primed"])
        outputs = ["--results", folder / "results", "--save", folder / "tuned", "--seeds", 0, 1]
        return folder, command("finetune.py", *HINDI, *SMALL_TUNING, *start, *outputs).stdout

    return {row: make_row(row) for row in range(1, 8)}


@pytest.fixture(scope="session")
def primed(table):
    """A primed folder, of row 4; not to be changed."""
    return table[4][0] / "primed"


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory):
    """A run that was cut off after four of twelve steps: its folder, with an encoder and data of its own,
    and its flags."""
    root = tmp_path_factory.mktemp("unfinished")
    folder_of(random_encoder("Bert", 1834), root / "encoder")
    for language in ("en", "es"):
        shutil.copytree(f"demo/wikiann/{language}", root / "wikiann" / language)
    flags = [*LONG, "--model", root / "encoder", "--data", root / "wikiann", "--output", root / "primed"]
    save = torch.save

    def interrupt(state, path):
        if len(state[1]) == 5:
            raise KeyboardInterrupt
        save(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", interrupt)
        command("prime.py", *flags, status=2)
    return root, flags
