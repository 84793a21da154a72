"""The claims of the paper, and of the README, each with the test that fails where the code breaks it.

| claim | test |
|---|---|
| §3.1: θa may be a small subset of θp; the sets are disjoint and cover the model | test_theta_a_may_be_a_subset_of_the_pretrained_parameters, test_sets_are_disjoint_and_cover_the_model |
| line 2: support and query sets are disjoint, languages in turn | test_support_and_query_are_disjoint |
| line 4: θi = θ for every task | test_every_task_starts_from_theta |
| line 6: the inner loop leaves θp alone, to the bit | test_inner_loop_leaves_theta_p_bit_identical |
| line 6: all gradients at the same θi; line 9: their sum over tasks | test_first_order_meta_gradient_equals_the_closed_form |
| red line: MAML moves the task's copy of θp and only the copy | test_maml_moves_only_the_copy_of_theta_p |
| line 9: θp and θa move and nothing else | test_meta_step_moves_theta_p_and_theta_a_and_nothing_else, test_meta_step_keeps_flags_mode_buffers_and_random_state |
| line 9: θh = θ1_h, whatever the other tasks do | test_theta_h_becomes_the_first_tasks_head, test_order_of_tasks_matters_to_theta_h_alone |
| line 9: "− β ∇" is AdamW with a linear schedule | test_five_meta_steps_equal_a_hand_written_adamw |
| §4.2: first order is an approximation; `--second-order` is exact | test_second_order_is_exact_and_first_order_only_without_inner_steps, test_second_order_gradient_of_a_transformer_equals_finite_differences, test_a_kernel_without_a_second_derivative_is_refused |
| §4: a real transformer, θa on top or inside | test_meta_gradient_of_a_transformer_equals_copies_with_sgd |
| §4, §6: adapters in every layer, biases, LoRA | test_counts_of_parameters_are_right_for_mbert, test_houlsby_stands_after_each_block_and_before_the_skip_connection, test_lora_adds_twice_the_product_of_its_factors, test_each_pe_method_is_primed_tuned_saved_and_scored |
| §4: adapter and head start as Houlsby et al. and BERT have them | test_adapter_and_head_start_as_the_papers_do |
| §4.3, Table 1: each setting updates its parameters and no other | test_priming_moves_exactly_theta_p_and_theta_a, test_row_updates_exactly_its_parameters, test_fine_tuning_leaves_the_rest_bit_identical |
| §4.3: FT priming sees the data of the tasks | test_ft_priming_draws_the_sentences_of_the_tasks |
| §5.2: without inner steps, plain fine-tuning | test_without_inner_steps_the_gradient_is_that_of_fine_tuning |
| f(x; θp) is a loop invariant, for f is deterministic | test_hoisting_changes_no_gradient, test_a_meta_step_encodes_each_set_once_whatever_the_number_of_inner_steps, test_features_are_computed_once_unless_they_exceed_the_cache, test_flags_reach_algorithm_1_and_dropout_is_off_but_in_plain_fine_tuning |
| Table 1 with seeds: means, shares of the gap, differences, without duplicates | test_table_1_is_what_its_runs_found, test_few_sentences_get_the_epochs_that_make_the_steps |
| README: what is saved loads and scores again; same seed, same bytes | test_primed_loads_elsewhere, test_saved_pair_scores_the_same, test_a_saved_pair_is_not_scored_on_other_tags, test_same_seed_same_bytes_another_seed_others |
| README: a run that is killed or stopped goes on to the same bits; processes share a batch | test_twenty_kills_at_random_moments_lose_nothing_but_the_step_under_way, test_a_kill_at_the_worst_moment_leaves_a_whole_checkpoint, test_a_stopped_run_tells_the_command_that_resumes_it, test_several_processes_give_what_one_gives |
| README: data, scores and bad input | test_data_layouts_load_the_same_sentences, test_words_cut_off_count_as_o, test_score_equals_a_hand_count, test_bad_input_is_one_line |
| README: prime.py needs torch alone, and primes what is not ours | test_prime_imports_torch_alone, test_the_lines_of_the_readme_prime_a_model_of_peft, test_the_example_primes_an_mlp_for_sine_waves |
"""

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
import finetune
import prime

HERE = Path(__file__).parent
EXTRA = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="an extra: pip install peft")
PE = ["adapter", "houlsby", "bitfit", pytest.param("lora", marks=EXTRA)]
DEMO = ["--model", "demo/encoder", "--data", "demo/wikiann"]
os.chdir(HERE)
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def own_signals():
    """A script that runs in this process takes SIGINT and SIGTERM for itself."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- Algorithm 1, in float64 on a model of a few dozen parameters ----


class Small(nn.Module):
    """h(g(f(x))) in float64, with a buffer and a constant; keeps the parameters of every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.constant = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.full((5,), 0.1))
        self.dropout = nn.Dropout(0.5)
        self.eval()
        self.calls = []
        self.double()

    def features(self, x):
        return self.dropout(torch.tanh(self.f(x)) * self.constant + self.shift)

    def forward(self, x):
        self.calls.append({name: p.detach().clone() for name, p in self.named_parameters()})
        return self.h(torch.tanh(self.g(x if x.shape[-1] == 5 else self.features(x))))

    def sets(self):
        return [{n: p for n, p in self.named_parameters() if n.startswith(part)} for part in ("f.", "g.", "h.")]


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def make_tasks(count, seed=1):
    chance = torch.Generator().manual_seed(seed)

    def part():
        x = torch.randn(6, 4, generator=chance, dtype=torch.float64)
        return x, torch.randint(3, (6,), generator=chance)

    return [(part(), part()) for _ in range(count)]


def meta_step(model, tasks, **settings):
    """One meta step of Algorithm 1 with AdamW; gives θ before it."""
    before = copy.deepcopy(model.state_dict())
    theta_p, theta_a, theta_h = model.sets()
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-2, 10)
    prime.prime(model, theta_p, theta_a, theta_h, [tasks], loss, optimizer, schedule, **settings)
    return before


def same(a, b, prefix=""):
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


def test_inner_loop_leaves_theta_p_bit_identical():
    model = Small()
    before = meta_step(model, make_tasks(3), inner_steps=5, inner_lr=0.5)
    assert len(model.calls) == 3 * (5 + 1)
    assert all(same(theta_i, before, "f.") for theta_i in model.calls)
    queries = model.calls[5::6]
    assert not any(same(theta_i, before, "g.") or same(theta_i, before, "h.") for theta_i in queries)


def test_maml_moves_only_the_copy_of_theta_p():
    model = Small()
    before = copy.deepcopy(model.state_dict())
    own = []

    def watching_loss(f, batch):
        own.append(copy.deepcopy(model.state_dict()))
        return loss(f, batch)

    theta_p, theta_a, theta_h = model.sets()
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-2, 10)
    prime.prime(model, theta_p, theta_a, theta_h, [make_tasks(2)], watching_loss, optimizer, schedule,
                inner_steps=3, maml=True)
    assert len(own) == 2 * (3 + 1)
    assert all(same(state, before) for state in own)  # the model itself, up to the last query pass
    assert not any(same(theta_i, before, "f.") for theta_i in model.calls[3::4])  # the copies


@pytest.mark.parametrize("maml", [False, True])
def test_every_task_starts_from_theta(maml):
    model = Small()
    before = meta_step(model, make_tasks(3), inner_steps=2, maml=maml)
    assert all(same(theta_i, before, part) for theta_i in model.calls[0::3] for part in ("f.", "g.", "h."))


def test_theta_h_becomes_the_first_tasks_head():
    tasks = make_tasks(3)
    model, alone, others = Small(), Small(), Small()
    meta_step(model, tasks)
    meta_step(alone, tasks[:1])
    meta_step(others, [tasks[0], *make_tasks(2, seed=9)])
    theta_1_h = model.calls[5]  # what the first query pass was given, after five inner steps
    assert same({n: p for n, p in model.state_dict().items() if n.startswith("h.")}, theta_1_h)
    assert same(alone.state_dict(), model.state_dict(), "h.") and same(others.state_dict(), model.state_dict(), "h.")


def test_meta_step_moves_theta_p_and_theta_a_and_nothing_else():
    model = Small()
    before = meta_step(model, make_tasks(2))
    after = model.state_dict()
    for name in after:
        assert torch.equal(after[name], before[name]) == (name in ("constant", "shift")), name
    assert all((p.grad is None) == (n[0] not in "fg") for n, p in model.named_parameters())


@pytest.mark.parametrize("maml", [False, True])
def test_without_inner_steps_the_gradient_is_that_of_fine_tuning(maml):
    tasks, model, plain = make_tasks(2), Small(), Small()
    meta_step(model, tasks, inner_steps=0, maml=maml)
    for _, query in tasks:
        loss(plain, query).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if name[:2] in ("f.", "g."):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)
    assert same(model.state_dict(), plain.state_dict(), "h.")


def test_hoisting_changes_no_gradient():
    tasks, hoisted, textbook = make_tasks(2), Small(), Small()
    meta_step(hoisted, tasks, hoist=lambda sets: [(hoisted.features(x), y) for x, y in sets])
    meta_step(textbook, tasks)
    for p, q in zip(hoisted.parameters(), textbook.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


# ---- the meta-gradient, against oracles that share no code with it ----


class Linear(nn.Module):
    """h(g(f(x))), three matrices, whose gradients can be written down: see `closed_form`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = (nn.Linear(*shape, bias=False) for shape in ((4, 5), (5, 3), (3, 2)))
        self.double()

    def forward(self, x):
        return self.h(self.g(self.f(x)))

    sets = Small.sets


def squared_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().sum() / (2 * len(x))


def regression_tasks(count, seed=1):
    chance = torch.Generator().manual_seed(seed)

    def part():
        return tuple(torch.randn(6, n, generator=chance, dtype=torch.float64) for n in (4, 2))

    return [(part(), part()) for _ in range(count)]


def closed_form(theta, batch):
    """The gradients of `squared_loss`, by hand."""
    (x, y), (f, g, h) = batch, theta
    error = (x @ f.T @ g.T @ h.T - y) / len(x)
    return (error @ h @ g).T @ x, (error @ h).T @ x @ f.T, error.T @ x @ f.T @ g.T


def oracle_meta_gradient(theta, tasks, steps, maml, lr):
    """Σ over tasks of the query gradient at θi, and θ1_h, with plain tensors and no autograd."""
    total, heads = [torch.zeros_like(part) for part in theta], []
    for support, query in tasks:
        f, g, h = theta
        for _ in range(steps):
            df, dg, dh = closed_form((f, g, h), support)
            f, g, h = f - lr * df * maml, g - lr * dg, h - lr * dh
        total = [a + b for a, b in zip(total, closed_form((f, g, h), query))]
        heads.append(h)
    return total, heads[0]


@pytest.mark.parametrize("maml", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_first_order_meta_gradient_equals_the_closed_form(steps, count, maml):
    model, tasks = Linear(), regression_tasks(count)
    theta = [p.detach().clone() for p in model.parameters()]
    (f, g, _), theta_1_h = oracle_meta_gradient(theta, tasks, steps, maml, lr=0.1)
    optimizer, schedule = prime.adamw([model.f.weight, model.g.weight], 1e-2, 10)
    prime.prime(model, *model.sets(), [tasks], squared_loss, optimizer, schedule,
                inner_lr=0.1, inner_steps=steps, maml=maml)
    torch.testing.assert_close(model.f.weight.grad, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.g.weight.grad, g, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.h.weight.detach(), theta_1_h, rtol=0, atol=1e-10)


def test_five_meta_steps_equal_a_hand_written_adamw():
    """AdamW with weight decay (Loshchilov and Hutter 2019, Alg. 2) and the linear schedule, on the sum over tasks."""
    batches = [regression_tasks(3, seed) for seed in range(5)]
    model, lr, decay, b1, b2, eps = Linear(), 0.05, 0.01, 0.9, 0.999, 1e-8
    theta = [p.detach().clone() for p in model.parameters()]
    m, v = [0.0, 0.0], [0.0, 0.0]
    optimizer, schedule = prime.adamw([model.f.weight, model.g.weight], lr, 5)
    for t, tasks in enumerate(batches):
        gradient, theta_1_h = oracle_meta_gradient(theta, tasks, 2, False, 0.1)
        rate = lr * (1 - t / 5)
        for k in (0, 1):
            m[k] = b1 * m[k] + (1 - b1) * gradient[k]
            v[k] = b2 * v[k] + (1 - b2) * gradient[k] ** 2
            step = (m[k] / (1 - b1 ** (t + 1))) / ((v[k] / (1 - b2 ** (t + 1))).sqrt() + eps)
            theta[k] = theta[k] - rate * decay * theta[k] - rate * step
        theta[2] = theta_1_h
        prime.prime(model, *model.sets(), [tasks], squared_loss, optimizer, schedule, inner_lr=0.1, inner_steps=2)
        for p, expected in zip(model.parameters(), theta):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)
        assert model.f.weight.grad.allclose(gradient[0], rtol=0, atol=1e-10)


def finite_differences(objective, parameters, directions, epsilon=1e-5):
    """Slopes of `objective()` along directions in the space of the parameters, by central differences."""
    slopes = []
    for direction in directions:
        values = []
        for size in (epsilon, -2 * epsilon, epsilon):  # there, to the other side, and back
            for parameter, part in zip(parameters, direction):
                parameter.data.add_(part, alpha=size)
            values.append(objective())
        slopes.append((values[0] - values[1]) / (2 * epsilon))
    return torch.tensor(slopes, dtype=torch.float64)


def query_loss_after_sgd(model, moving, batches_loss, tasks, lr, steps):
    """Σ over tasks of the query loss at θi, the inner loop taken by torch.optim.SGD on a copy of the model."""
    total = 0.0
    for support, query in tasks:
        copied = copy.deepcopy(model)
        named = dict(copied.named_parameters())
        optimizer = torch.optim.SGD([named[name] for name in moving], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            batches_loss(copied, support).backward()
            optimizer.step()
        total += batches_loss(copied, query).item()
    return total


@pytest.mark.parametrize("form", ["hoisted", "textbook", "maml", "subset"])
@pytest.mark.parametrize("steps", [0, 3])
def test_second_order_is_exact_and_first_order_only_without_inner_steps(steps, form):
    """Every element of θp and of θa, in float64, at an inner rate at which first order is far from it."""
    tasks, model = make_tasks(2), Small()
    sets = theta_p, theta_a, theta_h = split_by_bias(model) if form == "subset" else model.sets()
    moving = {**theta_a, **theta_h, **(theta_p if form == "maml" else {})}
    hoist = (lambda sets: [(model.features(x), y) for x, y in sets]) if form == "hoisted" else None
    before, exact = copy.deepcopy(model.state_dict()), []
    for part in (theta_p, theta_a):
        unit = torch.eye(sum(p.numel() for p in part.values()), dtype=torch.float64).split([p.numel() for p in part.values()], 1)
        directions = [[x.view_as(p) for x, p in zip(row, part.values())] for row in zip(*unit)]
        objective = lambda: query_loss_after_sgd(model, moving, loss, tasks, 0.5, steps)
        exact.append(finite_differences(objective, [*part.values()], directions))
    for second_order in (True, False):
        model.load_state_dict(before)
        optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-2, 10)
        prime.prime(model, *sets, [tasks], loss, optimizer, schedule, inner_lr=0.5, inner_steps=steps,
                    maml=form == "maml", hoist=hoist, second_order=second_order)
        for part, right in zip(sets, exact):
            error = (torch.cat([p.grad.flatten() for p in part.values()]) - right).norm() / right.norm()
            assert error < 1e-6 if second_order or steps == 0 else error > 1e-2


def copying_oracle(model, sets, batches_loss, tasks, steps, lr, maml):
    """Meta-gradient by name and θ1_h, on a deep copy of the model for each task with torch.optim.SGD."""
    theta_p, theta_a, theta_h = sets
    gradient, heads = {name: 0.0 for name in (*theta_p, *theta_a)}, []
    for support, query in tasks:
        copied = copy.deepcopy(model)
        named = dict(copied.named_parameters())
        moving = [named[name] for name in (*theta_a, *theta_h, *(theta_p if maml else ()))]
        optimizer = torch.optim.SGD(moving, lr=lr)
        for _ in range(steps):
            copied.zero_grad()
            batches_loss(copied, support).backward()
            optimizer.step()
        copied.zero_grad()
        batches_loss(copied, query).backward()
        gradient = {name: total + named[name].grad for name, total in gradient.items()}
        heads.append({name: named[name].detach() for name in theta_h})
    return gradient, heads[0]


def split_by_bias(model):
    """θa as "a small subset of θp" (§3.1): the encoder's biases."""
    theta_p, theta_a, theta_h = model.sets()
    body = {**theta_p, **theta_a}
    return ({n: p for n, p in body.items() if not n.endswith("bias")},
            {n: p for n, p in body.items() if n.endswith("bias")}, theta_h)


def assert_equals_oracle(model, expected, theta_h, tolerance):
    gradient, theta_1_h = expected
    for name, parameter in model.named_parameters():
        if name in gradient:
            torch.testing.assert_close(parameter.grad, gradient[name], rtol=0, atol=tolerance)
        elif name in theta_h:
            torch.testing.assert_close(parameter.detach(), theta_1_h[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("maml", [False, True])
def test_theta_a_may_be_a_subset_of_the_pretrained_parameters(maml):
    tasks, model = make_tasks(3), Small()
    sets = split_by_bias(model)
    names = [set(part) for part in sets]
    assert sum(map(len, names)) == len(set().union(*names))
    assert set().union(*names) == {name for name, _ in model.named_parameters()} - {"constant"}
    expected = copying_oracle(model, sets, loss, tasks, 5, 0.1, maml)
    optimizer, schedule = prime.adamw([*sets[0].values(), *sets[1].values()], 1e-2, 10)
    prime.prime(model, *sets, [tasks], loss, optimizer, schedule, inner_lr=0.1, maml=maml)
    assert_equals_oracle(model, expected, sets[2], 1e-10)


def test_order_of_tasks_matters_to_theta_h_alone():
    tasks = make_tasks(4)
    runs = {}
    for name, order in {"given": (0, 1, 2, 3), "rest permuted": (0, 3, 1, 2), "another first": (2, 1, 0, 3)}.items():
        model = Small()
        meta_step(model, [tasks[i] for i in order])
        runs[name] = model.state_dict()
    for name in ("rest permuted", "another first"):
        for key in runs[name]:
            if not key.startswith("h."):
                torch.testing.assert_close(runs[name][key], runs["given"][key], rtol=0, atol=1e-10)
    assert same(runs["rest permuted"], runs["given"], "h.")
    assert not same(runs["another first"], runs["given"], "h.")


@pytest.mark.parametrize("training", [False, True])
def test_meta_step_keeps_flags_mode_buffers_and_random_state(training):
    model = Small().train(training)
    model.constant.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.h.weight.grad = torch.ones_like(model.h.weight)
    chance, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
    meta_step(model, make_tasks(2))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training == training for module in model.modules())
    assert same(dict(model.named_buffers()), buffers)
    assert torch.equal(torch.get_rng_state(), chance) != training  # dropout draws in train mode only
    assert torch.equal(model.h.weight.grad, torch.ones_like(model.h.weight)) and model.h.bias.grad is None
    assert all(p.is_leaf for p in model.parameters())


# ---- vendoring ----


def test_prime_imports_torch_alone(tmp_path):
    shutil.copy(HERE / "prime.py", tmp_path)
    rest = ["adapters", "transformers", "datasets", "seqeval", "tqdm", "safetensors", "numpy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({rest})); import prime; print(prime.prime.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "prime\n", done.stderr


@EXTRA
@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config", "PrefixTuningConfig"])
def test_the_lines_of_the_readme_prime_a_model_of_peft(config, tmp_path):
    """They move θp, θa and θh, and PE fine-tuning later moves the same θa and θh."""
    import peft
    import transformers

    (lines,) = re.findall(r"```python\n(from peft.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    lines = lines.replace("LoraConfig", config).replace('"TOKEN_CLS"', '"TOKEN_CLS", **more').replace("steps=1000", "steps=2")
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(transformers.BertConfig(**sizes, num_labels=3))

    def part():
        return {"input_ids": torch.randint(50, (2, 6)), "labels": torch.randint(3, (2, 6))}

    scope = {"model": model, "batches": [[(part(), part())] * 2] * 2,
             "more": {"num_virtual_tokens": 4} if config == "PrefixTuningConfig" else {}}
    head, layer = copy.deepcopy(model.classifier.weight), copy.deepcopy(model.bert.encoder.layer[0].output.dense.weight)
    exec(lines, scope)
    sets = [scope[name] for name in ("theta_p", "theta_a", "theta_h")]
    assert all(sets) and {name.rpartition(".")[2] for name in sets[2]} == {"weight", "bias"}
    assert all(p.grad is not None and p.grad.any() for p in sets[1].values())
    moved_to = dict(scope["model"].named_parameters())
    assert any("layer.0.output.dense" in name and not torch.equal(p, layer) for name, p in moved_to.items() if p.shape == layer.shape)
    assert not any(torch.equal(p, head) for p in sets[2].values())


def test_the_example_primes_an_mlp_for_sine_waves():
    """After 100 steps of SGD on ten points, the primed MLP is closer to waves that neither has seen."""
    threads = torch.get_num_threads()
    first, *rows = command("examples/sinusoid.py").stdout.splitlines()[1:]
    torch.set_num_threads(threads)  # the example takes one
    told = [float(row.split()[-1]) for row in rows]
    assert len(first.split()) == 3 + 11 and len(told) == 4
    assert told[3] < 0.5 * min(told[:3])
    assert len((HERE / "examples/sinusoid.py").read_text().splitlines()) <= 60


# ---- the tasks and the model ----


@pytest.fixture(scope="module")
def demo():
    """The demo's encoder in float64, its tokenizer, and Hindi training sentences."""
    encoder, tokenizer = adapters.load_encoder("demo/encoder", 128, "cpu")
    rows, _ = prime.read_split("demo/wikiann", "hi", "train")
    return encoder.double().eval(), tokenizer, prime.tokenize(rows, tokenizer, 128)


def test_support_and_query_are_disjoint():
    corpora = [[("en", i) for i in range(40)], [("es", i) for i in range(40)]]
    args = Namespace(seed=0, tasks=3, support=19, query=21, method="meta")
    for step in range(20):
        for i, (support, query) in enumerate(prime.sample_tasks(corpora, args, step)):
            assert (len(support), len(query)) == (19, 21)
            assert len(set(support + query)) == 40
            assert {language for language, _ in support + query} == {("en", "es")[(3 * step + i) % 2]}


def test_ft_priming_draws_the_sentences_of_the_tasks():
    corpora = [list(range(100)), list(range(100, 200))]
    meta = Namespace(seed=3, tasks=2, support=5, query=7, method="meta")
    ft = Namespace(**{**vars(meta), "method": "ft"})
    for step in range(5):
        tasks = [support + query for support, query in prime.sample_tasks(corpora, meta, step)]
        assert [([], task) for task in tasks] == prime.sample_tasks(corpora, ft, step)


def random_encoder(architecture, pieces):
    import transformers

    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    sizes = dict(hidden_size=16, dim=16, num_hidden_layers=2, n_layers=2, num_attention_heads=2, n_heads=2,
                 intermediate_size=32, hidden_dim=32)
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(vocab_size=pieces, **special, **sizes)
    return transformers.AutoModel.from_config(config).double().eval()


@pytest.mark.parametrize("architecture", ["the demo's", "Roberta", "XLMRoberta", "DistilBert", "Electra", "ModernBert"])
def test_encoding_equals_one_sentence_at_a_time(architecture, demo):
    encoder, tokenizer, sentences = demo
    if architecture != "the demo's":
        encoder = random_encoder(architecture, len(tokenizer))
    model = adapters.Tagger(encoder, 7).double().eval()
    assert (model.first_position is None) == (architecture in ("Electra", "ModernBert"))  # these are not packed
    chosen = [*sentences[:290], max(sentences, key=lambda sentence: len(sentence.x))]
    alone = []
    for sentence in chosen:
        hidden = encoder(input_ids=torch.tensor([sentence.x])).last_hidden_state[0]
        alone.append(hidden[sentence.first])
    for encoded, expected in zip(model.encode(chosen), alone, strict=True):
        torch.testing.assert_close(encoded.x, expected, rtol=0, atol=1e-12)


def test_packing_keeps_every_sentence_and_wastes_little(demo):
    _, _, sentences = demo
    model = adapters.Tagger(demo[0], 7)
    lengths = [len(sentence.x) for sentence in sentences[:256]]
    rows = model.pack(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) == max(lengths)
    assert sum(lengths) >= 0.95 * len(rows) * max(lengths)


def count_encoded(model, monkeypatch):
    """Lists the number of sentences of every pass through the encoder from now on."""
    counts, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda sentences: counts.append(len(sentences)) or encode(sentences))
    return counts


@pytest.mark.parametrize("steps", [1, 50])
def test_a_meta_step_encodes_each_set_once_whatever_the_number_of_inner_steps(steps, demo, monkeypatch):
    encoder, _, sentences = demo
    model = adapters.Tagger(copy.deepcopy(encoder), 7, bottleneck=8).double().eval()
    args = Namespace(seed=0, tasks=3, support=5, query=6, method="meta")
    tasks = prime.sample_tasks([sentences], args, 0)
    counts = count_encoded(model, monkeypatch)
    theta_p, theta_a, theta_h = model.sets()
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-4, 10)
    prime.prime(model, theta_p, theta_a, theta_h, [tasks], prime.tag_loss, optimizer, schedule, inner_steps=steps,
                hoist=model.hoist)
    assert counts == [3 * 5, 3 * 6]


def test_inner_steps_keep_nothing_for_the_meta_gradient():
    """First order: what autograd keeps until the backward pass of line 9 does not grow with S."""
    kept = {}
    for steps in (1, 50):
        model, alive, most = Small(), set(), [0]

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor.detach()  # or an output would keep itself alive
                alive.add(id(self))
                most[0] = max(most[0], len(alive))

            def __del__(self):
                alive.discard(id(self))

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            meta_step(model, make_tasks(2), inner_steps=steps)
        kept[steps] = most[0]
    assert kept[1] == kept[50] > 0


def test_bf16_runs_the_encoder_in_bf16_and_keeps_theta_in_float32(demo):
    encoder, _, sentences = demo
    gradients = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = adapters.Tagger(copy.deepcopy(encoder).float(), 7, bottleneck=8, bf16=bf16).eval()
        kinds = set()
        model.encoder.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: kinds.add(a[2].dtype))
        prime.tag_loss(model, sentences[:16]).backward()
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for part in model.sets() for p in part.values()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < error < 5e-2


def padded_loss(model, sentences):
    """Cross-entropy as token classification does it: one padded batch, −100 for all but the first pieces."""
    length = max(len(sentence.x) for sentence in sentences)
    ids, labels = torch.zeros(2, len(sentences), length, dtype=torch.int64)
    labels -= 100
    mask = torch.zeros(len(sentences), length, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence.x)] = torch.tensor(sentence.x)
        mask[row, : len(sentence.x)] = 1
        labels[row, sentence.first] = torch.tensor(sentence.tags)[sentence.words]
    hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return nn.functional.cross_entropy(model.head(model.adapter(hidden)).flatten(0, 1), labels.flatten())


def demo_tagger(encoder, pe):
    """A float64 tagger whose θa has left its starting point: LoRA's starts at zero, where much of it is flat."""
    torch.manual_seed(0)
    model = adapters.Tagger(copy.deepcopy(encoder), 7, pe, 8).double().eval()
    with torch.no_grad():
        for parameter in model.sets()[1].values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("pe", PE)
@pytest.mark.parametrize("maml", [False, True], ids=["priming", "maml"])
def test_meta_gradient_of_a_transformer_equals_copies_with_sgd(maml, pe, demo):
    model = demo_tagger(demo[0], pe)
    sets = model.sets()
    args = Namespace(seed=0, tasks=2, support=5, query=6, method="meta")
    tasks = prime.sample_tasks([demo[2]], args, 0)
    expected = copying_oracle(model, sets, padded_loss, tasks, 5, 0.03, maml)
    optimizer, schedule = prime.adamw([*sets[0].values(), *sets[1].values()], 1e-4, 10)
    hoist = model.hoist if pe == "adapter" else None
    prime.prime(model, *sets, [tasks], prime.tag_loss, optimizer, schedule, maml=maml, hoist=hoist)
    assert_equals_oracle(model, expected, sets[2], 1e-9)


@pytest.mark.parametrize("pe", PE)
@pytest.mark.parametrize("maml", [False, True], ids=["priming", "maml"])
def test_second_order_gradient_of_a_transformer_equals_finite_differences(maml, pe, demo):
    """Along a random direction in θp and one in θa; the oracle shares no code with Algorithm 1."""
    model = demo_tagger(demo[0], pe)
    sets = theta_p, theta_a, theta_h = model.sets()
    args = Namespace(seed=0, tasks=2, support=5, query=6, method="meta")
    tasks = prime.sample_tasks([demo[2]], args, 0)
    moving = {**theta_a, **theta_h, **(theta_p if maml else {})}
    model.encoder.set_attn_implementation("eager")
    slopes, chance = [], torch.Generator().manual_seed(0)
    for part in (theta_p, theta_a):
        direction = [torch.randn(p.shape, generator=chance, dtype=p.dtype) for p in part.values()]
        objective = lambda: query_loss_after_sgd(model, moving, padded_loss, tasks, 0.1, 5)
        slopes.append((part, direction, finite_differences(objective, [*part.values()], [direction]).item()))
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-4, 10)
    hoist = model.hoist if pe == "adapter" else None
    prime.prime(model, *sets, [tasks], prime.tag_loss, optimizer, schedule, inner_lr=0.1, maml=maml, hoist=hoist,
                second_order=True)
    for part, direction, slope in slopes:
        ours = sum((p.grad * along).sum().item() for p, along in zip(part.values(), direction))
        assert abs(ours - slope) < 1e-6 * abs(slope)


def test_a_kernel_without_a_second_derivative_is_refused(demo):
    model = demo_tagger(demo[0], "bitfit")
    assert model.encoder.config._attn_implementation == "sdpa"
    optimizer, schedule = prime.adamw([p for part in model.sets()[:2] for p in part.values()], 1e-4, 10)
    tasks = [(demo[2][:5], demo[2][5:10])]
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        prime.prime(model, *model.sets(), [tasks], prime.tag_loss, optimizer, schedule, second_order=True)


def test_flags_reach_algorithm_1_and_dropout_is_off_but_in_plain_fine_tuning(demo, monkeypatch, tmp_path):
    modes = {}

    def spy(model, theta_p, theta_a, theta_h, batches, *rest, **settings):
        modes["prime"] = {module.training for module in model.modules()}
        modes["settings"] = settings["maml"], settings["inner_steps"], settings["inner_lr"], settings["second_order"]
        modes["hoist"] = settings["hoist"]
        modes["tasks"] = [[len(part) for part in task] for tasks in batches for task in tasks]

    def spy_loss(model, batch):
        modes["tune"] = {module.training for module in model.modules()}
        return prime.tag_loss(model, batch)

    monkeypatch.setattr(prime, "prime", spy)
    for method, pe, more in [("meta", "adapter", []), ("maml", "adapter", ["--second-order"]), ("ft", "adapter", []),
                             ("meta", "bitfit", ["--second-order"]), ("meta", "houlsby", [])]:
        flags = ["--method", method, "--steps", "3", "--inner-steps", "2", "--inner-lr", "0.2", "--tasks", "4", "--pe", pe]
        monkeypatch.setattr(sys, "argv", ["prime.py", *DEMO, *flags, *more, "--output", str(tmp_path / method / pe)])
        with pytest.raises(IndexError):  # the spy reports no loss
            prime.main()
        assert modes["prime"] == {method == "ft"}
        assert modes["settings"] == (method == "maml", 0 if method == "ft" else 2, 0.2, bool(more))
        assert (modes["hoist"] is None) == (pe != "adapter" or method == "maml")  # only where it is exact
        assert len(modes["tasks"]) == 3 * 4 and all((s == 0) == (method == "ft") for s, _ in modes["tasks"])
    monkeypatch.setattr(finetune, "tag_loss", spy_loss)
    for tune in ("adapter", "head", "full"):
        args = Namespace(tune=tune, pe="adapter", init="none", bottleneck=8, bf16=False, device="cpu", epochs=1, min_steps=0, batch_size=8,
                         lr=1e-2)
        model, tuned = finetune.start(args, copy.deepcopy(demo[0]).train(), 7, seed=0)
        assert not any(module.training for module in model.double().modules())  # sentences are encoded now
        finetune.tune(args, model, tuned, demo[2][:8], seed=0)
        assert modes["tune"] == {tune == "full"} and not any(module.training for module in model.modules())


@pytest.mark.parametrize("pe", [None, *PE])
def test_sets_are_disjoint_and_cover_the_model(pe, demo):
    model = demo_tagger(demo[0], pe)
    sets = [set(part) for part in model.sets()]
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in name}
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert set().union(*sets) | pooler == {name for name, _ in model.named_parameters()}
    assert pooler and not pooler & set().union(*sets)
    assert sets[2] == {"head.weight", "head.bias"} and bool(sets[1]) == bool(pe)
    assert all(p.requires_grad for p in model.parameters())


# mBERT: 12 layers of 768, 3072 in the feed-forward; by hand
IN_THETA_A = {"adapter": 2 * 64 * 768 + 64 + 768, "houlsby": 24 * (2 * 64 * 768 + 64 + 768),
              "bitfit": 768 + 12 * (7 * 768 + 3072), "lora": 12 * 2 * 2 * 8 * 768}


@pytest.mark.parametrize("pe", PE)
def test_counts_of_parameters_are_right_for_mbert(pe):
    """README states them. 177,853,440 parameters are mBERT's, 590,592 of them the pooler's."""
    import transformers

    with torch.device("meta"):
        encoder = transformers.BertModel(transformers.BertConfig(vocab_size=119_547))
        theta_p, theta_a, theta_h = adapters.Tagger(encoder, 7, pe, 8 if pe == "lora" else 64).sets()
    count = [sum(p.numel() for p in part.values()) for part in (theta_p, theta_a, theta_h)]
    pretrained = 177_853_440 - 590_592
    assert count == [pretrained - (IN_THETA_A[pe] if pe == "bitfit" else 0), IN_THETA_A[pe], 768 * 7 + 7]
    assert f"| `{pe}` | {IN_THETA_A[pe]:,} |" in (HERE / "README.md").read_text()


@pytest.mark.parametrize(
    "architecture, ends",
    [("Bert", ["attention.output.dense", "output.dense"]), ("Roberta", ["attention.output.dense", "output.dense"]),
     ("Electra", ["attention.output.dense", "output.dense"]), ("DistilBert", ["attention.out_lin", "ffn.lin2"]),
     ("MPNet", ["attention.attn.o", "output.dense"])],
)
def test_houlsby_stands_after_each_block_and_before_the_skip_connection(architecture, ends):
    """An adapter that adds a constant is a block whose last bias is larger by it."""
    plain, changed = random_encoder(architecture, 50), random_encoder(architecture, 50)
    model = adapters.Tagger(copy.deepcopy(plain), 7, "houlsby", 8).double().eval()
    named = dict(changed.named_modules())
    blocks = [block for k in range(2) for end in ends for name, block in named.items() if name.endswith(f"layer.{k}.{end}")]
    with torch.no_grad():
        for adapter, block in zip(model.adapters, blocks, strict=True):
            adapter.up.weight.zero_()
            adapter.up.bias.copy_(torch.randn(16))
            block.bias.add_(adapter.up.bias)
    ids = torch.arange(2, 12)[None]
    expected = changed(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.encoder(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-12)
    assert (expected - plain(input_ids=ids).last_hidden_state).abs().max() > 0.1


@EXTRA
def test_lora_adds_twice_the_product_of_its_factors(demo):
    model, plain = demo_tagger(demo[0], "lora"), copy.deepcopy(demo[0])
    factors = model.sets()[1]
    with torch.no_grad():
        for name, factor in factors.items():
            if "lora_B" in name:
                module = plain.get_submodule(name.removeprefix("encoder.").partition(".lora_B")[0])
                module.weight.add_(2 * factor @ factors[name.replace("lora_B", "lora_A")])
    ids = torch.tensor([demo[2][0].x])
    expected = plain(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.encoder(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-12)
    assert (expected - demo[0](input_ids=ids).last_hidden_state).abs().max() > 1e-3


def test_adapter_and_head_start_as_the_papers_do(demo):
    torch.manual_seed(0)
    model = adapters.Tagger(demo[0], 7)
    hidden = demo[0].config.hidden_size
    x = torch.randn(1000, hidden)
    assert sum(p.numel() for p in model.adapter.parameters()) == 2 * 64 * hidden + 64 + hidden
    assert (model.adapter(x) - x).norm() / x.norm() < 0.01  # near the identity
    for layer in (model.adapter.down, model.adapter.up):
        assert 0.5e-2 < layer.weight.std() < 1e-2 and layer.weight.abs().max() <= 2e-2
        assert not layer.bias.any()
    assert abs(model.head.weight.std() - 0.02) < 0.005 and not model.head.bias.any()


# ---- data and scoring ----


def test_data_layouts_load_the_same_sentences(tmp_path):
    import datasets

    expected = {}
    for split, archive in (("train", "train"), ("validation", "dev"), ("test", "test")):
        text = (HERE / "demo/wikiann/hi" / f"{split}.txt").read_text(encoding="utf-8")
        sentences = [[line.split("\t") for line in block.split("\n")] for block in text.strip("\n").split("\n\n")]
        words, tags = ([[pair[k] for pair in sentence] for sentence in sentences] for k in (0, 1))
        numbers = [[prime.TAGS.index(tag) for tag in row] for row in tags]
        expected[split] = list(zip(words, numbers))
        (tmp_path / "rahimi/hi").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub/hi").mkdir(parents=True, exist_ok=True)
        prefixed = "\n\n".join("\n".join(f"hi:{word}\t{tag}" for word, tag in sentence) for sentence in sentences)
        (tmp_path / "rahimi/hi" / archive).write_text(prefixed + "\n", encoding="utf-8")
        names = datasets.List(datasets.ClassLabel(names=prime.TAGS))
        features = datasets.Features(tokens=datasets.List(datasets.Value("string")), ner_tags=names)
        table = datasets.Dataset.from_dict({"tokens": words, "ner_tags": numbers}, features=features)
        table.to_parquet(str(tmp_path / "hub/hi" / f"{split}-00000-of-00001.parquet"))
    for data in ("demo/wikiann", tmp_path / "rahimi", tmp_path / "hub"):
        for split in expected:
            rows, names = prime.read_split(str(data), "hi", split)
            assert rows == expected[split] and names == prime.TAGS
            assert prime.read_split(str(data), "hi", split, limit=7)[0] == expected[split][:7]


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    """As `load_dataset("unimelb-nlp/wikiann", "hi", split="train")` gives it; its features name the tags."""
    import datasets

    names = ["O", "B-X", "I-X"]
    features = datasets.Features(tokens=datasets.List(datasets.Value("string")),
                                 ner_tags=datasets.List(datasets.ClassLabel(names=names)))
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 2], [0]]}, features=features)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or table)
    assert prime.read_split("unimelb-nlp/wikiann", "hi", "train") == ([(["a", "b"], [1, 2]), (["c"], [0])], names)
    assert prime.read_split("unimelb-nlp/wikiann", "hi", "train", limit=1)[0] == [(["a", "b"], [1, 2])]
    assert calls[0] == (("unimelb-nlp/wikiann", "hi"), {"split": "train"})


def test_the_first_piece_of_a_word_carries_its_tag(demo):
    _, tokenizer, _ = demo
    words = ["Zxqyvw", "in", "Qwxz"]
    (sentence,) = prime.tokenize([(words, [1, 0, 5])], tokenizer, 128)
    pieces = tokenizer.convert_ids_to_tokens(sentence.x)
    assert len(pieces) > len(words) + 2 and sentence.words == [0, 1, 2]
    spelled = [[tokenizer.tokenize(word)[0], ids] for word, ids in zip(words, sentence.first)]
    assert all(pieces[position] == piece for piece, position in spelled)
    scores = torch.randn(3, 7)
    expected = nn.functional.cross_entropy(scores, torch.tensor([1, 0, 5]))
    assert torch.equal(prime.tag_loss(lambda sentences: scores, [sentence]), expected)


class Oracle(nn.Module):
    """Tags every word that has a piece as it is tagged in truth."""

    def __init__(self, sentences):
        super().__init__()
        self.tags = [sentence.tags[word] for sentence in sentences for word in sentence.words]

    def forward(self, features):
        return nn.functional.one_hot(torch.tensor(self.tags), 7).float()


def test_words_cut_off_count_as_o(demo):
    """By hand: five true entities, of which one loses its end and one is lost; four are predicted, three rightly."""
    _, tokenizer, _ = demo
    rows = [(list("abcdef"), [1, 2, 0, 3, 5, 6]), (list("ab"), [5, 0])]  # PER(ab) ORG(d) LOC(ef); LOC(a)
    assert [len(s.words) for s in prime.tokenize(rows, tokenizer, 128)] == [6, 2]
    sentences = prime.tokenize(rows, tokenizer, 7)  # with [CLS] and [SEP], five words are left: LOC(ef) loses f
    rows.append((["a"] * 5 + ["b"], [0] * 5 + [1]))
    sentences += prime.tokenize(rows[2:], tokenizer, 7)  # PER(b) is lost
    result = finetune.evaluate(Oracle(sentences), sentences, prime.TAGS)
    # true: PER ORG LOC | LOC | PER; predicted: PER ORG LOC(e) | LOC
    assert result["precision"] == pytest.approx(100 * 3 / 4) and result["recall"] == pytest.approx(100 * 3 / 5)
    assert result["f1"] == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert result["types"] == pytest.approx({"LOC": 50, "ORG": 100, "PER": 100 * 2 / 3})


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_score_equals_a_hand_count():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
    predicted = [["B-PER", "I-PER", "O", "I-LOC"], ["B-ORG", "I-ORG"]]  # I- alone is no entity; ORG is too long
    result = finetune.score(gold, predicted)
    assert (result["precision"], result["recall"]) == (pytest.approx(50), pytest.approx(100 / 3))
    assert result["f1"] == pytest.approx(40)
    nothing = finetune.score([["O", "O"]], [["O", "O"]])
    assert (nothing["f1"], nothing["precision"], nothing["recall"]) == (0, 0, 0)


# ---- the commands, on the demo: each row of Table 1 ----

PRIMING = {4: [], 5: ["--method", "ft"], 6: ["--method", "maml"], 7: ["--inner-steps", 1]}
TUNING = {1: ["--init", "none", "--tune", "full"], 2: ["--init", "none", "--tune", "head"], 3: ["--init", "none"]}
SMALL_PRIMING = ["--steps", 2, "--support", 4, "--query", 4, "--limit-train", 50, "--bottleneck", 8]
SMALL_TUNING = ["--epochs", 2, "--limit-train", 30, "--limit-test", 30]


def command(script, *flags, status=0):
    """Runs a script as `python script flags` does, in this process: importing the libraries takes seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv, sys.argv, ended = sys.argv, [script, *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as exit:
        ended = exit.code or 0
    finally:
        sys.argv = argv
    assert ended == status, stderr.getvalue()
    return Namespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())


def tensors(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def moved(after, before):
    return {name for name in after if not torch.equal(after[name], before[name])}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What the commands of the seven rows of Table 1 leave, a folder a row."""
    root = tmp_path_factory.mktemp("table")

    def make_row(row):
        folder = root / str(row)
        if row in PRIMING:
            flags = [*SMALL_PRIMING, *PRIMING[row], "--output", folder / "primed"]
            command("prime.py", "--src", "en", "es", *DEMO, *flags)
        start = TUNING.get(row, ["--init", folder / "primed"])
        folder.mkdir(exist_ok=True)
        outputs = ["--results", folder / "results.jsonl", "--save", folder / "tuned", "--seeds", 0, 1]
        done = command("finetune.py", "--tgt", "hi", *DEMO, *SMALL_TUNING, "--bottleneck", 8, *start, *outputs)
        return folder, done.stdout

    return {row: make_row(row) for row in range(1, 8)}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def theta():
    """θp of the demo's encoder, and the shapes of θa and θh, under the names that they have in the model."""
    theta_p = {f"encoder.{n}": p for n, p in tensors("demo/encoder").items() if not n.startswith("pooler.")}
    hidden = json.loads((HERE / "demo/encoder/config.json").read_text())["hidden_size"]
    theta_a = {"adapter.down.weight": (8, hidden), "adapter.down.bias": (8,),
               "adapter.up.weight": (hidden, 8), "adapter.up.bias": (hidden,)}
    return theta_p, theta_a, {"head.weight": (7, hidden), "head.bias": (7,)}


@pytest.mark.parametrize("row", PRIMING)
def test_priming_moves_exactly_theta_p_and_theta_a(row, table, theta):
    primed = table[row][0] / "primed"
    before, after = tensors("demo/encoder"), tensors(primed)
    assert after.keys() == before.keys()
    assert {f"encoder.{name}" for name in moved(after, before)} == theta[0].keys()
    theta_a = tensors(primed, "adapter.safetensors")
    assert {name: tuple(p.shape) for name, p in theta_a.items()} == theta[1]
    assert all(p.any() for p in theta_a.values())  # biases start at zero


@pytest.mark.parametrize("pe", PE[1:])
def test_each_pe_method_is_primed_tuned_saved_and_scored(pe, tmp_path, theta, demo, monkeypatch):
    """Rows 3 to 5 of Table 1; what is saved is the plain encoder, under its own names, and θa."""
    from transformers import AutoModel

    theta_p = {name: tensor.float() for name, tensor in theta[0].items()}
    theta_a = set(demo_tagger(demo[0], pe).sets()[1])
    base, scores = [*SMALL_TUNING, "--results", tmp_path / "r.jsonl", "--data", "demo/wikiann"], []
    for method in ("meta", "ft"):
        output = tmp_path / method
        command("prime.py", *DEMO, *SMALL_PRIMING, "--pe", pe, "--method", method, "--output", output)
        assert tensors(output).keys() == tensors("demo/encoder").keys()
        assert {f"encoder.{name}" for name in moved(tensors(output), tensors("demo/encoder"))} == theta_p.keys()
        primed = tensors(output, "adapter.safetensors")
        assert primed.keys() == theta_a
        if pe == "bitfit":  # θa is a part of the encoder
            assert not moved(primed, {f"encoder.{name}": p for name, p in tensors(output).items()})
        assert not moved(tensors(output), AutoModel.from_pretrained(output).state_dict())
        command("finetune.py", "--tgt", "hi", *base, "--init", output, "--save", tmp_path / "tuned", "--seeds", 0, 1)
        for seed in (0, 1):  # which both start from θa*
            tuned = tensors(tmp_path / f"tuned/hi-{seed}", "tuned.safetensors")
            assert tuned.keys() == {*theta_a, "head.weight", "head.bias"} and moved(primed, tuned) == theta_a
        command("finetune.py", "--tgt", "hi", *base, "--score", tmp_path / "tuned/hi-1", "--limit-test", 30)
        _, tuned_line, again = read_lines(tmp_path / "r.jsonl")[-3:]
        assert again["f1"] == tuned_line["f1"] and again["updated"] == sum(p.numel() for p in tuned.values())
        assert tuned_line["cached_gb"] == 0  # θa is inside the encoder
    command("finetune.py", "--tgt", "hi", *base, "--init", "none", "--model", "demo/encoder", "--pe", pe, "--bottleneck", 8)
    assert read_lines(tmp_path / "r.jsonl")[-1]["updated"] == again["updated"]


@pytest.mark.parametrize("pe", PE)
def test_second_order_runs_from_the_command_and_gives_another_theta(pe, tmp_path):
    for flags in ([], ["--second-order"]):
        command("prime.py", *DEMO, *SMALL_PRIMING, "--pe", pe, *flags, "--output", tmp_path / str(len(flags)))
    assert moved(tensors(tmp_path / "0"), tensors(tmp_path / "1"))


def test_each_way_of_priming_gives_another_theta(table):
    primed = {row: tensors(table[row][0] / "primed") for row in PRIMING}
    for row, other in itertools.combinations(PRIMING, 2):
        assert moved(primed[row], primed[other])


@pytest.mark.parametrize("row", range(1, 8))
def test_row_updates_exactly_its_parameters(row, table, theta):
    folder, _ = table[row]
    theta_p, theta_a, theta_h = theta
    shapes = {**theta_h, **(theta_a if row > 2 else {}), **({n: p.shape for n, p in theta_p.items()} if row == 1 else {})}
    tuned = tensors(folder / "tuned/hi-0", "tuned.safetensors")
    assert {name: tuple(p.shape) for name, p in tuned.items()} == {n: tuple(shape) for n, shape in shapes.items()}
    updated = sum(math.prod(shape) for shape in shapes.values())
    frozen = 0 if row == 1 else sum(p.numel() for p in theta_p.values())
    line = read_lines(folder / "results.jsonl")[0]
    assert (line["updated"], line["parameters"]) == (updated, updated + frozen)
    assert line["share"] == updated / (updated + frozen)
    if row == 1:
        assert moved({n: tuned[n] for n in theta_p}, theta_p) == theta_p.keys()
    if row in PRIMING:
        theta_a_star = tensors(folder / "primed", "adapter.safetensors")
        assert moved(theta_a_star, tuned) == theta_a_star.keys()


@pytest.mark.parametrize("moves", ["full", "head", *PE])
def test_fine_tuning_leaves_the_rest_bit_identical(moves, demo):
    encoder, _, sentences = demo
    tune, pe = (moves, None) if moves in ("full", "head") else ("adapter", moves)
    args = Namespace(tune=tune, pe=pe, init="none", bottleneck=8, bf16=False, device="cpu", epochs=2, min_steps=0, batch_size=8,
                     lr=1e-2)
    model, tuned = finetune.start(args, copy.deepcopy(encoder), 7, seed=0)
    model.double()
    before = copy.deepcopy(model.state_dict())
    finetune.tune(args, model, tuned, sentences[:40], seed=0)
    still = {name for name in tuned if name.endswith("key.bias")}  # attention does not depend on it
    assert tuned.keys() - still <= moved(model.state_dict(), before) <= tuned.keys()
    assert not moved(encoder.state_dict(), demo[0].state_dict())  # the next run starts from the same encoder


def test_features_are_computed_once_unless_they_exceed_the_cache(table, tmp_path, monkeypatch, capsys):
    encoded, encode = {}, adapters.Tagger.encode
    monkeypatch.setattr(sys.modules["finetune"].Tagger, "encode",
                        lambda self, x: encoded[limit].append(len(x)) or encode(self, x))
    for limit in ("4", "0"):
        encoded[limit] = []
        flags = [*DEMO, *SMALL_TUNING, "--init", "none", "--cache-gb", limit, "--results", tmp_path / limit]
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--tgt", "hi", "--seeds", "0", "1", *map(str, flags)])
        finetune.main()
    assert encoded == {"4": [60], "0": 2 * [*2 * [16, 14], 30]}
    kept, computed = (read_lines(tmp_path / limit) for limit in ("4", "0"))
    words = sum(len(row[0]) for split in ("train", "test") for row in prime.read_split("demo/wikiann", "hi", split, 30)[0])
    assert [line["f1"] for line in kept] == [line["f1"] for line in computed]
    assert [line["cached_gb"] for line in kept + computed] == 2 * [words * 64 * 4 / 1e9] + 2 * [0]


def test_few_sentences_get_the_epochs_that_make_the_steps(tmp_path):
    base = ["finetune.py", "--tgt", "hi", *DEMO, *SMALL_TUNING, "--init", "none", "--results", tmp_path / "r.jsonl"]
    for name, epochs, steps in (("four steps", 2, 0), ("three at least", 1, 3), ("two", 1, 2)):
        command(*base, "--epochs", epochs, "--min-steps", steps, "--save", tmp_path / name)
    four, three, two = (tensors(tmp_path / name / "hi-0", "tuned.safetensors") for name in ("four steps", "three at least", "two"))
    assert not moved(four, three) and moved(four, two) == four.keys()


def test_results_have_every_setting_and_the_table_its_means(table):
    folder, stdout = table[4]
    lines = read_lines(folder / "results.jsonl")
    assert [(line["target"], line["seed"], line["tune"]) for line in lines] == [("hi", 0, "adapter"), ("hi", 1, "adapter")]
    assert all(line["init"] == str(folder / "primed") and line["model"] == "demo/encoder" for line in lines)
    assert {"precision", "recall", "types", "max_length", "data", "seconds", "priming"} <= lines[0].keys()
    told = {"epochs": 2, "batch_size": 16, "lr": 3e-3, "train_sentences": 30, "test_sentences": 30}
    assert told.items() <= lines[0].items()
    scores = [line["f1"] for line in lines]
    row = stdout.splitlines()[-1].split()
    assert row[:3] == ["hi", f"{statistics.mean(scores):.2f}", f"{statistics.stdev(scores):.2f}"]


def test_primed_loads_elsewhere(table):
    from transformers import AutoModel, AutoTokenizer

    primed = table[4][0] / "primed"
    model = AutoModel.from_pretrained(primed)
    assert not moved(tensors(primed), model.state_dict())
    text = "Delhi is a city ."
    assert AutoTokenizer.from_pretrained(primed)(text) == AutoTokenizer.from_pretrained(HERE / "demo/encoder")(text)
    record = json.loads((primed / "priming.json").read_text())
    assert record["bottleneck"] == 8 and len(record["last_losses"]) == 2 and record["versions"]["torch"]
    assert record["src"] == ["en", "es"] and record["tags"] == prime.TAGS


@pytest.mark.parametrize("row", [1, 4])
def test_saved_pair_scores_the_same(row, table, tmp_path):
    folder, _ = table[row]
    shutil.copytree(HERE / "demo/wikiann/hi", tmp_path / "data/hi", ignore=shutil.ignore_patterns("train.txt"))
    flags = ["--limit-test", 30, "--score", folder / "tuned/hi-1", "--results", tmp_path / "again.jsonl"]
    command("finetune.py", "--tgt", "hi", "--data", tmp_path / "data", *flags)  # the training split is not read
    (again,), (_, line) = read_lines(tmp_path / "again.jsonl"), read_lines(folder / "results.jsonl")
    free = {"cached_gb", "seconds", "results", "save", "score", "seeds", "data", "train_sentences"}
    assert {key: again[key] for key in again.keys() - free} == {key: line[key] for key in line.keys() - free}


def test_a_saved_pair_is_not_scored_on_other_tags(table, tmp_path):
    shutil.copytree(table[4][0] / "tuned/hi-1", tmp_path / "hi-1")
    kept = json.loads((tmp_path / "hi-1/tuned.json").read_text())
    (tmp_path / "hi-1/tuned.json").write_text(json.dumps({**kept, "tags": kept["tags"][::-1]}))
    flags = ["--tgt", "hi", "--data", "demo/wikiann", "--score", tmp_path / "hi-1", "--results", tmp_path / "r.jsonl"]
    assert "hi test: the tags are ['O'" in command("finetune.py", *flags, status=2).stderr


def test_split_chooses_what_is_scored(table, tmp_path):
    """The validation split under the name of the test split has the same score; the test split has another."""
    shutil.copytree(HERE / "demo/wikiann/hi", tmp_path / "data/hi")
    shutil.copy(HERE / "demo/wikiann/hi/validation.txt", tmp_path / "data/hi/test.txt")
    flags = ["--tgt", "hi", "--score", table[4][0] / "tuned/hi-1", "--results", tmp_path / "r.jsonl"]
    command("finetune.py", *flags, "--data", "demo/wikiann", "--split", "validation")
    command("finetune.py", *flags, "--data", tmp_path / "data")
    command("finetune.py", *flags, "--data", "demo/wikiann")
    validation, renamed, test = ((line["f1"], line["test_sentences"]) for line in read_lines(tmp_path / "r.jsonl"))
    assert validation == renamed != test


def test_a_saved_pair_is_held_to_its_base(table, tmp_path):
    shutil.copytree(table[4][0] / "tuned/hi-0", tmp_path / "hi-0")
    kept = json.loads((tmp_path / "hi-0/tuned.json").read_text())
    (tmp_path / "hi-0/tuned.json").write_text(json.dumps({**kept, "init": str(table[7][0] / "primed")}))
    done = command("finetune.py", "--tgt", "hi", *DEMO, "--score", tmp_path / "hi-0", status=2)
    assert "has changed since" in done.stderr and len(done.stderr.splitlines()) == 1


def test_same_seed_same_bytes_another_seed_others(table, tmp_path):
    def outputs(seed):
        command("prime.py", "--src", "en", "es", *DEMO, *SMALL_PRIMING, "--seed", seed, "--output", tmp_path / seed)
        return tensor_bytes(tmp_path / seed)

    def tensor_bytes(folder):
        return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]

    first = tensor_bytes(table[4][0] / "primed")
    assert outputs("0") == first
    assert all(a != b for a, b in zip(outputs("1"), first))
    flags = [*SMALL_TUNING, "--bottleneck", 8, *TUNING[3], "--results", tmp_path / "results.jsonl", "--save", tmp_path]
    command("finetune.py", "--tgt", "hi", *DEMO, *flags)
    tuned = [folder / "tuned.safetensors" for folder in (tmp_path / "hi-0", *sorted((table[3][0] / "tuned").iterdir()))]
    again, seed_0, seed_1 = (path.read_bytes() for path in tuned)
    assert again == seed_0 != seed_1


# ---- long runs: killed, stopped, resumed, shared ----

LONG = [*DEMO, "--steps", 12, "--support", 4, "--query", 4, "--limit-train", 50, "--bottleneck", 8, "--save-every", 1]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["finetune", "prime", "transformers.models.bert.modeling_bert", "datasets", "seqeval"])


def child(script, flags, stderr, environment=None, fault=None):
    """The target of a process: a script with its flags, its stderr in a file, and perhaps a fault."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    sys.argv, sys.stdout = [script, *map(str, flags)], open(os.devnull, "w")
    sys.stderr = open(stderr, "w", buffering=1)
    if fault:
        globals()[fault]()
    runpy.run_path(str(HERE / script), run_name="__main__")


def begin(flags, stderr, script="prime.py", **settings):
    process = processes.Process(target=child, args=(script, flags, stderr), kwargs=settings)
    process.start()
    return process


def killed_while_a_checkpoint_is_written():
    save = torch.save

    def half(state, path):
        save(state, path)
        if len(state["losses"]) == 5:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def killed_before_a_checkpoint_takes_its_place(nth=5):
    replace, count = Path.replace, itertools.count(1)

    def kill_instead(path, target):
        if next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = kill_instead


def killed_after_the_first_step():
    killed_before_a_checkpoint_takes_its_place(nth=2)


def killed_between_the_last_files():
    killed_before_a_checkpoint_takes_its_place(nth=12 + 3)


def disk_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The bytes of a run that was never stopped."""
    output = tmp_path_factory.mktemp("long") / "primed"
    process = begin([*LONG, "--output", output], output.parent / "stderr")
    process.join()
    assert process.exitcode == 0 and not (output / "checkpoint.pt").exists()
    return primed_bytes(output)


def primed_bytes(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "adapter.safetensors")]


def assert_whole(output, steps=12):
    """Under its name stands a complete checkpoint, or a complete result, or nothing; the number of steps done."""
    if (output / "checkpoint.pt").exists():
        losses = torch.load(output / "checkpoint.pt", weights_only=True)["losses"]
        assert 1 <= len(losses) <= steps
        return len(losses)
    if (output / "priming.json").exists():
        assert all(primed_bytes(output))
        return steps
    return 0


def test_twenty_kills_at_random_moments_lose_nothing_but_the_step_under_way(long_run, tmp_path):
    flags, chance, done = [*LONG, "--steps", 40, "--resume", "--output"], random.Random(0), []
    began = time.perf_counter()  # processes start fast, for `long_run` has started their server
    begin([*flags, tmp_path / "whole"], tmp_path / "stderr").join()
    seconds, whole, output = time.perf_counter() - began, primed_bytes(tmp_path / "whole"), tmp_path / "primed"
    for _ in range(20):
        process = begin([*flags, output], tmp_path / "stderr")
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.join()
        done.append(assert_whole(output, 40))
        if done[-1] == 40:
            assert not (output / "priming.json").exists() or primed_bytes(output) == whole
            shutil.rmtree(output)
    assert any(0 < steps < 40 for steps in done), done
    process = begin([*flags, output], tmp_path / "stderr")
    process.join()
    assert process.exitcode == 0 and primed_bytes(output) == whole
    assert not list(output.glob(".writing-*"))


@pytest.mark.parametrize(
    "fault, steps",
    [("killed_while_a_checkpoint_is_written", 4), ("killed_before_a_checkpoint_takes_its_place", 4),
     ("killed_between_the_last_files", 12)],
)
def test_a_kill_at_the_worst_moment_leaves_a_whole_checkpoint(fault, steps, long_run, tmp_path):
    output = tmp_path / "primed"
    earlier = begin([*LONG, "--output", output, "--seed", 1], tmp_path / "stderr")
    earlier.join()
    older = primed_bytes(output)
    process = begin([*LONG, "--output", output], tmp_path / "stderr", fault=fault)
    process.join()
    assert process.exitcode == -signal.SIGKILL and assert_whole(output) == steps
    if steps < 12:  # the earlier output stands until the last moment ...
        assert (output / "priming.json").exists() and primed_bytes(output) == older != long_run
    else:  # ... and then does not pass for a whole one
        assert not (output / "priming.json").exists()
    process = begin([*LONG, "--output", output, "--resume"], tmp_path / "stderr")
    process.join()
    assert process.exitcode == 0 and primed_bytes(output) == long_run
    assert not list(output.glob(".writing-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("method", ["meta", "ft"])  # with dropout, the random state counts too
def test_a_stopped_run_tells_the_command_that_resumes_it(number, method, tmp_path):
    flags = [*LONG, "--steps", 150, "--save-every", 1000, "--method", method, "--output"]
    whole = begin([*flags, tmp_path / "whole"], tmp_path / "stderr")
    whole.join()
    process = begin([*flags, tmp_path / "primed"], tmp_path / "stopped")
    while not (tmp_path / "primed").exists():  # made just before the first step
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(process.pid, number)
    process.join()
    (line,) = (tmp_path / "stopped").read_text().splitlines()
    stopped, resuming = line.split("; to go on: ")
    assert process.exitcode == 2 and re.fullmatch(r"prime.py: stopped after step \d+ of 150", stopped)
    python, script, *words = shlex.split(resuming)
    assert (python, Path(script).name) == ("python", "prime.py") and words == [*map(str, flags), str(tmp_path / "primed"), "--resume"]
    process = begin(words, tmp_path / "stderr")
    process.join()
    assert process.exitcode == 0 and primed_bytes(tmp_path / "primed") == primed_bytes(tmp_path / "whole")


def test_resuming_a_complete_run_does_nothing(table):
    output = table[7][0] / "primed"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    flags = ["--src", "en", "es", *DEMO, *SMALL_PRIMING, *PRIMING[7], "--output", output, "--resume"]
    assert command("prime.py", *flags).stdout == f"{output} is complete\n"
    assert "seed 0, now 3" in command("prime.py", *flags, "--seed", 3, status=2).stderr
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A folder with the checkpoint of a run that was killed, and a copy of the model and the data it used."""
    root = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(HERE / "demo/encoder", root / "encoder")
    shutil.copytree(HERE / "demo/wikiann", root / "wikiann")
    flags = [*LONG, "--model", root / "encoder", "--data", root / "wikiann", "--output", root / "primed"]
    process = begin(flags, root / "stderr", fault="killed_while_a_checkpoint_is_written")
    process.join()
    assert assert_whole(root / "primed") == 4
    return root, flags


@pytest.mark.parametrize(
    "change, told",
    [(["--inner-lr", "0.1"], "inner_lr 0.03, now 0.1"), (["--steps", "13"], "steps 12, now 13"),
     (["--src", "es", "en"], "src ['en', 'es'], now ['es', 'en']"), ("data", "data_checksum"), ("model", "weights_checksum"),
     ("no flag", "holds an unfinished run: go on with it by --resume"), ("cut", "--resume, "), ("flipped", "--resume, ")],
)
def test_resuming_another_run_is_refused_and_leaves_the_checkpoint(change, told, unfinished, tmp_path):
    root, flags = unfinished
    shutil.copytree(root, tmp_path / "copy")
    flags = [str(flag).replace(str(root), str(tmp_path / "copy")) for flag in flags]
    record = tmp_path / "copy/primed/checkpoint.pt"
    state = torch.load(record, weights_only=True)
    settings = json.loads(state["settings"])
    settings.update(model=str(tmp_path / "copy/encoder"), data=str(tmp_path / "copy/wikiann"))
    torch.save({**state, "settings": json.dumps(settings)}, record)
    if change == "data":
        path = tmp_path / "copy/wikiann/en/train.txt"
        path.write_text(path.read_text().replace("B-LOC", "B-ORG", 1))
    elif change == "model":
        from safetensors.torch import save_file

        weights = tensors(tmp_path / "copy/encoder")
        weights["embeddings.word_embeddings.weight"][0, 0] += 1
        save_file(weights, tmp_path / "copy/encoder/model.safetensors", {"format": "pt"})
    elif change == "cut":
        os.truncate(record, record.stat().st_size // 2)
    elif change == "flipped":
        record.write_bytes(b"x" + record.read_bytes()[1:])
    elif isinstance(change, list):
        flags += change
    before = record.read_bytes()
    done = command("prime.py", *flags, *([] if change == "no flag" else ["--resume"]), status=2)
    (line,) = done.stderr.splitlines()
    assert told in line and record.read_bytes() == before
    assert [path.name for path in record.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    "flags, told",
    [(["--method", "maml", "--inner-lr", "1e4"], r"step \d+: query losses of the tasks: en \S+, es nan; norm of the meta-gradient: nan; lower --inner-lr"),
     (["--outer-lr", "1e15"], r"step \d+: query losses of the tasks: en \S+, es \S+; norm of the meta-gradient: \S+; lower")],
)
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(flags, told, tmp_path):
    done = command("prime.py", *LONG, "--steps", 300, "--output", tmp_path / "primed", *flags, status=2)
    (line,) = done.stderr.splitlines()
    assert re.search(told, line), line
    steps = int(re.search(r"step (\d+)", line)[1])
    checkpoint = tmp_path / "primed/checkpoint.pt"
    assert checkpoint.exists() == (steps > 1)
    if steps > 1:
        state = torch.load(checkpoint, weights_only=True)
        assert len(state["losses"]) == steps - 1 and all(map(math.isfinite, state["losses"]))


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(monkeypatch, tmp_path):
    steps, loss = itertools.count(1), prime.tag_loss

    def sharp(model, sentences):  # the root has an infinite slope at zero
        scores = model(sentences)
        return loss(lambda _: scores, sentences) + (torch.sqrt(0 * scores.sum()) if next(steps) > 24 else 0)

    monkeypatch.setattr(prime, "tag_loss", sharp)
    flags = [*LONG, "--inner-steps", 5, "--method", "ft", "--output", tmp_path / "primed"]
    monkeypatch.setattr(sys, "argv", ["prime.py", *map(str, flags), "--steps", "100"])
    with pytest.raises(prime.BadInput, match=r"step 13: query losses of the tasks: en \d\S+, es \d\S+; .* nan"):
        prime.main()
    assert len(torch.load(tmp_path / "primed/checkpoint.pt", weights_only=True)["losses"]) == 12


def share(count, flags, folder, fault={}):
    """What torchrun does: starts `count` processes that find each other by their environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [begin(flags, folder / f"stderr-{rank}", fault=fault.get(rank),
                  environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_what_one_gives(count, tmp_path):
    flags = [*LONG, "--tasks", 4, "--output"]
    alone = begin([*flags, tmp_path / "alone"], tmp_path / "stderr")
    alone.join()
    for process in share(count, [*flags, tmp_path / "shared"], tmp_path):
        process.join()
        assert process.exitcode == 0
    for name in ("model.safetensors", "adapter.safetensors"):
        one, several = tensors(tmp_path / "alone", name), tensors(tmp_path / "shared", name)
        assert one.keys() == several.keys()
        # In exact arithmetic the bias of the keys has no gradient: AdamW makes steps of its rounding errors.
        compared = [key for key in one if not key.endswith("attention.self.key.bias")]
        assert all((one[key] - several[key]).abs().max() <= 1e-6 for key in compared)
        assert len(one) - len(compared) == (2 if name == "model.safetensors" else 0)


@pytest.mark.parametrize("method, tolerance", [("maml", 0), ("meta", 1e-7)])
def test_several_processes_take_theta_h_from_the_first_task(method, tolerance, tmp_path):
    """To the bit where each task is encoded by itself; priming packs the support sets of a process together."""
    flags = [*LONG, "--tasks", 4, "--method", method, "--output"]
    runs = [begin([*flags, tmp_path / "1"], tmp_path / "stderr", fault="killed_after_the_first_step")]
    for count in (2, 4):
        runs += share(count, [*flags, tmp_path / str(count)], tmp_path, fault={0: "killed_after_the_first_step"})
    for process in runs:
        process.join()
    heads = []
    for count in (1, 2, 4):
        state = torch.load(tmp_path / str(count) / "checkpoint.pt", weights_only=True)
        assert len(state["losses"]) == 1
        heads.append(torch.cat([state["states"][0][name].flatten() for name in ("head.weight", "head.bias")]))
    assert heads[0].any() and all((head - heads[0]).abs().max() <= tolerance for head in heads)


def killed_in_training():
    prime.distributed.broadcast = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path):
    flags = [*LONG, "--tasks", 2, "--output", tmp_path / "shared"]
    first, second = share(2, flags, tmp_path, fault={1: "killed_in_training"})
    second.join()
    first.join(20)
    (line,) = (tmp_path / "stderr-0").read_text().splitlines()
    assert second.exitcode == -signal.SIGKILL and first.exitcode == 2 and line.startswith("prime.py: priming: RuntimeError")


def test_fine_tuning_resumes_by_its_results_and_never_breaks_a_line(tmp_path):
    results = tmp_path / "results.jsonl"
    flags = ["--tgt", "hi", "af", *DEMO, *SMALL_TUNING, "--init", "none", "--results", results]
    both = [begin([*flags, "--seeds", *seeds], tmp_path / f"stderr-{seeds[0]}", "finetune.py") for seeds in ((0, 1), (2, 3))]
    for process in both:
        process.join()
    lines = read_lines(results)
    runs = {(line["target"], line["seed"]) for line in lines}
    assert runs == set(itertools.product(("hi", "af"), range(4))) and len(lines) == 8
    done = command("finetune.py", *flags, "--seeds", 0, 1, 2, 3, 4, "--resume")
    again = read_lines(results)
    assert again[:8] == lines and [(line["target"], line["seed"]) for line in again[8:]] == [("hi", 4), ("af", 4)]
    assert [row.split()[-1] for row in done.stdout.splitlines()[-2:]] == ["5", "5"]  # the table has the earlier ones too
    command("finetune.py", *flags, "--seeds", 0, 0, "--lr", 1e-2, "--resume")
    assert len(read_lines(results)) == 12  # other settings are another run; a seed given twice is one


def test_results_of_other_kinds_are_not_taken_for_runs(tmp_path):
    results, base = tmp_path / "r.jsonl", [*DEMO, "--limit-train", 30, "--limit-test", 30, "--init", "none", "--epochs", 1]
    command("finetune.py", "--tgt", "hi", *base, "--results", results, "--save", tmp_path / "a")
    command("finetune.py", "--tgt", "af", "--score", tmp_path / "a/hi-0", "--data", "demo/wikiann", "--results", results)
    command("finetune.py", "--tgt", "af", *base, "--results", results, "--resume")
    command("finetune.py", "--tgt", "hi", *base, "--results", results, "--resume", "--save", tmp_path / "b")
    command("finetune.py", "--tgt", "hi", *base, "--results", results, "--resume", "--save", tmp_path / "b")
    runs = [(line["target"], line["score"] is None) for line in read_lines(results)]
    assert runs == [("hi", True), ("af", False), ("af", True), ("hi", True)]  # the last for its --save
    assert (tmp_path / "b/hi-0/tuned.json").exists()
    for text in ("5", "{"):
        results.write_text(text)
        done = command("finetune.py", "--tgt", "hi", *base, "--results", results, "--resume", status=2)
        assert len(done.stderr.splitlines()) == 1 and f"--results {results}: " in done.stderr


def test_a_loss_that_is_not_finite_stops_fine_tuning(tmp_path):
    flags = ["--tgt", "hi", *DEMO, *SMALL_TUNING, "--init", "none", "--tune", "full", "--lr", 1e15]
    done = command("finetune.py", *flags, "--results", tmp_path / "r", status=2)
    assert "fine-tuning, seed 0: the loss is nan; lower --lr" in done.stderr and not (tmp_path / "r").read_text()


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path):
    process = begin([*LONG, "--output", tmp_path / "primed"], tmp_path / "stderr", fault="disk_full")
    process.join()
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert process.exitcode == 2 and line.startswith(f"prime.py: writing {tmp_path / 'primed'}: ")
    assert not list((tmp_path / "primed").iterdir())


# ---- bad input ----


@pytest.mark.parametrize(
    "script, flags, told",
    [
        ("prime.py", ["--src", "en", "xx", *DEMO], "xx: no train split there; the languages of demo/wikiann are: af az"),
        ("prime.py", [*DEMO, "--support", 10_000], "en: 700 training sentences"),
        ("prime.py", [*DEMO, "--inner-lr", "nan"], "argument --inner-lr"),
        ("prime.py", [*DEMO, "--steps", "0"], "argument --steps"),
        ("prime.py", [*DEMO, "--outer-lr", "-1"], "argument --outer-lr"),
        ("prime.py", [*DEMO, "--query", "1.5"], "argument --query"),
        ("prime.py", [*DEMO, "--seed", str(2**63)], "argument --seed"),
        ("prime.py", [*DEMO, "--tasks", "-2"], "argument --tasks"),
        ("finetune.py", ["--tgt", "hi", *DEMO, "--epochs", "0"], "argument --epochs"),
        ("finetune.py", ["--tgt", "hi", *DEMO, "--lr", "inf"], "argument --lr"),
        ("finetune.py", ["--tgt", "hi", *DEMO, "--init", "none", "--results", "demo"], "--results demo: "),
        ("finetune.py", ["--tgt", "hi", *DEMO, "--init", "none", "--device", "cuda:77"], "--max-length 128, cuda:77: "),
        ("prime.py", [*DEMO, "--max-length", 129], "ValueError: a sentence takes up to 128 pieces"),
        ("prime.py", [*DEMO, "--device", "cuda:77"], "--max-length 128, cuda:77: "),
        ("prime.py", [*DEMO, "--output", "demo"], "demo exists and was not written by us (no priming.json)"),
        ("prime.py", ["--model", "no/where", "--data", "demo/wikiann"], "--model no/where (offline: a folder), --max-length 128, cpu: "),
        ("prime.py", ["--model", "demo/encoder", "--data", "no/where"], "--data no/where (offline: a folder), en train: "),
        ("finetune.py", ["--tgt", "hi", "--init", "no/where", *DEMO], "--init no/where, which prime.py writes: "),
        ("finetune.py", DEMO, "the following arguments are required: --tgt"),
    ],
)
def test_bad_input_is_one_line(script, flags, told, tmp_path):
    outputs = ["--output", tmp_path / "out"] if script == "prime.py" else ["--results", tmp_path / "out"]
    done = command(script, *outputs, *flags, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and told in line and done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, told",
    [
        ("a\tO\nb\n", "train.txt:2: 'b' is not a token, a tab and a tag"),
        ("a\tO\nb\tO\tO\n", "train.txt:2: 'b\\tO\\tO' is not a token, a tab and a tag"),
        ("a\tO\n\nb\tB-DOG\n", "train.txt:3: 'b\\tB-DOG' is not a token, a tab and a tag in UTF-8; the tags are: O B-PER"),
        ("a\tO\n\tO\n", "train.txt:2: '\\tO' is not a token, a tab and a tag"),
        ("a\tO\nb\t\n", "train.txt:2: 'b\\t' is not a token, a tab and a tag"),
        ("\n\n", "the train split is empty"),
        ("", "the train split is empty"),
        (b"a\tO\nb\xff\tO\n", "train.txt:2: 'b\ufffd\\tO' is not a token, a tab and a tag in UTF-8"),
    ],
)
def test_bad_lines_are_told_with_file_line_and_tag(text, told, tmp_path):
    (tmp_path / "hi").mkdir()
    (tmp_path / "hi/train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(prime.BadInput, match=re.escape(told)):
        prime.read_split(str(tmp_path), "hi", "train")


def test_the_benchmark_runs():
    done = command("benchmarks/step.py", "--rounds", 1)  # it compares the meta-gradients of all ways itself
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows][:3] == ["| step", "| fine-tuning step", "| fine-tuning step, padded"]
    assert "relative difference" in done.stdout and float(rows[1][1]) == 1


def test_the_plot_of_the_inner_rate_shows_what_the_runs_ended_with(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")

    def in_this_process(words, **_):
        status = 2 if words[-2].endswith("maml-1") else 0  # 1e4 in its place stops that run
        done = command(Path(words[1]).name, *["1e4" if status and word == "1" else word for word in words[2:]], status=status)
        return Namespace(**vars(done), returncode=status)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    flags = [*DEMO, "--steps", 3, "--support", 4, "--query", 4, "--limit-train", 50, "--output", tmp_path]
    for picture in ("one.svg", "two.svg"):  # the second time from what the first has left
        done = command("benchmarks/inner_rate.py", *flags, "--picture", tmp_path / picture)
        head, ours, maml = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert head[1:] == ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"] and maml[-1] == "nan"
    losses = json.loads((tmp_path / "meta-1e-1/priming.json").read_text())["last_losses"]
    assert ours[5] == f"{statistics.mean(losses) / 2:.3f}"


def test_an_interruption_is_told_as_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    with pytest.raises(SystemExit, match="2"):
        prime.run(lambda: signal.default_int_handler(signal.SIGINT, None))
    assert capsys.readouterr().err == "finetune.py: interrupted\n"


def test_table_1_is_what_its_runs_found(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="an extra of the benchmarks")
    shutil.copytree("demo/wikiann", tmp_path / "data")
    train, test = (tmp_path / "data/hi" / f"{split}.txt" for split in ("train", "test"))
    repeated = "\n\n".join(train.read_text().split("\n\n")[:7])
    test.write_text(f"{repeated}\n\n{test.read_text()}")

    def in_this_process(words, **_):
        small = ["--limit-train", 50, "--support", 4, "--query", 4] if words[1].endswith("prime.py") else []
        command(Path(words[1]).name, *words[2:], *small)
        return Namespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", in_this_process)
    flags = ["--model", "demo/encoder", "--data", tmp_path / "data", "--tgt", "hi", "af", "--rows", 1, 3, 4, 5, "--one-seed", 1,
             "--seeds", 0, 1, "--steps", 2, "--limit-train", 100, "--limit-test", 40, "--distinct", "hi", "--output", tmp_path / "t"]
    told = [command("benchmarks/table1.py", *flags, "--picture", tmp_path / name).stdout for name in ("one.svg", "two.svg")]
    assert told[0] == told[1] and (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "is of other settings" in command("benchmarks/table1.py", *flags, "--steps", 3, status=2).stderr
    f1 = {row: {(line["target"], line["seed"]): line["f1"] for line in read_lines(tmp_path / f"t/row-{row}/official.jsonl")}
          for row in (1, 3, 4, 5)}
    assert [len(of_row) for of_row in f1.values()] == [2, 4, 4, 4]  # nothing twice

    def cells(values, digits):
        columns = [[values[target, seed] for seed in (0, 1)] for target in ("hi", "af")]
        columns.append([statistics.mean(pair) for pair in zip(*columns)])
        return [f"{statistics.mean(column):.{digits}f} ± {statistics.stdev(column):.{digits}f}" for column in columns]

    rows = [line.strip("| ").split(" | ") for line in told[0].splitlines()]
    assert ["4 Meta Priming → AT", *cells(f1[4], 2)] in rows
    assert ["4 − 5", *cells({key: f1[4][key] - f1[5][key] for key in f1[4]}, 2)] in rows
    ends = {target: (statistics.mean(f1[3][target, seed] for seed in (0, 1)), f1[1][target, 0]) for target in ("hi", "af")}
    shares = {key: 100 * (f1[4][key] - ends[key[0]][0]) / (ends[key[0]][1] - ends[key[0]][0]) for key in f1[4]}
    assert ["Meta Priming → AT", *cells(shares, 0)] in rows
    assert "hi: 7 of 40 test sentences are training sentences too" in told[0]
    lines = read_lines(tmp_path / "t/row-4/distinct.jsonl")
    assert [(line["target"], line["seed"], line["test_sentences"]) for line in lines] == [("hi", 0, 33)]
    assert ["4 Meta Priming → AT", *2 * [f"{lines[0]['f1'] - f1[4]['hi', 0]:.2f}"]] in rows


@pytest.mark.parametrize("text", [b"a\tO\r\nb\tB-LOC\r\n\r\nc\tO\r\n", b"\n\na\tO\nb\tB-LOC\n\n\nc\tO", "a\tO\nb\tB-LOC\n\nc\tO\n".encode()])
def test_line_ends_of_all_kinds_are_accepted(text, tmp_path):
    (tmp_path / "hi").mkdir()
    (tmp_path / "hi/train.txt").write_bytes(text)
    assert prime.read_split(str(tmp_path), "hi", "train")[0] == [(["a", "b"], [0, 5]), (["c"], [0])]


def test_splits_with_other_tags_are_refused(tmp_path):
    import datasets

    for language, names in (("en", prime.TAGS), ("es", prime.TAGS[::-1])):
        features = datasets.Features(tokens=datasets.List(datasets.Value("string")),
                                     ner_tags=datasets.List(datasets.ClassLabel(names=names)))
        table = datasets.Dataset.from_dict({"tokens": [["a"]] * 50, "ner_tags": [[1]] * 50}, features=features)
        (tmp_path / language).mkdir()
        table.to_parquet(str(tmp_path / language / "train-00000-of-00001.parquet"))
    done = command("prime.py", "--model", "demo/encoder", "--data", tmp_path, "--output", tmp_path / "out", status=2)
    assert "es train: the tags are " in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_parameter_without_a_gradient_does_no_harm(tmp_path):
    """RoFormer's positions are fixed sinusoids, kept as a parameter."""
    import transformers

    shutil.copytree("demo/encoder", tmp_path / "roformer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = dict(vocab_size=1429, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=128, embedding_size=16)
    encoder = transformers.RoFormerModel(transformers.RoFormerConfig(**sizes))
    encoder.save_pretrained(tmp_path / "roformer")
    command("prime.py", *LONG, "--steps", 2, "--model", tmp_path / "roformer", "--output", tmp_path / "out")


def test_an_entity_that_begins_with_i_is_kept_and_told(tmp_path, capsys):
    (tmp_path / "hi").mkdir()
    (tmp_path / "hi/train.txt").write_text("a\tI-LOC\nb\tI-LOC\nc\tB-PER\nd\tI-PER\ne\tI-ORG\n")
    assert prime.read_split(str(tmp_path), "hi", "train")[0] == [(list("abcde"), [6, 6, 1, 2, 4])]
    assert capsys.readouterr().err == f"{tmp_path}/hi: 2 entities of train begin with I-; they stay as they are\n"


def broken_folders(tmp_path, primed):
    """Folders with something missing or wrong: flags of finetune.py, and what it must tell."""
    import transformers

    def copied(name, source="demo/encoder", without=()):
        return shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns(*without))

    def edited(name, file, change):
        path = copied(name, primed) / file
        path.write_bytes(change(path.read_bytes()))
        return path.parent

    tokenizers = "tokenizer*", "vocab*", "special*"
    yield ["--init", "none", "--model", copied("no-tokenizer", without=tokenizers)], "no-tokenizer (offline: a folder), --max-length"
    yield ["--init", "none", "--model", copied("no-weights", without=["*.safetensors"])], "no-weights (offline: a folder), --max-length"
    gpt = copied("gpt", without=["*.safetensors", "config.json"])
    sizes = dict(vocab_size=1429, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(gpt)
    yield ["--init", "none", "--model", gpt], "gpt2 is no encoder"
    fnet = copied("fnet", without=["*.safetensors", "config.json"])  # its layers have no attention
    sizes = dict(vocab_size=1429, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    transformers.FNetModel(transformers.FNetConfig(**sizes)).save_pretrained(fnet)
    yield ["--init", "none", "--model", fnet, "--pe", "houlsby"], "fnet has not two blocks a layer that we know"
    yield ["--init", edited("pe", "priming.json", lambda data: data.replace(b'"pe": "adapter"', b'"pe": "houlsby"'))], "holds other parameters"
    yield ["--init", copied("no-adapter", primed, ["adapter*"])], "no-adapter: FileNotFoundError"
    yield ["--init", copied("no-record", primed, ["priming.json"])], "no-record, which prime.py writes: FileNotFoundError"
    yield ["--init", edited("cut", "adapter.safetensors", lambda data: data[:-9])], "cut: SafetensorError"
    yield ["--init", edited("size", "priming.json", lambda data: data.replace(b'"bottleneck": 8', b'"bottleneck": 9'))], "holds other parameters"
    yield ["--init", edited("json", "priming.json", lambda data: data[:50])], "json, which prime.py writes: JSONDecodeError"


def test_a_broken_folder_is_told_by_name_and_nothing_is_written(table, tmp_path):
    for flags, told in broken_folders(tmp_path, table[4][0] / "primed"):
        results = ["--results", tmp_path / "results.jsonl"]
        data = ["--data", "demo/wikiann", *SMALL_TUNING]
        done = command("finetune.py", "--tgt", "hi", *data, *results, *flags, status=2)
        line = done.stderr.splitlines()[-1]
        assert told in line and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "results.jsonl").exists() or not (tmp_path / "results.jsonl").read_text()


def test_without_peft_lora_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    done = command("prime.py", *LONG, "--pe", "lora", "--output", tmp_path / "primed", status=2)
    (line,) = done.stderr.splitlines()
    assert "--pe lora (lora: pip install peft)" in line and "ModuleNotFoundError" in line and not list(tmp_path.iterdir())


def test_missing_split_and_folder_of_others_are_told(tmp_path):
    shutil.copytree("demo/wikiann/hi", tmp_path / "data/hi", ignore=shutil.ignore_patterns("test*"))
    flags = ["--tgt", "hi", "--model", "demo/encoder", "--init", "none", "--data", tmp_path / "data"]
    done = command("finetune.py", *flags, "--results", tmp_path / "r", status=2)
    assert f"{tmp_path}/data/hi: no test split there; the languages of {tmp_path}/data are: hi" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "mine/partial-results").mkdir()
    done = command("prime.py", *LONG, "--output", tmp_path / "mine", status=2)
    assert "exists and was not written by us" in done.stderr
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.tex", "partial-results"}


# ---- fuzz ----


def mutate(data, chance):
    """One to three of: cut, bits flipped, lines shuffled, control characters, a huge line, a part twice."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            flipped = bytearray(data)
            for _ in range(chance.randint(1, 8)):
                if flipped:
                    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            data = bytes(flipped)
        elif kind == 2:
            lines = data.split(b"\n")
            data = b"\n".join(chance.sample(lines, len(lines)))
        elif kind == 3:
            data = data[:at] + bytes(chance.choices(range(32), k=4)) + data[at:]
        elif kind == 4:
            data = data[:at] + chance.choice([b"x", b"\t", b" ", b"\xf0"]) * 10**chance.randint(1, 6) + data[at:]
        else:
            data = data[:at] + data[at // 2 :]
    return data


def test_the_reader_gives_what_was_written_or_one_error_for_2000_mutated_files(tmp_path):
    chance, path, loaded = random.Random(0), tmp_path / "hi/train.txt", 0
    path.parent.mkdir()
    original = b"\n".join((HERE / "demo/wikiann/hi/train.txt").read_bytes().split(b"\n")[:60])
    began, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        data = mutate(original, chance)
        path.write_bytes(data)
        try:
            rows, names = prime.read_split(str(tmp_path), "hi", "train")
        except prime.BadInput as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
            continue
        loaded += 1
        text = "\n\n".join("\n".join(f"{word}\t{names[tag]}" for word, tag in zip(*row)) for row in rows)
        lines = [line.rstrip("\r") for line in data.decode().split("\n")]
        blocks = itertools.groupby(lines, key=lambda line: line == "")
        assert text == "\n\n".join("\n".join(block) for blank, block in blocks if not blank)
    assert 50 < loaded < 1950
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("kind", ["adapter.safetensors", "checkpoint.pt"])
def test_the_loaders_load_or_give_one_error_for_2000_mutated_files(kind, unfinished, table, tmp_path, demo):
    chance, outcomes = random.Random(0), {True: 0, False: 0}
    model = adapters.Tagger(copy.deepcopy(demo[0]).float(), 7, bottleneck=8)
    theta_p, theta_a, theta_h = model.sets()
    optimizer, schedule = prime.adamw([*theta_p.values(), *theta_a.values()], 1e-2, 12)
    folder = unfinished[0] / "primed" if kind == "checkpoint.pt" else table[4][0] / "primed"
    original = (folder / kind).read_bytes()
    settings = json.loads(torch.load(folder / kind, weights_only=True)["settings"]) if kind == "checkpoint.pt" else {}
    args = Namespace(**{**settings, "output": tmp_path, "resume": True, "device": "cpu"})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        (tmp_path / kind).write_bytes(mutate(original, chance))
        try:
            with prime.reading("fuzz"):
                if kind == "checkpoint.pt":
                    assert len(prime.resume(args, model, optimizer, schedule)) == 4
                else:
                    adapters.load_parameters(theta_a, tmp_path / kind)
            outcomes[True] += 1
        except prime.BadInput as error:
            assert "\n" not in str(error) and "AssertionError" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 0, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kB


def test_priming_gains_ten_points_on_hindi_with_every_seed(tmp_path):
    """The README's first command. The demo was built to show it: this tests the code, not the method."""
    command("prime.py", "--src", "en", "es", *DEMO, "--outer-lr", 1e-3, "--steps", 200, "--output", tmp_path / "primed")
    scores = {}
    for init in ("none", tmp_path / "primed"):
        flags = ["--lr", 1e-3, "--seeds", 0, 1, 2, 3, 4, "--results", tmp_path / "results.jsonl", "--init", init]
        command("finetune.py", "--tgt", "hi", *DEMO, *flags)
    for line in read_lines(tmp_path / "results.jsonl"):
        scores.setdefault(line["seed"], []).append(line["f1"])
    assert all(primed - pretrained >= 10 for pretrained, primed in scores.values()), scores
