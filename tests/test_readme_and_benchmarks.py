"""README and the benchmarks' README: line numbers, code, figures and tables are right.

Figures are recomputed from the lines of benchmarks/results/, with Student's t from a table."""

import copy
import json
import re
import statistics

import pytest
import torch
import transformers
from conftest import DEMO, HERE, PE, SMALL_PRIMING, SMALL_TUNING, command, moved, needs_peft, read_results

import adapters
import experiments
from test_prime import IN_THETA_A

README = (HERE / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (HERE / "benchmarks/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRIMING_BLOCKS = [block for block in BLOCKS if " in prime(" in block]
T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}  # Student's t by degrees of freedom


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ---- README ----


def test_the_line_numbers_of_algorithm_1_are_those_of_its_comments():
    """Each row of README that links to a line of prime.py begins with a line of the paper, or with "red"."""
    code = (HERE / "prime.py").read_text(encoding="utf-8").splitlines()
    found = set()
    for row in re.findall(r"^\|.*prime\.py#L\d+.*", README, re.MULTILINE):
        name = cells_of(row)[0]
        ((text, number),) = re.findall(r"\[`?(\d+)`?\]\(prime\.py#L(\d+)\)", row)
        assert text == number, row
        comment = r"# .*red line" if name == "red" else rf"# {name}\b"
        assert re.search(comment, code[int(number) - 1]), (row, code[int(number) - 1])
        found.add(name)
    assert found >= {"1", "2", "3", "4", "5", "6", "red", "9"}


def small_bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, num_labels=3)
    return transformers.BertForTokenClassification(config)


def add_adapter(model):
    """Adds a module named `adapter` after the encoder."""
    model.bert.adapter = adapters.Adapter(16, 4)

    def apply_adapter(module, inputs, output):
        output.last_hidden_state = model.bert.adapter(output.last_hidden_state)
        return output

    model.bert.encoder.register_forward_hook(apply_adapter)


def small_scope(model):
    """What README's code expects: a model, two small batches of two tasks, and a loss."""
    def sample_set():
        return {"input_ids": torch.randint(50, (2, 6)), "labels": torch.randint(3, (2, 6))}

    batches = [[(sample_set(), sample_set())] * 2] * 2
    return {"model": model, "batches": batches, "loss": lambda model, batch: model(**batch).loss}


def sets_of(scope):
    return [scope[name] for name in ("theta_p", "theta_a", "theta_h")]


def run_block(code, scope):
    exec(re.sub(r"steps=\d+", "steps=2", code), scope)


def test_every_python_block_of_readme_runs_and_primes_all_of_the_model(monkeypatch, tmp_path):
    """A block that does not prime continues the one above it."""
    if any("peft" in block for block in BLOCKS):
        pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    assert PRIMING_BLOCKS
    scope = {}
    for code in BLOCKS:
        if code not in PRIMING_BLOCKS:
            run_block(code, scope)
            continue
        model = small_bert()
        if "peft" not in code:
            add_adapter(model)
        before = [p.detach().clone() for p in model.parameters()]
        scope = small_scope(model)
        run_block(code, scope)
        after = [p for part in sets_of(scope) for p in part.values()]
        assert all(sets_of(scope)) and len({id(p) for p in after}) == len(after) >= len(before)
        still = [p for p in after if any(p.shape == old.shape and torch.equal(p, old) for old in before)]
        assert len(still) <= 2  # at most the biases of keys, on which attention does not depend


@needs_peft
def test_readmes_peft_model_is_loaded_as_it_was_primed_with_a_new_head(monkeypatch, tmp_path):
    """Base and LoRA have the primed values, the head has others, and only LoRA and head are trained."""
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in PRIMING_BLOCKS if "peft" in block]
    (loading,) = [block for block in BLOCKS if "is_trainable=True" in block]
    scope = small_scope(small_bert())
    run_block(code, scope)
    theta_p, theta_a, theta_h = sets_of(scope)
    primed = {name: p.detach().clone() for name, p in {**theta_p, **theta_a}.items()}
    run_block(loading, scope)
    loaded = dict(scope["model"].named_parameters())
    names = primed.keys() - {name for name in primed if "original_module" in name}
    assert len(names) > 30 and not moved({name: loaded[name] for name in names}, primed)
    assert any(not torch.equal(loaded[name], p) for name, p in theta_h.items())
    assert {name for name, p in loaded.items() if p.requires_grad} == {*theta_a, *theta_h}


@needs_peft
@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config", "PrefixTuningConfig"])
def test_readmes_lines_for_peft_prime_other_methods_too(config):
    """They update θp, θa and θh, and all of θa gets a gradient."""
    (code,) = [block for block in PRIMING_BLOCKS if "peft" in block]
    code = code.partition("model.save_pretrained")[0]
    more = ", num_virtual_tokens=4" if config == "PrefixTuningConfig" else ""
    code = code.replace("LoraConfig", config).replace('task_type="TOKEN_CLS"', f'task_type="TOKEN_CLS"{more}')
    model = small_bert()
    head, layer = (copy.deepcopy(module.weight) for module in
                   (model.classifier, model.bert.encoder.layer[0].output.dense))
    scope = small_scope(model)
    run_block(code, scope)
    theta_p, theta_a, theta_h = sets_of(scope)
    assert theta_p and theta_a and {name.rpartition(".")[2] for name in theta_h} == {"weight", "bias"}
    assert all(p.grad is not None and p.grad.any() for p in theta_a.values())
    (now,) = [p for n, p in theta_p.items() if "layer.0.output.dense" in n and p.shape == layer.shape]
    assert not torch.equal(now, layer) and not any(torch.equal(p, head) for p in theta_h.values())


@pytest.mark.parametrize("pe", PE)
def test_the_numbers_of_parameters_in_the_benchmarks_readme_are_those_counted_by_hand(pe):
    assert f"| `{pe}` | {IN_THETA_A[pe]:,} |" in BENCHMARKS


FINE_TUNING = ["finetune.py", "--tgt", "hi", "--data", "demo/wikiann", "--seeds", *range(5), "--results", "OUT/results"]


@pytest.mark.early(
    ["prime.py", "--src", "en", "es", *DEMO, "--steps", 400, "--output", "OUT/primed"],
    [*FINE_TUNING, "--init", "none", "--model", "demo/encoder"],
    [*FINE_TUNING, "--init", "OUT/primed"])
def test_priming_gains_ten_points_on_hindi_with_every_seed(early):
    """README's first commands. The demo was built to show this: it tests the code, not the method."""
    folder, _ = early
    f1 = {}
    for record in read_results(folder / "results"):
        f1.setdefault(record["seed"], []).append(record["f1"])
    assert len(f1) == 5 and all(primed - not_primed >= 10 for not_primed, primed in f1.values()), f1


def test_every_command_of_readme_runs_one_after_the_other_in_one_folder(tmp_path, monkeypatch):
    """With the demo's encoder and data and small sizes appended, as the later flag counts."""
    (tmp_path / "demo").symlink_to(HERE / "demo")
    (tmp_path / "sentences.txt").write_text("Jan woont in Utrecht\n")
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    lines = [line.partition("#")[0].split() for text in blocks.splitlines() for line in text.split("&&")]
    lines = [words for words in lines if words[:1] == ["python"] and not words[1].startswith("benchmarks/")]
    assert len(lines) == 19
    for _, script, *flags in lines:
        if script == "prime.py":
            flags += [*DEMO, *SMALL_PRIMING, "--bottleneck", 4]
        if script == "finetune.py":
            flags += [*DEMO[2:], *SMALL_TUNING, "--epochs", 1, "--seeds", 0]
            flags += [*DEMO[:2], "--bottleneck", 4] if "none" in flags else []
        command(script, *flags)
    assert len(read_results(tmp_path / "results")) > 40


# ---- results of README ----


def f1_of(priming, target, train_size):
    """F1 by seed on the test split, with the priming's own tuning. Head tuning is `none` in the file."""
    key = {"tuning": " ".join(experiments.tuning_flags(priming, train_size)), "target": target,
           "asked": train_size, "split": "test"}
    text = (HERE / "benchmarks/results/evidence.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if key.items() <= line.items()]
    return {line["seed"]: line["f1"] for line in lines
            if line["priming"].removesuffix("-head") == priming.removesuffix("-head")}


def test_readmes_table_of_results_is_that_of_the_kept_runs():
    names = {"1": "full", "2": "none-head", "3": "none", "4": "meta", "5": "ft", "6": "maml", "7": "one-step"}
    lines = README.splitlines()
    (head,) = [i for i, line in enumerate(lines) if re.search(r"^\|.*\| nl, [\d,]+ \|", line)]
    columns = [(cell[:2], int(cell[4:].replace(",", ""))) if re.match("(nl|ru), ", cell) else None
               for cell in cells_of(lines[head])]
    rows = {}
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        name = re.match(r"\d( − \d)?", cells_of(line)[0])[0]
        rows[name] = [(column, cell) for column, cell in zip(columns, cells_of(line), strict=True) if column]
    assert rows.keys() == {*names, "4 − 5"} and len(rows["4"]) >= 4
    for name, row in rows.items():
        for column, cell in row:
            one, *others = [f1_of(names[number], *column) for number in name.split(" − ")]
            values = [one[seed] - sum(other[seed] for other in others) for seed in one]
            spread = statistics.stdev(values)
            if others:
                spread *= T_975[len(values) - 1] / len(values) ** 0.5
            sign = "+" if others else ""
            assert cell.replace(" ", "") == f"{statistics.mean(values):{sign}.2f}±{spread:.2f}", (name, column)


@pytest.fixture(scope="module")
def printed():
    """All that the commands `experiments.py --report` of the benchmarks' README print."""
    commands = re.findall(r"^python benchmarks/experiments\.py (--report.*)", BENCHMARKS, re.MULTILINE)
    assert len(commands) >= 3
    flags = [line.partition("--picture")[0].split() for line in commands]
    return [command("benchmarks/experiments.py", *words).stdout for words in flags]


def test_the_tables_of_the_experiments_are_those_that_their_commands_print(printed):
    """No row is missing, and none is left from older results."""
    rows = [{line for line in output.splitlines() if line.startswith("| ")} for output in printed]
    assert all(len(part) > 5 for part in rows)
    in_readme = {line for line in BENCHMARKS.splitlines() if line.startswith("| ")}
    assert set().union(*rows) <= in_readme
    names = "|".join(re.escape(name) for name in experiments.PRIMING)
    of_experiments = {line for line in in_readme if re.match(rf"\| \(?({names})( − .*)? \|", line)}
    assert of_experiments <= set().union(*rows)


@pytest.mark.parametrize("text", [README, BENCHMARKS], ids=["README", "benchmarks"])
def test_the_differences_in_the_text_are_those_of_the_tables(text, printed):
    """Each `mean ± half-width` with two digits and a sign is in a table."""
    tables = "".join(printed).replace("-", "−")
    figures = re.findall(r"[+−]\d+\.\d\d ± \d+\.\d\d", " ".join(text.split()))
    assert len(figures) > 3
    assert [figure for figure in figures if figure not in tables] == []
