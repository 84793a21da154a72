"""--pe lora: Algorithm 1 with peft's LoRA as θa, and what transformers and peft load of it."""

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from seqeval.metrics import f1_score
from test_long_runs import killed_before_the_second_checkpoint_gets_its_name

import adapters
import export
import prime
from conftest import (
    DEMO, HINDI, TAGS, TYPES, command, needs_peft, random_encoder, read_results, run_process, save_encoder,
    score_saved,
)

SMALL = [*DEMO, "--pe", "lora", "--limit-train", 50, "--support", 4, "--query", 4]
LOAD = """
import sys, warnings
warnings.simplefilter("error")
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, pipeline

def load(base, tuned):
    config = AutoConfig.from_pretrained(tuned)
    base = AutoModelForTokenClassification.from_pretrained(base, config=config)
    return PeftModel.from_pretrained(base, tuned).eval()
"""


@pytest.fixture
def fresh_process():
    """A function that runs code after LOAD, with warnings as errors, and returns what it printed. The process
    starts with the test, so that it imports transformers beside the test's commands."""
    program = [sys.executable, "-c", f"{LOAD}exec(sys.stdin.read())"]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(program, text=True, **pipes) as process:
        def run(code):
            stdout, stderr = process.communicate(code)
            assert process.returncode == 0, stderr
            return stdout

        yield run


def hand_written_meta_step(model, theta_p, theta_a, tasks, outer_lr):
    """Five SGD steps on copies of LoRA and head per task, then AdamW with the sum of the query gradients."""
    adapted = torch.optim.SGD([*theta_a, *model.head.parameters()], lr=0.03)
    outer = torch.optim.AdamW([*theta_p, *theta_a], lr=outer_lr, weight_decay=0.01)
    initial_state, total = copy.deepcopy(model.state_dict()), {}
    for support, query in tasks:
        model.load_state_dict(initial_state)
        for _ in range(5):
            model.zero_grad()
            adapters.tag_loss(model, support).backward()
            adapted.step()
        model.zero_grad()
        adapters.tag_loss(model, query).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad
    model.load_state_dict(initial_state)
    for name, p in model.named_parameters():
        p.grad = total.get(name)
    outer.step()


@needs_peft
def test_peft_loads_what_the_command_primed(tmp_path):
    """One meta step, repeated here by hand with peft, gives the features of the loaded model."""
    import peft
    import transformers

    torch.manual_seed(0)
    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    corpora = [
        adapters.load_sentences("demo/wikiann", name, "train", tokenizer, TYPES, 128, 50) for name in ("en", "es")]
    lora = peft.get_peft_model(encoder, peft.LoraConfig(r=8, lora_alpha=16)).requires_grad_()
    model = adapters.build_tagger(lora, TYPES, None, None, "cpu")
    named = dict(lora.named_parameters())
    theta_a = [named.pop(name) for name in [*named] if ".lora_" in name]
    (tasks,) = prime.sample_batches(corpora, steps=1, tasks=2, support=4, query=4, seed=0)
    hand_written_meta_step(model, [*named.values()], theta_a, tasks, 1e-3)
    folder = tmp_path / "out"
    command("prime.py", *SMALL, "--steps", 1, "--outer-lr", 1e-3, "--output", folder)
    base = transformers.AutoModel.from_pretrained(folder)
    ids = torch.arange(10, 40)[None]
    before = transformers.AutoModel.from_pretrained("demo/encoder")(input_ids=ids).last_hidden_state
    without_lora = base(input_ids=ids).last_hidden_state
    loaded = peft.PeftModel.from_pretrained(base, folder / "lora").eval()(input_ids=ids).last_hidden_state
    expected = lora(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-4)
    assert min((loaded - without_lora).abs().max(), (without_lora - before).abs().max()) > 1e-3
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder) and config["r"] == 8


@needs_peft
def test_a_pipeline_of_a_fresh_process_has_the_score_of_the_command(fresh_process, tmp_path):
    """transformers' pipeline finds the entities that finetune.py was scored with."""
    base, tuned, exported = tmp_path / "primed", tmp_path / "tuned", tmp_path / "exported"
    command("prime.py", *SMALL, "--steps", 10, "--outer-lr", 1e-3, "--output", base)
    command("finetune.py", *HINDI, "--init", base, "--limit-train", 100, "--epochs", 10, "--lr", 1e-2,
            "--save", tuned, "--results", tmp_path / "results")
    (record,) = read_results(tmp_path / "results")
    command("examples/export.py", tuned / "hi-0", exported)
    sentences = adapters.read_split("demo/wikiann", "hi", "test", TYPES)
    (tmp_path / "words.json").write_text(json.dumps([words for words, _ in sentences]))
    printed = fresh_process(f"""
import json, pathlib
folder = pathlib.Path({str(tmp_path)!r})
model, tokenizer = load({str(base)!r}, folder / "exported"), AutoTokenizer.from_pretrained(folder / "exported")
tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
tagged = []
for words in json.loads((folder / "words.json").read_text()):
    starts = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]
    tags = {{piece["start"]: piece["entity"] for piece in tagger(" ".join(words))}}
    tagged.append([tags[start] for start in starts])
print(json.dumps(tagged))
""")
    gold = [[TAGS[tag] for tag in tags] for _, tags in sentences]
    assert record["f1"] > 5 and record["f1"] == pytest.approx(100 * f1_score(gold, json.loads(printed)), abs=1e-9)
    assert score_saved(tuned / "hi-0") == record["f1"]  # load_tagger
    assert record["updated"] == 3 * 2 * 2 * 8 * 96 + 97 * 7  # layers, matrices, A and B, rank, width; head


@needs_peft
def test_logits_are_the_same_after_export_and_loading(fresh_process, tmp_path):
    """For encoders with peft's default layers and for those without, in one fresh process."""
    ids, expected = torch.arange(10, 40)[None], {}
    for architecture in ("Bert", "Roberta", "DistilBert", "Electra"):
        more = {"embedding_size": 16} if architecture == "Electra" else {}
        folder = save_encoder(random_encoder(architecture, 1834, **more), tmp_path / architecture)
        encoder, _ = adapters.load_encoder(str(folder), 16)
        model = adapters.build_tagger(encoder, TYPES, "lora", 4, "cpu")
        for p in model.split_parameters().a.values():
            torch.nn.init.normal_(p, std=0.3)  # B starts at zero
        with torch.no_grad():
            expected[architecture] = model.head(model.encoder(input_ids=ids).last_hidden_state)
        exported = export.to_peft(model, TAGS, str(folder))
        exported.save_pretrained(tmp_path / f"{architecture}-tuned")
        exported.get_base_model().config.save_pretrained(tmp_path / f"{architecture}-tuned")
    fresh_process(f"""
for name in {[*expected]!r}:
    model = load({str(tmp_path)!r} + f"/{{name}}", {str(tmp_path)!r} + f"/{{name}}-tuned")
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(10, 40)[None]).logits, {str(tmp_path)!r} + f"/{{name}}.pt")
""")
    for architecture, logits in expected.items():
        loaded = torch.load(tmp_path / f"{architecture}.pt", weights_only=True)
        torch.testing.assert_close(loaded, logits, rtol=0, atol=1e-6)


@needs_peft
@pytest.mark.parametrize("architecture, layers", [
    ("Bert", {"query", "value"}),
    ("DistilBert", {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}),
    ("Camembert", {"query", "key", "value", "dense"}),
])
def test_lora_is_on_all_linear_layers_but_the_poolers_where_peft_has_no_default(architecture, layers):
    model = adapters.Tagger(random_encoder(architecture, 1834), 7, "lora", 4)
    names = [name.rpartition(".lora_A")[0] for name in model.split_parameters().a if ".lora_A" in name]
    assert {name.rpartition(".")[2] for name in names} == layers
    assert not any("pooler" in name for name, _ in model.named_parameters() if ".lora_" in name)


def test_without_peft_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for script, flags in (("prime.py", [*SMALL, "--output", tmp_path / "out"]),
                          ("finetune.py", [*HINDI, *DEMO[:2], "--init", "none", "--pe", "lora"])):
        (line,) = command(script, *flags, status=2).stderr.splitlines()
        assert line.startswith(f"{script}: --pe lora (pip install peft): ")
    assert not (tmp_path / "out").exists()


@needs_peft
@pytest.mark.parametrize("method", ["meta", "maml", "ft"])
def test_an_interrupted_run_resumes_to_the_same_bits(method, tmp_path):
    flags = [*SMALL, "--steps", 3, "--save-every", 1, "--method", method, "--output"]
    command("prime.py", *flags, tmp_path / "whole")
    run_process("prime.py", [*flags, tmp_path / "resumed"], tmp_path / "stderr", -signal.SIGKILL,
                fault=killed_before_the_second_checkpoint_gets_its_name)
    assert (tmp_path / "resumed/checkpoint.pt").exists()
    command("prime.py", *flags, tmp_path / "resumed")
    for file in ("model.safetensors", "adapter.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "resumed/checkpoint.pt").exists()


@needs_peft
def test_without_priming_lora_on_pefts_default_layers_and_the_head_are_saved(tmp_path):
    command("finetune.py", *HINDI, *DEMO[:2], "--init", "none", "--pe", "lora", "--limit-train", 20,
            "--epochs", 1, "--save", tmp_path / "tuned", "--results", tmp_path / "results")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "tuned/hi-0/tuned.safetensors")
    assert {name.partition(".lora_")[0] for name in saved if ".lora_" in name} == {
        f"encoder.base_model.model.encoder.layer.{layer}.attention.self.{matrix}"
        for layer in range(3) for matrix in ("query", "value")}
    assert {name for name in saved if ".lora_" not in name} == {"head.weight", "head.bias"}


@needs_peft
def test_an_encoder_without_layers_for_lora_ends_with_one_line(tmp_path):
    """SqueezeBERT has convolutions only."""
    import transformers

    config = transformers.SqueezeBertConfig(
        vocab_size=1834, hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16)
    encoder = save_encoder(transformers.AutoModel.from_config(config), tmp_path / "encoder")
    flags = ["--model", encoder, "--output", tmp_path / "out"]
    (line,) = command("prime.py", *SMALL, *flags, status=2).stderr.splitlines()
    assert line.startswith("prime.py: --pe lora (pip install peft") and not (tmp_path / "out").exists()


@needs_peft
def test_the_default_rank_may_be_given_again(tmp_path):
    flags = [*SMALL, "--steps", 1, "--output", tmp_path / "primed"]
    command("prime.py", *flags)
    assert "is complete" in command("prime.py", *flags, "--bottleneck", 8).stdout
    tuning = [*HINDI, "--init", tmp_path / "primed", "--limit-train", 20, "--epochs", 1, "--results", tmp_path]
    command("finetune.py", *tuning)
    assert "done before" in command("finetune.py", *tuning, "--bottleneck", 8).stdout
