"""The benchmarks measure what they say, and print what they measured. All run on the demo."""

import ast
import copy
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    DEMO, HERE, HINDI, SMALL_PRIMING, SMALL_TUNING, command, moved, random_encoder, read_results, save_encoder,
    tensors,
)

import ablate_new_heads
import adapters
import experiments
import inner_lr_sweep
import joint_priming
import report
import table1

T_975 = 4.30265  # Student's t for two degrees of freedom


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ---- experiments.py ----


def test_shares_and_differences_of_differences_are_per_seed(tmp_path):
    """Two targets and three seeds, with every cell computed here."""
    f1 = {"none": (20, 1), "full": (80, -1), "meta": (60, 2), "ft": (55, 0.5), "meta-1000": (70, 3),
          "ft-1000": (69, -2)}
    noise = {("nl", 0): 1.0, ("nl", 1): -2.0, ("nl", 2): 4.0, ("ru", 0): 0.5, ("ru", 1): 3.0, ("ru", 2): -1.0}
    values = {}
    for name, (mean, factor) in f1.items():
        for (target, seed), x in noise.items():
            values[name, target, seed] = mean + factor * x
            line = {"priming": name, "tuning": " ".join(experiments.tuning_flags(name, 200)), "split": "test",
                    "seed": seed, "asked": 200, "target": target, "f1": values[name, target, seed]}
            report.append_line(tmp_path / "lines.jsonl", line)
    output = command("benchmarks/experiments.py", "--report", "--results", tmp_path / "lines.jsonl").stdout
    printed = [cells_of(line) for line in output.splitlines() if line.startswith("| ")]
    rows = {tuple(row[:2]): row[2:] for row in printed}

    def over_seeds(function):
        """By target and for their mean, taken per seed: the values of function(F1 by priming) over seeds."""
        columns = [[{name: values[name, target, seed] for name in f1} for seed in range(3)]
                   for target in ("nl", "ru")]
        columns.append([{name: (a[name] + b[name]) / 2 for name in f1} for a, b in zip(*columns)])
        return [[function(seed, column) for seed in column] for column in columns]

    def share(seed, column):
        low, high = (statistics.mean(other[name] for other in column) for name in ("none", "full"))
        return 100 * (seed["meta"] - low) / (high - low)

    expected = [f"{statistics.mean(x):.1f} ± {statistics.stdev(x):.1f} (3)" for x in over_seeds(share)]
    assert rows["meta", "200"] == expected
    second = over_seeds(lambda s, _: (s["meta"] - s["ft"]) - (s["meta-1000"] - s["ft-1000"]))
    half = [T_975 * statistics.stdev(x) / 3**0.5 for x in second]
    expected = [f"{statistics.mean(x):+.2f} ± {h:.2f} (3)" for x, h in zip(second, half)]
    assert rows["(meta − ft) − (meta-1000 − ft-1000)", "200"] == expected


def test_an_experiment_primes_once_and_never_repeats_a_result(tmp_path):
    calls = []

    def run(script, *flags):
        flags = dict(zip(flags[::2], flags[1::2]))
        calls.append((script, flags.get("--tgt"), flags.get("--limit-train")))
        folder = Path(flags.get("--output") or flags["--results"])
        folder.mkdir(parents=True)
        record = dict.fromkeys(experiments.KEPT, 0)
        record |= {"target": flags.get("--tgt"), "split": flags.get("--split")}
        (folder / "priming.json").write_text(json.dumps(record))

    options = {"model": "demo/encoder", "data": "demo/wikiann", "split": "test", "limit_test": 10,
               "more_tuning": [], "output": tmp_path / "out", "results": tmp_path / "lines.jsonl", "run": run}
    experiments.run_experiments("meta", 0, targets=["hi"], sizes=[50, 100], **options)
    experiments.run_experiments("meta", 0, targets=["hi", "af"], sizes=[100], **options)
    tuning = [("finetune.py", "hi", 50), ("finetune.py", "hi", 100), ("finetune.py", "af", 100)]
    assert calls == [("prime.py", None, None), *tuning]
    lines = report.read_lines(tmp_path / "lines.jsonl")
    assert [(line["target"], line["asked"]) for line in lines] == [("hi", 50), ("hi", 100), ("af", 100)]
    assert all({"commit", "model_crc32", "data_crc32", "versions"} <= line.keys() for line in lines)


def test_older_lines_with_lora_get_the_flags_that_finetune_py_needs(tmp_path):
    line = {"priming": "lora-ft", "asked": 200, "tuning": "--min-steps 250"}
    report.append_line(tmp_path / "lines.jsonl", line)
    report.append_line(tmp_path / "lines.jsonl", {**line, "tuning": "--min-steps 250 --lr 3e-3"})
    report.append_line(tmp_path / "lines.jsonl", {**line, "tuning": "--pe lora --min-steps 250"})
    tuning = [line["tuning"] for line in experiments.read_results(tmp_path / "lines.jsonl")]
    assert tuning == ["--pe lora --min-steps 250 --lr 1e-3", "--pe lora --min-steps 250 --lr 3e-3",
                      "--pe lora --min-steps 250"]


# ---- other benchmarks ----


def test_feature_scale_prints_alpha_times_the_mean_squared_norm_of_the_scaled_features():
    """f(x) is taken here from the encoder itself, a sentence at a time."""
    flags = ["--steps", 1, "--limit-train", 40]
    output = command("benchmarks/feature_scale.py", *DEMO, *flags).stdout
    _, *rows = [cells_of(line) for line in output.splitlines() if line.startswith("| ")]
    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128)
    options = tokenizer, ["PER", "ORG", "LOC"], 128
    sentences = adapters.load_sentences("demo/wikiann", "en", "train", *options, 40)
    with torch.no_grad():
        words = [encoder(torch.tensor([s.input_ids])).last_hidden_state[0, s.word_starts] for s in sentences]
    square = torch.cat(words).square().sum(-1).mean().item()
    assert len(rows) == 6 and {row[0] for row in rows} == {"1.00", "3.16", "0.32"}
    for c, alpha, effect, *_ in rows:
        factor = {"1.00": 1, "3.16": 10, "0.32": 0.1}[c]
        assert float(effect) == pytest.approx(float(alpha) * factor * square, rel=1e-5, abs=0.006)


def test_baseline_search_has_the_scores_of_finetune_py_and_repeats_no_try(tmp_path):
    """Whole epochs of 4 steps on 50 sentences: at least 30 steps are 8 epochs."""
    flags = ["--language", "hi", "--sizes", 50, "--steps", 30, "--limit-test", 60]
    flags += ["--results", tmp_path / "lines.jsonl"]
    output = command("benchmarks/baseline_search.py", *flags).stdout
    lines = report.read_lines(tmp_path / "lines.jsonl")
    assert len(lines) == 8 and {(line["epochs"], line["steps"]) for line in lines} == {(8, 32)}
    best = {method: max((line for line in lines if line["method"] == method), key=lambda line: line["f1"])
            for method in ("AT", "HT")}
    assert best["HT"]["f1"] > 0
    for method, tune in (("AT", "adapter"), ("HT", "head")):
        command("finetune.py", "--tgt", "hi", "--init", "none", *DEMO, "--split", "validation",
                "--limit-train", 50, "--limit-test", 60, "--tune", tune, "--lr", best[method]["lr"],
                "--epochs", 8, "--results", tmp_path / method)
        (record,) = read_results(tmp_path / method)
        assert record["f1"] == pytest.approx(best[method]["f1"])
        assert f"| `--lr {best[method]['lr']:g} --epochs 8` | {best[method]['f1']:.2f} |" in output
    assert command("benchmarks/baseline_search.py", *flags).stdout == output
    assert report.read_lines(tmp_path / "lines.jsonl") == lines


def test_new_heads_differ_from_algorithm_1_only_after_its_first_step(tmp_path):
    small = [*DEMO, "--support", 4, "--query", 4, "--limit-train", 50, "--outer-lr", 1e-3]
    primed = {}
    for steps in (1, 2):
        for script in ("prime.py", "benchmarks/ablate_new_heads.py"):
            folder = tmp_path / f"{Path(script).stem}-{steps}"
            command(script, *small, "--steps", steps, "--output", folder)
            primed[folder.name] = tensors(folder)
    assert not moved(primed["prime-1"], primed["ablate_new_heads-1"])
    assert len(moved(primed["prime-2"], primed["ablate_new_heads-2"])) > 20
    head = torch.nn.Linear(400, 100)
    before = copy.deepcopy(head)
    assert [*ablate_new_heads.with_new_heads([[0.5], [0.4]], head)] == [[0.5], [0.4]]
    assert not torch.equal(head.weight, before.weight) and not head.bias.any()
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("pe", ["adapter", "bitfit"])
def test_joint_priming_shares_theta_p_and_nothing_else(pe):
    """Compared with two taggers, one a language, whose θp are the same tensors."""
    sentences = [adapters.Sentence(["a", "b"], [i % 3, 1], [2, 5 + i, 9, 3], [1, 2]) for i in range(12)]
    batches = [[([], sentences[:3]), ([], sentences[3:7])], [([], sentences[7:10]), ([], sentences[10:])]]
    model = adapters.Tagger(random_encoder("Bert", 32), 3, pe).double().eval()
    taggers = [copy.deepcopy(model), copy.deepcopy(model)]
    shared, theta_a, theta_h = (set(part) for part in taggers[0].split_parameters())
    for name in shared:
        module, _, attribute = name.rpartition(".")
        setattr(taggers[1].get_submodule(module), attribute, taggers[0].get_parameter(name))
    parameters = {*taggers[0].parameters(), *taggers[1].parameters()}
    optimizer = torch.optim.AdamW([*parameters], lr=1e-2, weight_decay=0.01)
    expected = []
    for step, batch in enumerate(batches):
        losses = [adapters.tag_loss(tagger, task) for tagger, (_, task) in zip(taggers, batch)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 2)
        optimizer.step()
        expected.append([loss.item() for loss in losses])
    before = copy.deepcopy(model.state_dict())
    found = [*joint_priming.train_jointly(model, batches, languages=2, tasks=2, lr=1e-2, steps=2)]
    torch.testing.assert_close(found, expected)
    for name, p in model.named_parameters():
        if name in shared:
            torch.testing.assert_close(p, taggers[0].get_parameter(name), atol=1e-5, rtol=1e-5)
        elif name in theta_a | theta_h:
            assert torch.equal(p, before[name])
    assert moved(before, model.state_dict()) >= shared


def test_finetune_py_takes_what_joint_priming_writes(tmp_path):
    flags = [*DEMO, *SMALL_PRIMING, "--output", tmp_path / "primed"]
    command("benchmarks/joint_priming.py", *flags)
    command("finetune.py", *HINDI, *SMALL_TUNING, "--init", tmp_path / "primed", "--results", tmp_path / "results")
    assert len(read_results(tmp_path / "results")) == 1
    assert "already exists" in command("benchmarks/joint_priming.py", *flags, status=2).stderr


@pytest.mark.early(["benchmarks/step_cost.py", "--rounds", 1, "--only", "meta step"])
def test_step_cost_compares_meta_gradients_before_it_measures(early):
    _, (printed,) = early
    rows = [cells_of(line) for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows][:3] == ["step", "fine-tuning step", "fine-tuning step, padded"]
    assert float(rows[1][1]) == 1 and printed.index("same meta-gradient") < printed.index("| step")


def test_the_inner_lr_sweep_reports_the_last_losses_of_its_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def run(words):
        status = 2 if words[-1].endswith("maml-1") else 0  # 1e4 makes that run diverge
        flags = ["1e4" if status and word == "1" else word for word in words[2:]]
        return SimpleNamespace(**vars(command("prime.py", *flags, status=status)), returncode=status)

    encoder = save_encoder(random_encoder("Bert", 1834), tmp_path / "encoder")
    results = tmp_path / "lines.jsonl"
    options = {"model": str(encoder), "data": "demo/wikiann", "steps": 3, "tasks": 2, "output": tmp_path,
               "flags": ["--support", "4", "--query", "4", "--limit-train", "50"], "results": results}
    inner_lr_sweep.sweep(**options, run=run)
    lines = report.read_lines(results)
    assert len(lines) == 14 and str(tmp_path) not in results.read_text()
    inner_lr_sweep.sweep(**options, run=None)  # all results are in the file
    assert report.read_lines(results) == lines
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        flags = ["--report", "--results", results, "--picture", picture]
        output = command("benchmarks/inner_lr_sweep.py", *flags).stdout
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert "<!-- diverged -->" in pictures[0].read_text()
    head, ours, maml = [cells_of(line) for line in output.splitlines() if line.startswith("| ")]
    assert head[1:] == ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"] and maml[-1] == "diverged"
    losses = json.loads((tmp_path / "meta-1e-1/priming.json").read_text())["last_losses"]
    assert ours[5] == f"{statistics.mean(losses) / 2:.3f}"


def test_table_1_is_that_of_its_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for language in ("en", "es", "hi", "af"):
        shutil.copytree(f"demo/wikiann/{language}", tmp_path / "data" / language)
    train, test = (tmp_path / "data/hi" / f"{split}.txt" for split in ("train", "test"))
    repeated = "\n\n".join(train.read_text().split("\n\n")[:7])
    test.write_text(f"{repeated}\n\n{test.read_text()}")

    def run(script, *flags):
        tuning = ["--epochs", 1, "--min-steps", 150]
        small = ["--limit-train", 50, "--support", 4, "--query", 4] if script == "prime.py" else tuning
        command(script, *flags, *small)

    settings = table1.Settings(
        model="demo/encoder", data=str(tmp_path / "data"), src=["en", "es"], steps=2, outer_lr=5e-5,
        limit_train=100, limit_test=40, distinct=["hi"])
    options = {"rows": [1, 3, 4, 5], "targets": ["hi", "af"], "seeds": [0, 1], "one_seed": [1],
               "output": tmp_path / "t"}
    pictures, outputs = [tmp_path / "one.svg", tmp_path / "two.svg"], []
    for picture in pictures:
        records = table1.run_table(settings, **options, run=run)
        table1.print_tables(records, ["hi", "af"], picture)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and pictures[0].read_bytes() == pictures[1].read_bytes()
    with pytest.raises(adapters.UserError, match=r"runs with steps 2 \(now 3\)"):
        table1.run_table(settings._replace(steps=3), **options, run=run)
    f1 = {}
    for row in (1, 3, 4, 5):
        records = read_results(tmp_path / f"t/row-{row}/official")
        f1[row] = {(record["target"], record["seed"]): record["f1"] for record in records}
        assert len(records) == len(f1[row]) == (2 if row == 1 else 4)  # none twice

    def cells(values, digits):
        columns = [[values[target, seed] for seed in (0, 1)] for target in ("hi", "af")]
        columns.append([statistics.mean(pair) for pair in zip(*columns)])
        return [f"{statistics.mean(c):.{digits}f} ± {statistics.stdev(c):.{digits}f}" for c in columns]

    rows = [cells_of(line) for line in outputs[0].splitlines()]
    assert ["4 Meta Priming → AT", *cells(f1[4], 2)] in rows
    assert ["4 − 5", *cells({key: f1[4][key] - f1[5][key] for key in f1[4]}, 2)] in rows
    low = {target: statistics.mean(f1[3][target, seed] for seed in (0, 1)) for target in ("hi", "af")}
    shares = {(t, s): 100 * (f1[4][t, s] - low[t]) / (f1[1][t, 0] - low[t]) for t, s in f1[4]}
    assert ["Meta Priming → AT", *cells(shares, 0)] in rows
    assert "hi: 7 of 40 test sentences are training sentences too" in outputs[0]
    (record,) = read_results(tmp_path / "t/row-4/distinct")
    assert (record["target"], record["seed"], record["test_sentences"]) == ("hi", 0, 33)
    assert ["4 Meta Priming → AT", *2 * [f"{record['f1'] - f1[4]['hi', 0]:.2f}"]] in rows


def test_every_flag_of_every_script_has_a_help_text():
    flags = []
    for path in [*HERE.glob("benchmarks/*.py"), *HERE.glob("examples/*.py")]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name in ("add", "add_argument") and isinstance(call.args[0], ast.Constant):
                keywords = {keyword.arg for keyword in call.keywords}
                flags.append((path.name, call.args[0].value, "help" in keywords))
    assert len(flags) > 60 and [flag for flag in flags if not flag[2]] == []
