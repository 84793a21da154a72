"""Constants, helpers and fixtures of the tests. The fixtures that train do so once per session."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the demo's encoder gains nothing from more

import pytest
import torch

HERE = Path(__file__).parent
DEMO = ["--model", "demo/encoder", "--data", "demo/wikiann"]
HINDI = ["--tgt", "hi", "--data", "demo/wikiann"]
TYPES = ["PER", "ORG", "LOC"]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
PE = ["adapter", "bitfit", pytest.param("lora", marks=needs_peft)]

SMALL_PRIMING = ["--steps", 2, "--support", 4, "--query", 4, "--limit-train", 50, "--bottleneck", 8]
SMALL_TUNING = ["--epochs", 2, "--limit-train", 30, "--limit-test", 30]
SLOW_PRIMING = [*DEMO, *SMALL_PRIMING, "--steps", 12, "--save-every", 1]
EARLY = {}  # by test: the folder with what its commands printed; and their process
os.chdir(HERE)


def command(script, *flags, status=0, encoding="utf-8"):
    """Runs `python script flags` in this process, because importing the libraries takes seconds. Returns
    its stdout, stderr and exit status, which must be `status` unless that is None."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    argv, sys.argv, exit_status = sys.argv, [script, *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as exit:
        exit_status = exit.code or 0
    finally:
        sys.argv = argv
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in (stdout, stderr))
    assert status in (exit_status, None), err
    return SimpleNamespace(stdout=out, stderr=err, status=exit_status)


processes = multiprocessing.get_context("forkserver")  # its processes start with the libraries imported
processes.set_forkserver_preload(
    ["finetune", "transformers.models.bert.modeling_bert", "datasets", "conftest"])


def child(script, flags, stdout, stderr, fault):
    """The target of a process: `python script flags > stdout 2> stderr`, after fault()."""
    torch.set_num_threads(1)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8") for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
    sys.argv = [script, *map(str, flags)]
    if fault:
        fault()
    runpy.run_path(str(HERE / script), run_name="__main__")


def start_process(script, flags, stderr, stdout=os.devnull, fault=None):
    process = processes.Process(target=child, args=(script, flags, stdout, stderr, fault))
    process.start()
    return process


def run_process(script, flags, stderr, status=0, **options):
    """Like `command`, but in a process of its own, which may be killed."""
    process = start_process(script, flags, stderr, **options)
    process.join()
    assert process.exitcode == status, Path(stderr).read_text()


def run_early(jobs):
    """Runs the commands of each job (a folder and a list of commands) and writes what they printed."""
    torch.set_num_threads(1)
    for folder, commands in jobs:
        try:
            printed = [command(*words).stdout for words in commands]
            (folder / "new").write_text(json.dumps(printed))
        except BaseException as error:
            (folder / "new").write_text(json.dumps(repr(error)))
        (folder / "new").rename(folder / "printed.json")


def pytest_collection_finish(session):
    """Starts a process for the commands of all tests that are marked `early`, so that they run beside other
    tests. In a command, OUT stands for the folder of the test."""
    marked = [(item, item.get_closest_marker("early")) for item in session.items]
    marked = [(item, mark) for item, mark in marked if mark and not session.config.option.collectonly]
    if marked:
        root = Path(tempfile.mkdtemp())
        session.config.add_cleanup(lambda: shutil.rmtree(root, ignore_errors=True))
        jobs = []
        for item, mark in marked:
            folder = EARLY[item.nodeid] = root / item.name
            folder.mkdir()
            commands = [[str(word).replace("OUT", str(folder)) for word in words] for words in mark.args]
            jobs.append((folder, commands))
        EARLY["process"] = processes.Process(target=run_early, args=(jobs,), daemon=True)
        EARLY["process"].start()


@pytest.fixture
def early(request):
    """The folder of a test that is marked `early`, and what each of its commands printed."""
    folder = EARLY[request.node.nodeid]
    while not (folder / "printed.json").exists():
        assert EARLY["process"].is_alive()
        time.sleep(0.05)
    printed = json.loads((folder / "printed.json").read_text())
    assert isinstance(printed, list), printed
    return folder, printed


def tensors(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def moved(after, before):
    """Names of the tensors that differ."""
    return {name for name in after if not torch.equal(after[name], before[name])}


def read_results(folder):
    """The records in a folder of --results, oldest first."""
    files = sorted(Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in files]


def score_saved(folder, split="test", data="demo/wikiann", limit=None, language="hi", base=None):
    """F1 of the tagger that finetune.py saved to a folder, on the first `limit` sentences of a split."""
    from load import load_tagger

    import adapters
    import finetune

    model, tokenizer, tags = load_tagger(folder, base)
    types = [tag[2:] for tag in tags[1::2]]
    sentences = adapters.load_sentences(
        str(data), language, split, tokenizer, types, tokenizer.model_max_length, limit)
    return finetune.evaluate(model, sentences, tags)["f1"]


def snapshot(folder):
    """Modification time and bytes of each file in a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def random_encoder(architecture, pieces, **more):
    """A randomly initialised encoder with two small layers, in float64."""
    import transformers

    special = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    sizes = {
        "hidden_size": 16, "dim": 16, "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 2,
        "n_heads": 2, "intermediate_size": 32, "hidden_dim": 32, "vocab_size": pieces,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**dict.fromkeys(special, 1), **sizes, **more})
    return transformers.AutoModel.from_config(config).double().eval()


def save_encoder(encoder, folder):
    """Writes an encoder and the demo's tokenizer to a folder and returns the folder."""
    shutil.copytree("demo/encoder", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    encoder.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo():
    """The demo's encoder in float64, its tokenizer, and Hindi training sentences."""
    import adapters

    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    sentences = adapters.read_split("demo/wikiann", "hi", "train", TYPES)
    return encoder.double().eval(), tokenizer, adapters.tokenize(sentences, tokenizer, 128)


# by row of Table 1
PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", 1]}
FROM_PRETRAINED = ["--init", "none", "--model", "demo/encoder"]
TUNING = {
    1: [*FROM_PRETRAINED, "--tune", "full"], 2: [*FROM_PRETRAINED, "--tune", "head"],
    3: [*FROM_PRETRAINED, "--bottleneck", 8],
}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """The seven rows of Table 1: for each row the folder that its commands wrote, and what they printed."""
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
    """The output of prime.py in row 4. Do not change it."""
    return table[4][0] / "primed"


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory):
    """A run of prime.py that was interrupted after four of twelve steps: a folder with its output `primed`,
    its encoder and its data, and the flags of the run."""
    root = tmp_path_factory.mktemp("unfinished")
    save_encoder(random_encoder("Bert", 1834), root / "encoder")
    for language in ("en", "es"):
        shutil.copytree(f"demo/wikiann/{language}", root / "wikiann" / language)
    flags = [*SLOW_PRIMING, "--model", root / "encoder", "--data", root / "wikiann"]
    flags += ["--output", root / "primed"]
    save = torch.save

    def interrupt(state, path):
        losses, _ = state
        if len(losses) == 5:
            raise KeyboardInterrupt
        save(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", interrupt)
        command("prime.py", *flags, status=2)
    return root, flags
