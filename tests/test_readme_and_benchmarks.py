"""What README says is so: its Python runs, its line numbers and counts are right, and the benchmarks run."""

import copy
import json
import re
import shutil
import statistics
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DEMO, EXTRA, HERE, PE, command, folder_of, moved, random_encoder, read_results

import adapters
from test_prime import IN_THETA_A

README = (HERE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_line_numbers_of_algorithm_1_are_right():
    """In a row that begins with a line of the paper, a cell is a line of prime.py, with its comment."""
    table = README.partition("Algorithm 1 in the code")[2].partition("\n## ")[0]
    code = (HERE / "prime.py").read_text(encoding="utf-8").splitlines()
    told = []
    for row in re.findall(r"^\| *(?:\d+|red)\b.*", table, re.MULTILINE):
        first, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        found = [re.fullmatch(r"\[?`?(\d+)`?\]?(\(prime\.py#L(\d+)\))?", cell) for cell in cells]
        (number,) = [match for match in found if match]
        assert number[3] in (None, number[1]), row
        line = code[int(number[1]) - 1]
        assert re.search(r"# .*red line" if first == "red" else rf"# {first}\b", line), (row, line)
        told.append(first)
    assert {*told} >= {"1", "2", "3", "4", "5", "6", "9"}


def small_bert():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, num_labels=3)
    return transformers.BertForTokenClassification(config)


def run_snippet(code, scope):
    """With two batches of two small tasks, in the place of a thousand."""
    def part():
        return {"input_ids": torch.randint(50, (2, 6)), "labels": torch.randint(3, (2, 6))}

    given = {"batches": [[(part(), part())] * 2] * 2, "loss": lambda model, batch: model(**batch).loss}
    scope.update({name: value for name, value in given.items() if name not in scope})
    exec(re.sub(r"steps=\d+", "steps=2", code), scope)


def sets_of(scope):
    return [scope[name] for name in ("theta_p", "theta_a", "theta_h")]


def test_every_python_block_of_the_readme_runs_and_primes_the_model(monkeypatch, tmp_path):
    """It moves θp, θa and θh. A block that does not prime goes on from the one before."""
    if "peft" in "".join(SNIPPETS):
        pytest.importorskip("peft", reason="an extra: pip install peft")
    monkeypatch.chdir(tmp_path)
    assert SNIPPETS
    for code in SNIPPETS:
        if "import adamw_with_linear_decay, prime" in code:
            torch.manual_seed(0)
            model = small_bert()
            model.bert.adapter = adapters.Adapter(16, 4)  # a part whose name says so
            model.bert.encoder.register_forward_hook(given_to(model.bert.adapter))
            scope = {"model": model, "pretrained": copy.deepcopy(model)}
            before = [p.detach().clone() for p in model.parameters()]
        run_snippet(code, scope)
        after = [p for part in sets_of(scope) for p in part.values()]
        assert all(sets_of(scope)) and len({id(p) for p in after}) == len(after)
        still = [p for p in after if any(p.shape == old.shape and torch.equal(p, old) for old in before)]
        assert len(still) <= 2 * 1  # at most the biases of keys, on which attention does not depend
        if "later" in scope:  # what was kept of a primed model of peft, loaded into the pretrained one
            kept, primed = scope["later"].state_dict(), scope["model"].state_dict()
            assert kept.keys() == primed.keys() and not moved(kept, primed)


def given_to(adapter):
    def hook(module, inputs, output):
        output.last_hidden_state = adapter(output.last_hidden_state)
        return output

    return hook


@EXTRA
@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config", "PrefixTuningConfig"])
def test_the_lines_for_peft_prime_other_methods_too(config):
    """They move θp, θa and θh, and all of θa gets a gradient."""
    (code,) = [code for code in SNIPPETS if "get_peft_model" in code]
    more = ", num_virtual_tokens=4" if config == "PrefixTuningConfig" else ""
    code = code.replace("LoraConfig", config).replace('task_type="TOKEN_CLS"', f'task_type="TOKEN_CLS"{more}')
    torch.manual_seed(0)
    model = small_bert()
    head, layer = (copy.deepcopy(module.weight) for module in
                   (model.classifier, model.bert.encoder.layer[0].output.dense))
    scope = {"model": model}
    run_snippet(code, scope)
    sets = sets_of(scope)
    assert all(sets) and {name.rpartition(".")[2] for name in sets[2]} == {"weight", "bias"}
    assert all(p.grad is not None and p.grad.any() for p in sets[1].values())
    (now,) = [p for n, p in sets[0].items() if "layer.0.output.dense" in n and p.shape == layer.shape]
    assert not torch.equal(now, layer) and not any(torch.equal(p, head) for p in sets[2].values())


@pytest.mark.parametrize("pe", PE)
def test_the_counts_of_parameters_that_are_told_are_those_counted_by_hand(pe):
    told = (HERE / "benchmarks/README.md").read_text(encoding="utf-8")
    assert f"| `{pe}` | {IN_THETA_A[pe]:,} |" in told


def test_the_example_primes_an_mlp_for_sine_waves():
    """After 100 steps of SGD on ten points, the primed MLP is closer to waves that neither has seen."""
    first, *rows = command("examples/sinusoid.py").stdout.splitlines()[1:]
    told = [float(row.split()[-1]) for row in rows]
    assert len(first.split()) == 3 + 11 and len(told) == 4
    assert told[3] < 0.5 * min(told[:3])
    assert len((HERE / "examples/sinusoid.py").read_text(encoding="utf-8").splitlines()) <= 70


def test_priming_gains_ten_points_on_hindi_with_every_seed(tmp_path):
    """The README's first command. The demo was built to show it: this tests the code, not the method."""
    command("prime.py", "--src", "en", "es", *DEMO, "--steps", 400, "--output", tmp_path / "primed")
    seeds = ["--seeds", *range(5), "--results", tmp_path / "results"]
    base = ["--tgt", "hi", "--data", "demo/wikiann", *seeds]
    command("finetune.py", *base, "--init", "none", "--model", "demo/encoder")
    command("finetune.py", *base, "--init", tmp_path / "primed")
    scores = {}
    for line in read_results(tmp_path / "results"):
        scores.setdefault(line["seed"], []).append(line["f1"])
    assert len(scores) == 5 and all(primed - plain >= 10 for plain, primed in scores.values()), scores


# ---- benchmarks ----


def evidence(priming, tuning, target, sentences):
    """F1 by seed, of the test split."""
    wanted = {"priming": priming, "tuning": tuning, "target": target, "asked": sentences, "split": "test"}
    lines = (HERE / "benchmarks/results/evidence.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["seed"]: line["f1"] for line in map(json.loads, lines) if wanted.items() <= line.items()}


def test_the_tables_of_the_evidence_are_those_that_its_command_prints():
    told = (HERE / "benchmarks/README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.split()[2:] for line in told if line.startswith("python benchmarks/evidence.py --report")]
    assert len(commands) == 3
    for flags in commands:
        flags = flags[: flags.index("--picture")] if "--picture" in flags else flags
        printed = command("benchmarks/evidence.py", *flags).stdout.splitlines()
        rows = [line for line in printed if line.startswith("| ")]
        assert len(rows) > 5 and {*rows} <= {*told}


def test_the_results_that_readme_tells_are_those_of_the_kept_runs():
    """Means and standard deviations over seeds, and the paired intervals, with Student's t from a table."""
    few = "--min-steps 750"
    runs = {
        "1": ("full", f"--tune full --lr 5e-5 --epochs 3 {few}"), "2": ("none", f"{few} --tune head --lr 3e-2"),
        "3": ("none", few), "4": ("meta", ""), "5": ("ft", ""), "6": ("maml", ""), "7": ("one-step", ""),
    }
    table = README.partition("## Results")[2].partition("\n- ")[0]
    head, _, *rows = [[cell.strip() for cell in row.split("|")[2:-1]] for row in re.findall(r"^\|.*", table, re.M)]
    names = re.findall(r"^\| (\d(?: − \d)?)", table, re.M)
    columns = [(cell[:2], int(cell[4:].replace(",", ""))) for cell in head if cell[:2] in ("nl", "ru")]
    assert names == ["1", "2", "3", "4", "5", "6", "7", "4 − 5"] and len(columns) >= 4
    for name, row in zip(names, rows, strict=True):
        for (target, sentences), cell in zip(columns, row):
            one, *others = [evidence(*runs[number], target, sentences) for number in name.split(" − ")]
            f1 = [one[seed] - sum(other[seed] for other in others) for seed in sorted(one)]
            spread = statistics.stdev(f1)
            half = 2.776 * spread / 5**0.5 if others else spread  # t of 0.975 with four degrees of freedom
            assert len(f1) == 5 or not others
            sign = "+" if others else ""
            assert cell == f"{statistics.mean(f1):{sign}.2f}±{half:.2f}", (name, target, sentences)


def test_the_benchmark_of_a_step_runs():
    done = command("benchmarks/step.py", "--rounds", 1)  # it compares the meta-gradients of all ways itself
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows][:3] == ["| step", "| fine-tuning step", "| fine-tuning step, padded"]
    assert "relative difference" in done.stdout and float(rows[1][1]) == 1


def test_the_plot_of_the_inner_rate_shows_what_the_runs_ended_with(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")

    def in_this_process(words, **_):
        words = [str(word) for word in words]
        status = 2 if any(word.endswith("/maml-1") for word in words) else 0  # 1e4 stops that run
        flags = ["1e4" if status and word == "1" else word for word in words[2:]]
        return Namespace(**vars(command(Path(words[1]).name, *flags, status=status)), returncode=status)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    encoder = folder_of(random_encoder("Bert", 1834), tmp_path / "encoder")
    flags = ["--model", encoder, "--data", "demo/wikiann", "--output", tmp_path]
    flags += ["--steps", 3, "--support", 4, "--query", 4, "--limit-train", 50]
    for picture in ("one.svg", "two.svg"):  # the second time from what the first has left
        done = command("benchmarks/inner_rate.py", *flags, "--picture", tmp_path / picture)
        lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        head, ours, maml = [line.strip("| ").split(" | ") for line in lines]
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert head[1:] == ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"] and maml[-1] == "nan"
    losses = json.loads((tmp_path / "meta-1e-1/priming.json").read_text())["last_losses"]
    assert ours[5] == f"{statistics.mean(losses) / 2:.3f}"


def test_table_1_is_what_its_runs_found(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")
    for language in ("en", "es", "hi", "af"):
        shutil.copytree(f"demo/wikiann/{language}", tmp_path / "data" / language)
    train, test = (tmp_path / "data/hi" / f"{split}.txt" for split in ("train", "test"))
    repeated = "\n\n".join(train.read_text().split("\n\n")[:7])
    test.write_text(f"{repeated}\n\n{test.read_text()}")

    def in_this_process(words, **_):
        small = ["--limit-train", 50, "--support", 4, "--query", 4] if words[1].endswith("prime.py") else []
        command(Path(words[1]).name, *words[2:], *small)
        return Namespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", in_this_process)
    flags = [
        "--model", "demo/encoder", "--data", tmp_path / "data", "--tgt", "hi", "af", "--rows", 1, 3, 4, 5,
        "--one-seed", 1, "--seeds", 0, 1, "--steps", 2, "--limit-train", 100, "--limit-test", 40,
        "--distinct", "hi", "--output", tmp_path / "t",
    ]
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    told = [command("benchmarks/table1.py", *flags, "--picture", picture).stdout for picture in pictures]
    assert told[0] == told[1] and pictures[0].read_bytes() == pictures[1].read_bytes()
    command("benchmarks/table1.py", *flags, "--steps", 3, status=2)
    f1 = {}
    for row in (1, 3, 4, 5):
        lines = read_results(tmp_path / f"t/row-{row}/official")
        f1[row] = {(line["target"], line["seed"]): line["f1"] for line in lines}
    assert [len(of_row) for of_row in f1.values()] == [2, 4, 4, 4]  # nothing twice

    def cells(values, digits):
        columns = [[values[target, seed] for seed in (0, 1)] for target in ("hi", "af")]
        columns.append([statistics.mean(pair) for pair in zip(*columns)])
        return [f"{statistics.mean(c):.{digits}f} ± {statistics.stdev(c):.{digits}f}" for c in columns]

    rows = [line.strip("| ").split(" | ") for line in told[0].splitlines()]
    assert ["4 Meta Priming → AT", *cells(f1[4], 2)] in rows
    assert ["4 − 5", *cells({key: f1[4][key] - f1[5][key] for key in f1[4]}, 2)] in rows
    low = {target: statistics.mean(f1[3][target, seed] for seed in (0, 1)) for target in ("hi", "af")}
    shares = {(t, s): 100 * (f1[4][t, s] - low[t]) / (f1[1][t, 0] - low[t]) for t, s in f1[4]}
    assert ["Meta Priming → AT", *cells(shares, 0)] in rows
    assert "hi: 7 of 40 test sentences are training sentences too" in told[0]
    lines = read_results(tmp_path / "t/row-4/distinct")
    assert [(line["target"], line["seed"], line["test_sentences"]) for line in lines] == [("hi", 0, 33)]
    assert ["4 Meta Priming → AT", *2 * [f"{lines[0]['f1'] - f1[4]['hi', 0]:.2f}"]] in rows
