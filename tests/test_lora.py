"""examples/lora.py: Algorithm 1 with peft's LoRA as θa, and what it saves for transformers and peft."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from seqeval.metrics import f1_score
from test_long_runs import killed_before_the_second_checkpoint_gets_its_name

import adapters
import prime
from conftest import DEMO, TAGS, TYPES, command, needs_peft, random_encoder, run_process, save_encoder

SMALL = [*DEMO, "--limit-train", 50, "--support", 4, "--query", 4]
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


def fresh_process(code):
    """Runs the code after LOAD, with warnings as errors, and returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    """One meta step, repeated here by hand, gives the features of the loaded model."""
    import lora
    import peft
    import transformers

    torch.manual_seed(0)
    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    corpora = [
        adapters.load_sentences("demo/wikiann", name, "train", tokenizer, TYPES, 128, 50) for name in ("en", "es")]
    primed = lora.add_lora(encoder, 8)
    model = adapters.build_tagger(primed, TYPES, None, 0, "cpu")
    named = dict(primed.named_parameters())
    theta_a = [named.pop(name) for name in [*named] if ".lora_" in name]
    (tasks,) = prime.sample_batches(corpora, steps=1, tasks=2, support=4, query=4, seed=0)
    hand_written_meta_step(model, [*named.values()], theta_a, tasks, 1e-3)
    folder = tmp_path / "out"
    command("examples/lora.py", "prime", *SMALL, "--steps", 1, "--outer-lr", 1e-3, "--output", folder)
    base = transformers.AutoModel.from_pretrained(folder)
    ids = torch.arange(10, 40)[None]
    before = transformers.AutoModel.from_pretrained("demo/encoder")(input_ids=ids).last_hidden_state
    without_lora = base(input_ids=ids).last_hidden_state
    loaded = peft.PeftModel.from_pretrained(base, folder / "lora").eval()(input_ids=ids).last_hidden_state
    expected = primed(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-4)
    assert min((loaded - without_lora).abs().max(), (without_lora - before).abs().max()) > 1e-3


@needs_peft
def test_a_pipeline_of_a_fresh_process_has_the_score_of_the_command(tmp_path):
    """transformers' pipeline finds the entities that `lora.py tune` was scored with."""
    base = tmp_path / "primed"
    command("examples/lora.py", "prime", *SMALL, "--steps", 10, "--outer-lr", 1e-3, "--output", base)
    flags, results = [*DEMO, "--init", base, "--limit-train", 100, "--epochs", 10], tmp_path / "results.jsonl"
    command("examples/lora.py", "tune", *flags, "--lr", 1e-2, "--save", tmp_path / "tuned", "--results", results)
    record = json.loads(results.read_text())
    sentences = adapters.read_split("demo/wikiann", "hi", "test", TYPES)
    (tmp_path / "words.json").write_text(json.dumps([words for words, _ in sentences]))
    printed = fresh_process(f"""
import json, pathlib
folder = pathlib.Path({str(tmp_path)!r})
model, tokenizer = load({str(base)!r}, folder / "tuned"), AutoTokenizer.from_pretrained(folder / "tuned")
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


@needs_peft
def test_logits_are_the_same_after_saving_and_loading(tmp_path):
    """For encoders with peft's default layers and for those without, in one fresh process."""
    import lora

    ids, expected = torch.arange(10, 40)[None], {}
    for architecture in ("Bert", "Roberta", "DistilBert", "Electra"):
        more = {"embedding_size": 16} if architecture == "Electra" else {}
        folder = save_encoder(random_encoder(architecture, 1834, **more), tmp_path / architecture)
        encoder, _ = adapters.load_encoder(str(folder), 16)
        model = adapters.build_tagger(lora.add_lora(encoder, 4), TYPES, None, 0, "cpu")
        for p in lora.split_parameters(model).a.values():
            torch.nn.init.normal_(p, std=0.3)  # B starts at zero
        with torch.no_grad():
            expected[architecture] = model.head(model.encoder(input_ids=ids).last_hidden_state)
        lora.save_for_transformers(model, TAGS, str(folder), 4, tmp_path / f"{architecture}-tuned")
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
def test_lora_is_on_all_linear_layers_but_the_poolers_where_peft_has_no_default(demo):
    import lora

    names = {
        architecture: {
            name.rpartition(".lora_A")[0].rpartition(".")[2]
            for name, _ in lora.add_lora(random_encoder(architecture, 1834), 4).named_parameters()
            if ".lora_A" in name}
        for architecture in ("Bert", "DistilBert", "Camembert")}
    assert names["Bert"] == {"query", "value"}
    assert names["DistilBert"] == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    assert names["Camembert"] == {"query", "key", "value", "dense"}


def test_without_peft_and_with_an_existing_folder_there_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    for action, flag, problem in (("prime", "--output", "holds other files"), ("tune", "--save", "already exists")):
        (line,) = command(
            "examples/lora.py", action, *DEMO, flag, tmp_path / "mine", status=2).stderr.splitlines()
        assert f"mine {problem}: choose another" in line
    monkeypatch.setitem(sys.modules, "peft", None)
    (line,) = command(
        "examples/lora.py", "prime", *SMALL, "--output", tmp_path / "out", status=2).stderr.splitlines()
    assert "pip install peft" in line and not (tmp_path / "out").exists()


@needs_peft
@pytest.mark.parametrize("method", ["meta", "maml", "ft"])
def test_an_interrupted_run_resumes_to_the_same_bits(method, tmp_path):
    flags = ["prime", *SMALL, "--steps", 3, "--save-every", 1, "--method", method, "--output"]
    command("examples/lora.py", *flags, tmp_path / "whole")
    run_process("examples/lora.py", [*flags, tmp_path / "resumed"], tmp_path / "stderr", -signal.SIGKILL,
                fault=killed_before_the_second_checkpoint_gets_its_name)
    assert (tmp_path / "resumed/checkpoint.pt").exists()
    command("examples/lora.py", *flags, tmp_path / "resumed")
    for file in ("model.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "resumed/checkpoint.pt").exists()
    again = command("examples/lora.py", *flags, tmp_path / "resumed")
    assert again.stdout == f"{tmp_path}/resumed is complete\n"
    line = command("examples/lora.py", *flags, tmp_path / "resumed", "--inner-lr", 0.5, status=2).stderr
    assert "holds a run with inner-lr 0.03 (now 0.5)" in line
