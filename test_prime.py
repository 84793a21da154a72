"""The paper's claims, each with the test that fails if the code breaks it.

| claim | test |
|---|---|
| line 6: the inner loop does not touch θp | test_theta_p_stays_untouched_in_the_inner_loop |
| line 9: after the meta step, θh = θ1_h | test_theta_h_becomes_the_first_tasks_adapted_head |
| this table is complete and in the order of the tests | test_the_table_of_claims_is_complete |
| §3.1: θa may be a small subset of θp | test_theta_a_may_be_a_subset_of_theta_p_and_one_set_empty |
| §3.1: a parameter that the loss does not use | test_an_unused_parameter_is_not_updated |
| §3.1: θp, θa and θh are disjoint | test_parameter_sets_are_disjoint_and_cover_the_model |
| line 1: "while" is the caller's loop | test_each_iteration_is_one_meta_step_and_break_ends_training |
| line 2: a task is a language; languages alternate | test_support_and_query_sets_are_disjoint |
| line 2: FT priming learns from the same sentences | test_ft_priming_draws_the_same_sentences |
| line 4: θi = θ in each task | test_every_task_starts_from_theta |
| line 6: both gradients at the same θi; line 9: the sum | test_first_order_gradient_equals_the_closed_form |
| lines 3 to 8: memory stays constant | test_memory_does_not_grow_with_inner_steps_or_tasks |
| lines 5 to 7: f(x; θp) does not change | test_encode_gives_the_same_result |
| lines 5 to 7: one forward pass serves all S steps | test_encode_runs_once_per_set_for_any_number_of_steps |
| line 9 updates θp, θa and θh | test_a_meta_step_updates_the_three_sets_and_nothing_else |
| line 9: "− β ∇" by AdamW; line 11 | test_five_meta_steps_equal_a_hand_written_adamw |
| lines 9 and 10: the next step uses the new θ | test_under_autocast_each_step_uses_the_updated_parameters |
| line 9: ∇θp under autocast | test_under_autocast_encode_keeps_the_gradient_of_theta_p |
| §4: the sets have the paper's sizes on mBERT | test_parameter_counts_of_mbert |
| §4: g starts near the identity, h as BERT's head | test_adapter_and_head_are_initialised_as_in_the_paper |
| §4: Algorithm 1 on a transformer | test_first_order_gradient_of_a_transformer_equals_copies_with_sgd |
| §4.2: first order approximates the exact gradient | test_second_order_is_exact_and_first_order_is_not |
| §4.2: on a transformer | test_second_order_gradient_of_a_transformer_equals_finite_differences |
| §4.2: the exact gradient needs second derivatives | test_fused_attention_is_refused_with_second_order |
| §4.3: fine-tuning updates its parameters only | test_fine_tuning_leaves_the_rest_bit_identical |
| §5.2: with S = 0, ∇ is fine-tuning's | test_without_inner_steps_the_gradient_is_that_of_fine_tuning |
| §5.2: fine-tuning is Algorithm 1 with S = 0 | test_fine_tune_equals_algorithm_1_without_inner_steps |
| prime.py can be copied: it needs torch only | test_prime_imports_torch_alone |

§5.1, the MAML loop, is `maml` in most tests. tests/ covers what the paper does not claim.
"""

import copy
import re
import shutil
import subprocess
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import adapters
import finetune
import prime
from conftest import DEMO, FROM_PRETRAINED, HINDI, PE, SMALL_PRIMING, SMALL_TUNING, command, moved, tensors

PRIMING_AND_MAML = pytest.mark.parametrize("maml", [False, True], ids=["priming", "maml"])


class SmallModel(nn.Module):
    """h(g(f(x))) with a buffer and a constant. Records the parameters of every forward pass."""

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

    def encode_sets(self, batches):
        return [(self.features(x), y) for x, y in batches]

    def forward(self, x):
        self.calls.append({name: p.detach().clone() for name, p in self.named_parameters()})
        return self.h(torch.tanh(self.g(x if x.shape[-1] == 5 else self.features(x))))

    def split_parameters(self):
        named = dict(self.named_parameters())
        parts = ({n: p for n, p in named.items() if n.startswith(prefix)} for prefix in ("f.", "g.", "h."))
        return adapters.ParameterSets(*parts)


class LinearModel(nn.Sequential):
    """h(g(f(x))) of three matrices, whose gradients can be written by hand: `closed_form_gradients`."""

    def __init__(self):
        torch.manual_seed(0)
        shapes = {"f": (4, 5), "g": (5, 3), "h": (3, 2)}
        super().__init__(OrderedDict((n, nn.Linear(*shape, bias=False)) for n, shape in shapes.items()))
        self.double()

    split_parameters = SmallModel.split_parameters


def split_by_bias(model):
    """θa as "a small subset of θp" (§3.1): the biases of the encoder."""
    theta_p, theta_a, theta_h = model.split_parameters()
    body = {**theta_p, **theta_a}
    biases = {n: p for n, p in body.items() if n.endswith("bias")}
    return {n: p for n, p in body.items() if n not in biases}, biases, theta_h


def small_loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def squared_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().sum() / (2 * len(x))


def make_tasks(count, seed=1, regression=False):
    """Each set has six points, in three classes or with two real targets."""
    rng = torch.Generator().manual_seed(seed)

    def draw():
        x, targets = torch.randn(6, 6, generator=rng, dtype=torch.float64).split([4, 2], 1)
        return x, targets if regression else torch.randint(3, (6,), generator=rng)

    return [(draw(), draw()) for _ in range(count)]


def priming(model, batches, loss=small_loss, sets=None, lr=1e-2, steps=10, **settings):
    """Algorithm 1 with the paper's optimizer: a generator that has not started."""
    theta_p, theta_a, theta_h = sets or model.split_parameters()
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, lr, steps)
    return prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=loss,
        optimizer=optimizer, scheduler=scheduler, **settings)


def meta_step(model, tasks, *more, **settings):
    """Runs one meta step and returns the model's state before it."""
    before = copy.deepcopy(model.state_dict())
    list(priming(model, [tasks], *more, **settings))
    return before


def equal(a, b, prefix=""):
    return not any(name.startswith(prefix) for name in moved(a, b))


def assert_refused(meta_training, model, message, error=ValueError):
    """The first iteration raises, and nothing in the model has changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        next(meta_training)
    assert equal(model.state_dict(), before)


def closed_form_gradients(theta, batch):
    """The gradients of `squared_loss` in f, g and h, by hand."""
    (x, y), (f, g, h) = batch, theta
    error = (x @ f.T @ g.T @ h.T - y) / len(x)
    return (error @ h @ g).T @ x, (error @ h).T @ x @ f.T, error.T @ x @ f.T @ g.T


def closed_form_meta_gradient(theta, tasks, steps, maml, lr):
    """The sum over tasks of the query gradient at θi, and θ1_h, from plain tensors without autograd."""
    total, heads = [torch.zeros_like(matrix) for matrix in theta], []
    for support, query in tasks:
        f, g, h = theta
        for _ in range(steps):
            df, dg, dh = closed_form_gradients((f, g, h), support)
            f, g, h = f - lr * df * maml, g - lr * dg, h - lr * dh
        total = [a + b for a, b in zip(total, closed_form_gradients((f, g, h), query))]
        heads.append(h)
    return total, heads[0]


def adapted_copy(model, inner_params, loss, support, lr, steps):
    """The model at θi: a deep copy, of which torch.optim.SGD has updated `inner_params`."""
    copied = copy.deepcopy(model)
    named = dict(copied.named_parameters())
    optimizer = torch.optim.SGD([named[name] for name in inner_params], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(copied, support).backward()
        optimizer.step()
    copied.zero_grad()
    return copied


def copying_meta_gradient(model, sets, loss, tasks, steps, lr, maml):
    """The first-order meta-gradient and θ1_h by name, and the query losses, by `adapted_copy`."""
    theta_p, theta_a, theta_h = sets
    inner_params = [*theta_a, *theta_h, *(theta_p if maml else ())]
    grads, heads, losses = dict.fromkeys([*theta_p, *theta_a], 0.0), [], []
    for support, query in tasks:
        copied = adapted_copy(model, inner_params, loss, support, lr, steps)
        query_loss = loss(copied, query)
        query_loss.backward()
        named = dict(copied.named_parameters())
        grads = {name: total + named[name].grad for name, total in grads.items()}
        heads.append({name: named[name].detach() for name in theta_h})
        losses.append(query_loss.item())
    return grads, heads[0], losses


def assert_equals_oracle(model, oracle, tolerance):
    grads, theta_1_h, _ = oracle
    named = dict(model.named_parameters())
    for name, expected in {**grads, **theta_1_h}.items():
        actual = named[name].grad if name in grads else named[name].detach()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def finite_difference(model, part, direction, inner_params, loss, tasks, lr, steps, epsilon=1e-5):
    """The derivative, along a direction in `part`, of the sum of the query losses at θi."""
    start, values = parameters_to_vector(part).detach(), []
    for size in (epsilon, -epsilon):
        vector_to_parameters(start + size * direction, part)
        adapted = [adapted_copy(model, inner_params, loss, support, lr, steps) for support, _ in tasks]
        values.append(sum(loss(theta_i, query).item() for theta_i, (_, query) in zip(adapted, tasks)))
    vector_to_parameters(start, part)
    return (values[0] - values[1]) / (2 * epsilon)


def demo_tagger(demo, pe, attention="sdpa"):
    """A Tagger that packs, with θa away from its initial values."""
    torch.manual_seed(0)
    model = adapters.Tagger(copy.deepcopy(demo[0]), 7, pe, 8).double().eval()
    with torch.no_grad():
        for p in model.split_parameters().a.values():
            p.add_(0.02 * torch.randn_like(p))
    model.encoder.set_attn_implementation(attention)
    assert model.packs  # as in the command
    return model


def demo_tasks(demo, count=2):
    return next(prime.sample_batches([demo[2]], steps=1, tasks=count, support=5, query=6, seed=0))


def padded_loss(model, sentences):
    """The usual loss of token classification: a padded batch, −100 for all but a word's first piece."""

    def pad(rows, value):
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    tag_at = [dict(zip(s.word_starts, s.tags, strict=True)) for s in sentences]
    labels = [[tags.get(k, -100) for k in range(len(s.input_ids))] for tags, s in zip(tag_at, sentences)]
    mask = pad([[1] * len(s.input_ids) for s in sentences], 0)
    output = model.encoder(input_ids=pad([s.input_ids for s in sentences], 0), attention_mask=mask)
    logits = model.head(model.adapter(output.last_hidden_state))
    return nn.functional.cross_entropy(logits.flatten(0, 1), pad(labels, -100).flatten())


@PRIMING_AND_MAML
def test_theta_p_stays_untouched_in_the_inner_loop(maml):
    """Bit for bit, in the forward passes of all inner steps and of the query sets. Line 6 updates θa and
    θh; in MAML, its red line updates θp too."""
    model = SmallModel()
    theta = meta_step(model, make_tasks(3), inner_steps=5, inner_lr=0.5, maml=maml)
    assert len(model.calls) == 3 * (5 + 1)
    for k, theta_i in enumerate(model.calls):
        unchanged = [equal(theta_i, theta, prefix) for prefix in ("f.", "g.", "h.")]
        assert unchanged == ([True] * 3 if k % 6 == 0 else [not maml, False, False])


def test_theta_h_becomes_the_first_tasks_adapted_head():
    """Whatever the other tasks are. Their order affects θh only."""
    tasks, states = make_tasks(4), []
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (0,), (2, 1, 0, 3)):
        model = SmallModel()
        theta = meta_step(model, [tasks[k] for k in order])
        theta_1 = model.calls[5]  # in the query pass of the first task, after five inner steps
        assert equal(theta_1, model.state_dict(), "h.") and not equal(theta_1, theta, "h.")
        states.append(model.state_dict())
    first, permuted, _, another_first = states
    assert [equal(state, first, "h.") for state in states] == [True, True, True, False]
    for name in first.keys() - {"h.weight", "h.bias"}:
        for state in (permuted, another_first):
            torch.testing.assert_close(state[name], first[name], rtol=0, atol=1e-10)


def test_the_table_of_claims_is_complete():
    tests = [name for name in globals() if name.startswith("test_")]  # in the order of the file
    assert re.findall(r"^\|.*\| (test_\w+) \|$", __doc__, re.MULTILINE) == tests


@PRIMING_AND_MAML
@pytest.mark.parametrize("variant", ["subset", "empty theta_a", "empty theta_h"])
def test_theta_a_may_be_a_subset_of_theta_p_and_one_set_empty(variant, maml):
    """With an empty θa, the PE method is head tuning; with an empty θh, the head is a constant."""
    tasks, model = make_tasks(3), SmallModel()
    theta_p, theta_a, theta_h = sets = split_by_bias(model)
    if variant == "empty theta_a":
        sets = {**theta_p, **theta_a}, {}, theta_h
    if variant == "empty theta_h":
        sets = theta_p, theta_a, {}
    expected = copying_meta_gradient(model, sets, small_loss, tasks, 5, 0.1, maml)
    before = meta_step(model, tasks, sets=sets, inner_lr=0.1, maml=maml)
    assert_equals_oracle(model, expected, 1e-10)
    assert moved(model.state_dict(), before) == set().union(*sets)


@pytest.mark.parametrize("second_order", [False, True])
def test_an_unused_parameter_is_not_updated(second_order):
    """Each set has one. The others are updated as if it did not exist."""
    tasks, model, without = make_tasks(2), SmallModel(), SmallModel()
    for layer in (model.f, model.g, model.h):
        layer.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = meta_step(model, tasks, second_order=second_order)
    meta_step(without, tasks, second_order=second_order)
    after = model.state_dict()
    assert all(torch.equal(after[f"{layer}.unused"], before[f"{layer}.unused"]) for layer in "fgh")
    assert equal(without.state_dict(), after)


@pytest.mark.parametrize("pe", [None, *PE])
def test_parameter_sets_are_disjoint_and_cover_the_model(pe, demo):
    """Except for BERT's pooler, on which no tag depends."""
    model = demo_tagger(demo, pe)
    names = {name for name, _ in model.named_parameters()}
    pooler = {name for name in names if ".pooler." in name}
    sets = model.split_parameters()
    assert sorted([*sets.p, *sets.a, *sets.h, *pooler]) == sorted(names) and pooler
    assert {*sets.h} == {"head.weight", "head.bias"} and bool(sets.a) == bool(pe)
    assert all(p.requires_grad for p in model.parameters())


def test_each_iteration_is_one_meta_step_and_break_ends_training():
    model, one_step, consumed = SmallModel(), SmallModel(), []
    batches = [make_tasks(3, seed) for seed in range(4)]
    sets = model.split_parameters()
    _, _, query_losses = copying_meta_gradient(model, sets, small_loss, batches[0], 5, 0.03, False)
    before, calls = meta_step(one_step, batches[0]), len(model.calls)
    meta_training = priming(model, (consumed.append(tasks) or tasks for tasks in batches))
    assert not consumed and len(model.calls) == calls and equal(model.state_dict(), before)
    for losses in meta_training:
        assert losses == pytest.approx(query_losses, rel=0, abs=1e-12)  # of each task, at its θi
        break
    assert len(consumed) == 1 and equal(model.state_dict(), one_step.state_dict())


def test_support_and_query_sets_are_disjoint():
    """Both sets of a task are of one language, and languages alternate from task to task."""
    corpora = [[("en", i) for i in range(40)], [("es", i) for i in range(40)]]
    batches = [*prime.sample_batches(corpora, steps=20, tasks=3, support=19, query=21, seed=0)]
    tasks = sum(batches, [])
    assert [len(batch) for batch in batches] == [3] * 20
    for number, (support, query) in enumerate(tasks):
        assert (len(support), len(query), len({*support, *query})) == (19, 21, 40)
        assert {language for language, _ in support + query} == {("en", "es")[number % 2]}
    assert len({tuple(support) for support, _ in tasks}) == 60  # each task draws a new one


def test_ft_priming_draws_the_same_sentences(tmp_path):
    """The query set of a task in FT priming is the support and the query set of meta priming."""
    batches = []

    def observe(module, args):
        if isinstance(module, adapters.Tagger):
            batches.append([s.words for s in args[0]])

    with nn.modules.module.register_module_forward_pre_hook(observe):
        for method in ("meta", "ft"):
            flags = [*SMALL_PRIMING, "--method", method, "--inner-steps", 1, "--output", tmp_path / method]
            command("prime.py", *DEMO, *flags)
    meta, ft = batches[:8], batches[8:]  # two steps of two tasks; in meta, two sets per task
    assert len(ft) == 4
    assert ft == [support + query for support, query in zip(meta[0::2], meta[1::2])]


@PRIMING_AND_MAML
def test_every_task_starts_from_theta(maml):
    """The model's own parameters keep their values until line 9."""
    model, own = SmallModel(), []
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())

    def recording_loss(model, batch):
        own.append({name: p.detach().clone() for name, p in parameters.items()})
        return small_loss(model, batch)

    meta_step(model, make_tasks(3), recording_loss, inner_steps=5, inner_lr=0.5, maml=maml)
    first_passes = model.calls[0::6]
    assert len(own) == 3 * (5 + 1) and len(first_passes) == 3
    assert all(equal(theta, before) for theta in [*own, *first_passes])


@PRIMING_AND_MAML
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_first_order_gradient_equals_the_closed_form(steps, count, maml):
    model, tasks = LinearModel(), make_tasks(count, regression=True)
    theta = [p.detach().clone() for p in model.parameters()]
    (f, g, _), theta_1_h = closed_form_meta_gradient(theta, tasks, steps, maml, lr=0.1)
    meta_step(model, tasks, squared_loss, inner_lr=0.1, inner_steps=steps, maml=maml)
    torch.testing.assert_close(model.f.weight.grad, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.g.weight.grad, g, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.h.weight.detach(), theta_1_h, rtol=0, atol=1e-10)


def test_memory_does_not_grow_with_inner_steps_or_tasks():
    """In first order: autograd keeps no more tensors at once for 50 inner steps, or for 8 tasks."""
    saved_tensor_counts = []
    for steps, count in ((1, 1), (50, 1), (1, 8)):
        alive, counts = weakref.WeakValueDictionary(), []

        def keep(tensor, alive=alive, counts=counts):
            kept = alive[len(counts)] = tensor.detach()  # a saved output would keep itself alive
            counts.append(len(alive))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            meta_step(SmallModel(), make_tasks(count), inner_steps=steps)
        saved_tensor_counts.append(max(counts))
    assert len({*saved_tensor_counts}) == 1 and saved_tensor_counts[0] > 0


@PRIMING_AND_MAML
def test_encode_gives_the_same_result(maml):
    """MAML updates θp in the inner loop, so f(x; θp) changes there and `encode` is not used."""
    tasks, with_encode, without = make_tasks(2), SmallModel(), SmallModel()
    meta_step(with_encode, tasks, encode=with_encode.encode_sets, maml=maml)
    meta_step(without, tasks, maml=maml)
    for p, q in zip(with_encode.parameters(), without.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 50])
def test_encode_runs_once_per_set_for_any_number_of_steps(steps, demo):
    model, tasks, pieces = demo_tagger(demo, "adapter"), demo_tasks(demo, 3), []

    def count_pieces(module, args, kwargs):
        pieces.append(kwargs["input_ids"].count_nonzero())  # padding is 0

    model.encoder.register_forward_pre_hook(count_pieces, with_kwargs=True)
    meta_step(model, tasks, adapters.tag_loss, lr=1e-4, inner_steps=steps, encode=model.encode_sets)
    assert pieces == [sum(len(s.input_ids) for sentences in part for s in sentences) for part in zip(*tasks)]


@pytest.mark.parametrize("training", [False, True])
def test_a_meta_step_updates_the_three_sets_and_nothing_else(training):
    """No constant, buffer, flag, mode or other gradient changes, and in eval mode no random state."""
    model = SmallModel().train(training)
    model.constant.requires_grad_(not training)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.h.weight.grad = torch.ones_like(model.h.weight)
    random_state = torch.get_rng_state()
    before = meta_step(model, make_tasks(2))
    assert moved(model.state_dict(), before) == before.keys() - {"constant", "shift"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"constant", "h.bias"}
    assert torch.equal(model.h.weight.grad, torch.ones_like(model.h.weight))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state) != training  # dropout draws in train mode only
    assert all(p.is_leaf for p in model.parameters())


def test_five_meta_steps_equal_a_hand_written_adamw():
    """Algorithm 2 of Loshchilov and Hutter 2019, with weight decay 0.01 and a linearly falling rate."""
    batches = [make_tasks(3, seed, regression=True) for seed in range(5)]
    model, lr, decay, b1, b2, eps = LinearModel(), 0.05, 0.01, 0.9, 0.999, 1e-8
    theta = [p.detach().clone() for p in model.parameters()]
    m, v = [0.0, 0.0], [0.0, 0.0]
    meta_training = priming(model, batches, squared_loss, lr=lr, steps=5, inner_lr=0.1, inner_steps=2)
    for t, tasks in enumerate(batches):
        grads, theta_1_h = closed_form_meta_gradient(theta, tasks, 2, False, 0.1)
        rate = lr * (1 - t / 5)
        for k in (0, 1):
            m[k] = b1 * m[k] + (1 - b1) * grads[k]
            v[k] = b2 * v[k] + (1 - b2) * grads[k] ** 2
            step = (m[k] / (1 - b1 ** (t + 1))) / ((v[k] / (1 - b2 ** (t + 1))).sqrt() + eps)
            theta[k] = theta[k] - rate * decay * theta[k] - rate * step
        theta[2] = theta_1_h
        next(meta_training)
        for p, expected in zip(model.parameters(), theta):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)
        assert model.f.weight.grad.allclose(grads[0], rtol=0, atol=1e-10)
    with pytest.raises(StopIteration) as end:
        next(meta_training)
    assert end.value.value == ({"f.weight": model.f.weight}, {"g.weight": model.g.weight})  # line 11


@pytest.mark.parametrize("variant", ["encode", "no encode", "maml"])
def test_under_autocast_each_step_uses_the_updated_parameters(variant):
    """Autocast caches casts of parameters until it ends. Three meta steps in one autocast equal three
    meta steps in one autocast each."""
    batches = [[tuple((x.float(), y) for x, y in task) for task in make_tasks(2, seed)] for seed in range(3)]
    models, runs = [SmallModel().float() for _ in range(3)], []
    for model in models:
        encode = model.encode_sets if variant == "encode" else None
        runs.append(priming(model, batches, lr=0.5, maml=variant == "maml", encode=encode))
    in_one, in_each, in_float32 = runs
    with torch.autocast("cpu", torch.bfloat16):
        losses = list(in_one)
    for expected in losses:
        with torch.autocast("cpu", torch.bfloat16):
            assert next(in_each) == expected
    assert equal(models[0].state_dict(), models[1].state_dict()) and list(in_float32) != losses


def test_under_autocast_encode_keeps_the_gradient_of_theta_p():
    """Support sets are encoded without gradients. Older versions of torch use the casts that autocast
    caches there for the query sets too, which cuts off θp."""
    tasks, grads = [tuple((x.float(), y) for x, y in task) for task in make_tasks(2)], []
    for enabled in (False, True):
        model = SmallModel().float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            meta_step(model, tasks, encode=model.encode_sets)
        theta_p, theta_a, _ = model.split_parameters()
        assert all(p.grad is not None for p in [*theta_p.values(), *theta_a.values()])
        grads.append([parameters_to_vector([p.grad for p in part.values()]) for part in (theta_p, theta_a)])
    for in_float32, in_bf16 in zip(*grads):
        assert 0 < (in_bf16 - in_float32).norm() < 0.05 * in_float32.norm()


# sizes of θa for mBERT: 12 layers of width 768, feed-forward layers of width 3072
IN_THETA_A = {
    "adapter": 2 * 64 * 768 + 64 + 768, "bitfit": 768 + 12 * (7 * 768 + 3072), "lora": 12 * 2 * 2 * 8 * 768}


@pytest.mark.parametrize("pe", PE)
def test_parameter_counts_of_mbert(pe):
    """mBERT has 177,853,440 parameters, of which 590,592 are the pooler's."""
    import transformers

    with torch.device("meta"):
        encoder = transformers.BertModel(transformers.BertConfig(vocab_size=119_547))
        sets = adapters.Tagger(encoder, 7, pe).split_parameters()
    counts = [sum(p.numel() for p in part.values()) for part in sets]
    pretrained = 177_853_440 - 590_592 - (IN_THETA_A[pe] if pe == "bitfit" else 0)
    assert counts == [pretrained, IN_THETA_A[pe], 768 * 7 + 7]


def test_adapter_and_head_are_initialised_as_in_the_paper(demo):
    torch.manual_seed(0)
    model = adapters.Tagger(demo[0], 7)
    x = torch.randn(1000, demo[0].config.hidden_size)
    assert (model.adapter(x) - x).norm() / x.norm() < 0.01  # near the identity
    for layer in (model.adapter.down, model.adapter.up):
        assert 0.5e-2 < layer.weight.std() < 1e-2 and layer.weight.abs().max() <= 2e-2
        assert not layer.bias.any()
    assert abs(model.head.weight.std() - 0.02) < 0.005 and not model.head.bias.any()


@pytest.mark.parametrize("pe", PE)
@PRIMING_AND_MAML
def test_first_order_gradient_of_a_transformer_equals_copies_with_sgd(maml, pe, demo):
    model, tasks = demo_tagger(demo, pe), demo_tasks(demo)
    expected = copying_meta_gradient(model, model.split_parameters(), padded_loss, tasks, 5, 0.03, maml)
    encode = model.encode_sets if pe == "adapter" else None
    meta_step(model, tasks, adapters.tag_loss, lr=1e-4, maml=maml, encode=encode)
    assert_equals_oracle(model, expected, 1e-9)


@pytest.mark.parametrize("variant", ["encode", "no encode", "maml", "subset"])
@pytest.mark.parametrize("steps", [0, 3])
def test_second_order_is_exact_and_first_order_is_not(steps, variant):
    """Compared with finite differences in every element of θp and θa, in float64. Without inner steps
    first order is exact too."""
    tasks, model = make_tasks(2), SmallModel()
    sets = split_by_bias(model) if variant == "subset" else model.split_parameters()
    theta_p, theta_a, theta_h = sets
    inner_params = {**theta_a, **theta_h, **(theta_p if variant == "maml" else {})}
    before, exact = copy.deepcopy(model.state_dict()), []
    for part in ([*theta_p.values()], [*theta_a.values()]):
        units = torch.eye(sum(p.numel() for p in part), dtype=torch.float64)
        grads = [finite_difference(model, part, unit, inner_params, small_loss, tasks, 0.5, steps)
                 for unit in units]
        exact.append((part, torch.tensor(grads, dtype=torch.float64)))
    encode = model.encode_sets if variant == "encode" else None
    settings = {"inner_steps": steps, "maml": variant == "maml", "encode": encode}
    for second_order in (True, False):
        model.load_state_dict(before)
        meta_step(model, tasks, sets=sets, inner_lr=0.5, second_order=second_order, **settings)
        for part, expected in exact:
            error = (parameters_to_vector([p.grad for p in part]) - expected).norm() / expected.norm()
            assert error < 1e-6 if second_order or steps == 0 else error > 1e-2


@pytest.mark.parametrize("pe", PE)
@PRIMING_AND_MAML
def test_second_order_gradient_of_a_transformer_equals_finite_differences(maml, pe, demo):
    """Along a random direction in θp and another in θa."""
    model, tasks = demo_tagger(demo, pe, "eager"), demo_tasks(demo)
    theta_p, theta_a, theta_h = model.split_parameters()
    inner_params = {**theta_a, **theta_h, **(theta_p if maml else {})}
    exact, rng = [], torch.Generator().manual_seed(0)
    for part in ([*theta_p.values()], [*theta_a.values()]):
        direction = torch.randn(sum(p.numel() for p in part), generator=rng, dtype=torch.float64)
        derivative = finite_difference(model, part, direction, inner_params, padded_loss, tasks, 0.01, 5)
        exact.append((part, direction, derivative))
    encode = model.encode_sets if pe == "adapter" else None
    settings = {"maml": maml, "encode": encode, "second_order": True}
    meta_step(model, tasks, adapters.tag_loss, lr=1e-4, inner_lr=0.01, **settings)
    for part, direction, expected in exact:
        actual = parameters_to_vector([p.grad for p in part]) @ direction
        assert abs(actual - expected) < 1e-6 * abs(expected)


def test_fused_attention_is_refused_with_second_order(demo):
    model = demo_tagger(demo, "bitfit", "sdpa")
    meta_training = priming(model, [demo_tasks(demo)], adapters.tag_loss, second_order=True)
    assert_refused(meta_training, model, "scaled_dot_product", RuntimeError)


@pytest.mark.parametrize("tune", ["full", "head", *PE])
def test_fine_tuning_leaves_the_rest_bit_identical(tune, tmp_path):
    """Dropout is on in full fine-tuning only, because whatever is frozen must be a fixed function, and
    always off in scoring. The model of the command is seen through a hook on all modules."""
    taggers, modes = {}, set()

    def observe(module, args):
        modes.add((torch.is_grad_enabled(), module.training))
        if isinstance(module, adapters.Tagger) and torch.is_grad_enabled():
            taggers.setdefault(module, copy.deepcopy(module.state_dict()))

    flags = ["--tune", tune] if tune in ("full", "head") else ["--tune", "adapter", "--pe", tune]
    flags += ["--lr", 1e-2, "--seeds", 0, 1, "--results", tmp_path]
    with nn.modules.module.register_module_forward_pre_hook(observe):
        command("finetune.py", *HINDI, *SMALL_TUNING, *FROM_PRETRAINED, *flags)
    encoder = {f"encoder.{name}": p for name, p in tensors("demo/encoder").items()}
    used = {name for name in encoder if ".pooler." not in name}
    tuned = {"head.weight", "head.bias"} | {
        "full": used, "head": set(), "bitfit": {name for name in used if name.endswith("bias")},
        "lora": {name for model in taggers for name in model.state_dict() if ".lora_" in name},
        "adapter": {f"adapter.{layer}.{p}" for layer in ("down", "up") for p in ("weight", "bias")},
    }[tune]
    no_effect = {name for name in tuned if name.endswith("key.bias")}  # attention does not depend on it
    assert ((True, True) in modes, (False, True) in modes, len(taggers)) == (tune == "full", False, 2)
    for model, before in taggers.items():
        assert equal(encoder, {re.sub("base_(model.model|layer).", "", n): p for n, p in before.items()})
        assert tuned - no_effect <= moved(model.state_dict(), before) <= tuned


@pytest.mark.parametrize("variant", ["priming", "maml", "one set"])
def test_without_inner_steps_the_gradient_is_that_of_fine_tuning(variant):
    """On the query sets. FT priming passes θh as a part of θp, and AdamW updates it too."""
    tasks, model, plain = make_tasks(2), SmallModel(), SmallModel()
    theta_p, theta_a, theta_h = sets = model.split_parameters()
    if variant == "one set":
        sets = {**theta_p, **theta_a, **theta_h}, {}, {}
    meta_step(model, tasks, sets=sets, inner_steps=0, maml=variant == "maml")
    for _, query in tasks:
        small_loss(plain, query).backward()
    named = dict(plain.named_parameters())
    for name, p in {**sets[0], **sets[1]}.items():
        torch.testing.assert_close(p.grad, named[name].grad, rtol=0, atol=1e-14)
    assert equal(model.state_dict(), plain.state_dict(), "h.") == (variant != "one set")


@pytest.mark.parametrize("tune", ["adapter", "head", "full"])
def test_fine_tune_equals_algorithm_1_without_inner_steps(tune, demo):
    """Bit for bit, on the batches that fine_tune passes to the model."""
    batches, models = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = adapters.build_tagger(
            copy.deepcopy(demo[0]).float(), types=["PER", "ORG", "LOC"], bottleneck=8, device="cpu",
            pe="adapter" if tune == "adapter" else None, bf16=False)
        sets = model.split_parameters()
        for p in sets.p.values():
            p.requires_grad_(tune == "full")
        models.append((model, {**sets.a, **sets.h, **(sets.p if tune == "full" else {})}))
    (model, tuned), (reference, theta) = models
    before = copy.deepcopy(model.state_dict())
    model.register_forward_pre_hook(lambda module, args: batches.append([([], args[0])]))
    finetune.fine_tune(model, tuned, demo[2][:20], epochs=2, min_steps=0, batch_size=8, lr=1e-3, seed=0,
                       dropout=False)
    optimizer, scheduler = prime.adamw_with_linear_decay(theta.values(), 1e-3, len(batches))
    list(prime.prime(
        reference, theta_p=theta, theta_a={}, theta_h={}, inner_steps=0, batches=batches,
        loss=adapters.tag_loss, optimizer=optimizer, scheduler=scheduler))
    assert [len(query) for ((_, query),) in batches] == 2 * [8, 8, 4]
    assert equal(model.state_dict(), reference.state_dict()) and moved(model.state_dict(), before)


def test_prime_imports_torch_alone(tmp_path):
    """A copy of prime.py runs a meta step in a process that can import no other package."""
    shutil.copy(prime.__file__, tmp_path)
    program = """
import sys
blocked = "adapters finetune transformers datasets tokenizers safetensors seqeval pandas numpy tqdm peft"
sys.modules.update(dict.fromkeys(blocked.split()))
import torch
import prime

model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(3)])
before = {name: p.detach().clone() for name, p in model.named_parameters()}
sets = [{n: p for n, p in model.named_parameters() if n.startswith(layer)} for layer in "012"]
optimizer, scheduler = prime.adamw_with_linear_decay([*sets[0].values(), *sets[1].values()], 1e-2, 1)
list(prime.prime(
    model, theta_p=sets[0], theta_a=sets[1], theta_h=sets[2],
    batches=[[(torch.ones(2, 3), torch.zeros(2, 3))]], loss=lambda model, x: (model(x) - 1).square().mean(),
    optimizer=optimizer, scheduler=scheduler))
print(prime.__file__, [all((p != before[n]).any() for n, p in part.items()) for part in sets])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'prime.py'} [True, True, True]\n", done.stderr
