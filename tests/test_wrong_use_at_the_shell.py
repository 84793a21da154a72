"""Mistakes at the shell: a wrong folder, encoder or flag ends a command with one line before any training."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    DEMO, FROM_PRETRAINED, HERE, HINDI, SMALL_PRIMING, SMALL_TUNING, command, edit_json, moved,
    random_encoder, read_results, run_process, save_encoder, snapshot,
)
from load import load_tagger
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import adapters

ONE_STEP = ["--steps", 1, "--support", 2, "--query", 1, "--limit-train", 3]


@pytest.fixture
def optimizer_steps():
    """A list that grows by one with each step of any optimizer."""
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *args: steps.append(1))
    yield steps
    hook.remove()


def error_line(script, *flags):
    """The one line that a command with a mistake prints. Above it argparse prints the usage."""
    done = command(script, *flags, status=2)
    *usage, line = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and done.stdout == ""
    assert not usage or "error: " in line
    return line


def copy_demo(folder):
    return shutil.copytree("demo/encoder", folder)


# ---- folders of other runs, changed folders ----


def test_save_names_the_setting_of_another_run_before_any_seed_trains(tmp_path, optimizer_steps):
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--save", tmp_path / "t", "--results", tmp_path / "r"]
    command("finetune.py", *flags, "--lr", 0.01)
    before = snapshot(tmp_path)
    optimizer_steps.clear()
    line = error_line("finetune.py", *flags, "--lr", 0.02, "--seeds", 2, 1, 0)
    assert f"{tmp_path}/t/hi-0 holds a run with lr 0.01 (now 0.02)" in line
    line = error_line("finetune.py", *flags, "--lr", 0.01, "--epochs", 3, "--seeds", 2, 1, 0)
    assert f"{tmp_path}/t/hi-0 holds a run with epochs 2 (now 3)" in line
    encoder = copy_demo(tmp_path / "encoder")
    edit_json(encoder / "config.json", hidden_act="relu")
    line = error_line("finetune.py", *flags, "--lr", 0.01, "--seeds", 2, 0, "--tgt", "hi", "--model", encoder)
    assert f"{tmp_path}/t/hi-0 holds a run with " in line
    shutil.rmtree(encoder)
    assert snapshot(tmp_path) == before and optimizer_steps == []


CHANGES = {"hidden_act": "relu", "num_attention_heads": 2}
HARMLESS = {"transformers_version": "4.0.0", "_name_or_path": "x/y", "dtype": "float32", "architectures": ["A"]}


@pytest.mark.parametrize("key", [*CHANGES, *HARMLESS])
def test_another_configuration_is_another_run_unless_it_changes_no_output(key, table, tmp_path):
    encoder = copy_demo(tmp_path / "encoder")
    model = ["--model", encoder, "--data", "demo/wikiann"]
    priming = [*model, *ONE_STEP, "--output", tmp_path / "primed"]
    tuning = [*HINDI, *SMALL_TUNING, "--init", "none", "--tune", "head", *model, "--results", tmp_path / "r"]
    command("prime.py", *priming)
    command("finetune.py", *tuning, "--save", tmp_path / "tuned")
    edit_json(encoder / "config.json", **{key: (CHANGES | HARMLESS)[key]})
    if key in CHANGES:
        assert "holds a run with configuration " in error_line("prime.py", *priming)
        with pytest.raises(adapters.UserError, match="was not tuned on"):
            load_tagger(tmp_path / "tuned/hi-0")
        assert "done before" not in command("finetune.py", *tuning).stdout
        assert len(read_results(tmp_path / "r")) == 2
    else:
        assert "is complete" in command("prime.py", *priming).stdout
        assert "done before" in command("finetune.py", *tuning).stdout
        load_tagger(tmp_path / "tuned/hi-0")


@pytest.mark.parametrize("change", ["missing", "swapped"])
def test_a_finished_folder_without_its_own_weights_is_refused(change, table, tmp_path, optimizer_steps):
    primed = [*DEMO, *SMALL_PRIMING, "--output"]
    for name in ("model.safetensors", "adapter.safetensors", "tuned.safetensors"):
        source, other = (table[row][0] / ("tuned/hi-0" if name[0] == "t" else "primed") for row in (4, 7))
        folder = shutil.copytree(source, tmp_path / name)
        (folder / name).unlink()
        if change == "swapped":
            shutil.copy(other / name, folder)
        before = snapshot(folder)
        results = [*HINDI, "--results", tmp_path / "r"]
        if name[0] == "t":
            with pytest.raises(adapters.UserError) as raised:
                load_tagger(folder, str(source / "../../primed"))
            lines = [str(raised.value)]
        else:
            lines = [error_line("prime.py", *primed, folder), error_line("finetune.py", *results, "--init", folder)]
        record = "tuned.json" if name[0] == "t" else "priming.json"
        assert all(f"{folder}: a weights file is missing" in line and record in line for line in lines)
        assert snapshot(folder) == before
    assert optimizer_steps == [] and not (tmp_path / "r").exists()


# ---- encoders that do not fit ----

SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
TINY = {
    "vocab_size": 1834, "max_position_embeddings": 64, "embedding_size": 16,
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
    "n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32,  # DistilBERT's names
    **dict.fromkeys(SPECIAL_TOKENS, 0),
}


@pytest.mark.parametrize("change", [1, -1], ids=["lacks a layer", "has one more"])
@pytest.mark.parametrize("architecture", ["Bert", "DistilBert", "Electra", "ModernBert"])
def test_weights_with_other_layers_than_the_configuration_are_refused(architecture, change, tmp_path):
    folder = save_encoder(random_encoder(architecture, 1834), tmp_path / "encoder")
    adapters.load_encoder(str(folder), 16)
    key = "n_layers" if architecture == "DistilBert" else "num_hidden_layers"
    edit_json(folder / "config.json", **{key: 2 + change}, layer_types=None)
    line = error_line("prime.py", "--model", folder, "--data", "demo/wikiann", "--output", tmp_path / "out")
    assert f"--model {folder}" in line and "config.json" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "class_name",
    ["BertForPreTraining", "XLMRobertaForMaskedLM", "DistilBertForMaskedLM", "ElectraForPreTraining",
     "AlbertForPreTraining", "ModernBertForMaskedLM", "BertForTokenClassification"],
)
def test_checkpoints_with_heads_load_as_encoders(class_name, tmp_path):
    import transformers

    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**TINY))
    folder = save_encoder(model, tmp_path / "encoder")
    saved = load_file(folder / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    assert any(not name.startswith(prefix) for name in saved)  # there is a head
    encoder, _ = adapters.load_encoder(str(folder), 16)
    loaded = {f"{prefix}{name}": tensor for name, tensor in encoder.state_dict().items()}
    shared = loaded.keys() & saved.keys()
    assert {name for name in loaded.keys() - shared if ".pooler." not in name} == set()
    assert {name for name in saved if name.startswith(prefix)} == shared
    assert not moved({name: loaded[name] for name in shared}, saved)


@pytest.mark.parametrize(
    "architecture, sizes",
    [("Bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}),
     ("T5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2})],
)
def test_an_encoder_decoder_is_refused(architecture, sizes, tmp_path):
    folder = save_encoder(random_encoder(architecture, 1834, **sizes), tmp_path / "encoder")
    for script, *flags in (["prime.py", "--output", tmp_path / "out"],
                           ["finetune.py", "--init", "none", *HINDI, "--results", tmp_path / "out"]):
        line = error_line(script, "--data", "demo/wikiann", "--model", folder, *flags)
        assert f"--model {folder}" in line and "decoder" in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_length, numbers", [(1, ["2"]), (2, ["2"]), (129, ["128"]), (10_000, ["128"])])
def test_a_max_length_that_does_not_fit_is_refused_with_the_limits(max_length, numbers, primed, tmp_path):
    for script, *flags in (["prime.py", *DEMO, "--output", tmp_path / "out"],
                           ["finetune.py", "--init", primed, *HINDI, "--results", tmp_path / "out"]):
        line = error_line(script, *flags, "--max-length", max_length)
        message = line.split("--max-length")[1]
        assert all(number in message for number in numbers) and not (tmp_path / "out").exists()
    assert max_length > 2 or "special tokens" in message


@pytest.mark.parametrize("architecture", ["RoFormer", "BigBird"])
def test_sentences_longer_than_half_of_the_positions_are_padded(architecture, tmp_path):
    """These architectures are not packed. Training and scoring have two or three sentences."""
    folder = save_encoder(random_encoder(architecture, 1834, max_position_embeddings=128), tmp_path / "encoder")
    for language in ("en", "hi"):
        (tmp_path / "data" / language).mkdir(parents=True)
        for split in ("train", "test"):
            sentence = "Delhi\tB-LOC\n" + "is\tO\n" * 79
            (tmp_path / "data" / language / f"{split}.txt").write_text("\n".join(3 * [sentence]))
    rows = []

    def record_rows(module, args):
        if isinstance(module, nn.Embedding) and module.num_embeddings == 1834:
            sentences = (args[0] == 2).sum(-1)  # [CLS] per row
            rows.extend(sentences.tolist() if sentences.sum() in (2, 3) else [])

    hook = nn.modules.module.register_module_forward_pre_hook(record_rows)
    data = ["--data", tmp_path / "data"]
    command("prime.py", *data, "--src", "en", "--model", folder, *ONE_STEP, "--output", tmp_path / "primed")
    tuning = ["--init", tmp_path / "primed", "--epochs", 1, "--tune", "full"]
    command("finetune.py", *data, "--tgt", "hi", *tuning, "--results", tmp_path / "r")
    hook.remove()
    assert len(rows) > 6 and set(rows) == {1}


# ---- flags ----


def test_no_inner_steps_are_refused(tmp_path):
    line = error_line("prime.py", *DEMO, "--inner-steps", 0, "--output", tmp_path / "out")
    assert "--inner-steps" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("language", ["hi/", "../hi", ".", "an absolute path", "", ".."])
def test_a_language_that_is_a_path_is_refused(language, tmp_path, optimizer_steps):
    data = shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi").parent
    for folder in (data, tmp_path):  # what "", "." and ".." would name
        shutil.copytree("demo/wikiann/hi", folder, dirs_exist_ok=True)
    shutil.copytree("demo/wikiann/hi", tmp_path / "hi")
    language = str(tmp_path / "hi") if language == "an absolute path" else language
    flags = ["--data", data, "--results", tmp_path / "r", "--save", tmp_path / "s"]
    line = error_line("finetune.py", "--tgt", "hi", language, *flags, *FROM_PRETRAINED)
    assert repr(language) in line and "language code" in line
    flags = ["--model", "demo/encoder", "--data", data, "--output", tmp_path / "out"]
    assert repr(language) in error_line("prime.py", "--src", language, *flags)
    written = [path for name in ("r", "s", "out") for path in (tmp_path / name).rglob("*")]
    assert written == optimizer_steps == []


def test_a_target_named_twice_is_tuned_once(tmp_path):
    flags = ["--tgt", "hi", "hi", "--data", "demo/wikiann", *SMALL_TUNING, *FROM_PRETRAINED]
    done = command("finetune.py", *flags, "--results", tmp_path / "r", "--save", tmp_path / "s")
    assert len(done.stdout.splitlines()) == 1 and len(read_results(tmp_path / "r")) == 1


@pytest.mark.parametrize("flag", ["--results", "--save"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "not writable"])
def test_an_output_that_cannot_be_written_is_known_before_training(flag, kind, tmp_path, optimizer_steps):
    (tmp_path / "file").write_text("mine")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file/r", "not writable": Path("/proc")}[kind]
    if kind == "not writable" and not path.exists():
        pytest.skip("there is no /proc")
    outputs = {"--results": tmp_path / "r", "--save": tmp_path / "s", flag: path}
    flags = [flag for pair in outputs.items() for flag in pair]
    line = error_line("finetune.py", *HINDI, *SMALL_TUNING, *FROM_PRETRAINED, *flags)
    assert str(path) in line and optimizer_steps == [] and (tmp_path / "file").read_text() == "mine"
    line = error_line("prime.py", *DEMO, "--output", path)
    assert str(path) in line and optimizer_steps == []


# ---- stdout and stderr ----


def closed_streams():
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()
        setattr(sys, name, None)


def test_closed_streams_do_not_stop_a_command_or_hide_its_status(table, primed, tmp_path):
    """The first command has a real shell, because transformers replaces a closed stderr when it is imported."""
    flags = [*HINDI, "--limit-train", 30, "--limit-test", 3, "--init", primed, "--results", tmp_path / "r"]
    script = " ".join(map(str, [sys.executable, "finetune.py", *flags, ">&-", "2>&-"]))
    shell = subprocess.Popen(script, shell=True, cwd=HERE)
    run_process("finetune.py", [*HINDI, "--init", "no/where"], tmp_path / "stderr", 2, fault=closed_streams)
    run_process("prime.py", ["--steps", 0], tmp_path / "stderr", 2, fault=closed_streams)
    (tmp_path / "text").write_text("Delhi is here\n")
    run_process("examples/tag.py", [table[4][0] / "tuned/hi-0", tmp_path / "text"], tmp_path / "stderr",
                fault=closed_streams)
    assert (tmp_path / "stderr").read_text() == ""
    assert shell.wait() == 0 and len(read_results(tmp_path / "r")) == 1


def test_a_closed_pipe_does_not_stop_the_remaining_seeds(tmp_path):
    """As `finetune.py ... | true` does, in a process that ends as the shell's do."""
    flags = [*HINDI, *SMALL_TUNING, *FROM_PRETRAINED, "--epochs", 1, "--seeds", 0, 1, "--results"]
    script = " ".join(map(str, [sys.executable, "finetune.py", *flags]))
    pipe, full_disk = tmp_path / "pipe", tmp_path / "disk"
    shells = [
        subprocess.Popen(["bash", "-c", f"{script} {folder} 2> {folder}.stderr {end}"], cwd=HERE)
        for folder, end in ((pipe, "| true"), (full_disk, "> /dev/full"))]
    for shell, folder in zip(shells, (pipe, full_disk)):
        shell.wait()
        assert [record["seed"] for record in read_results(folder)] == [0, 1]
        assert "Traceback" not in Path(f"{folder}.stderr").read_text()


def test_a_split_without_an_entity_is_reported(tmp_path):
    (tmp_path / "hi").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"hi/{split}.txt").write_text("Delhi\tO\nis\tO\n")
    flags = ["--tgt", "hi", "--data", tmp_path, *FROM_PRETRAINED, "--epochs", 1, "--results", tmp_path / "r"]
    done = command("finetune.py", *flags)
    assert "the scored sentences have no entity" in done.stderr and "F1 0.00" in done.stdout
