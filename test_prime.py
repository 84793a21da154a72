"""The claims of the paper, in its order, each with the test that fails where the code breaks it.

| claim | test |
|---|---|
| this table is complete, and in the order of the tests | test_the_table_of_claims_is_complete |
| §3.1: θa may be a small subset of θp, or empty | test_theta_a_may_be_a_subset_of_the_pretrained_parameters |
| §3.1: what the loss does not reach stays put | test_a_part_of_theta_without_gradient_stays_put |
| §3.1: θp, θa, θh are disjoint and cover the model | test_sets_are_disjoint_and_cover_the_model |
| Require: θ, tasks, L, and β's optimizer | test_wrong_use_is_refused_before_anything_moves |
| Require: rates and steps | test_settings_that_cannot_train_are_refused |
| line 1: "while" is the caller's | test_a_call_does_nothing_a_turn_is_a_meta_step_and_break_ends_it |
| line 2: languages in turn; FT priming draws the same | test_support_and_query_are_disjoint |
| lines 4 to 6: θi = θ; θp stays | test_inner_loop_starts_from_theta_and_moves_theta_p_in_maml_alone |
| line 6: all at one θi; line 9: the sum | test_first_order_meta_gradient_equals_the_closed_form |
| lines 5 to 7: their memory does not grow with S | test_inner_steps_keep_nothing_for_the_meta_gradient |
| lines 5 to 7: f(x; θp) is a loop invariant | test_hoisting_changes_no_gradient |
| lines 5 to 7: and hoisted | test_encoding_happens_once_a_set_whatever_the_number_of_inner_steps |
| line 9: θp and θa move | test_meta_step_moves_theta_p_and_theta_a_and_nothing_else |
| line 9: "− β ∇"; line 11: return θp, θa | test_five_meta_steps_equal_a_hand_written_adamw |
| line 9: θh = θ1_h; the sum knows no order | test_theta_h_becomes_the_first_tasks_head |
| line 9: the next step is one of the new θ | test_under_autocast_each_step_uses_the_new_weights |
| §4: the sets have the paper's sizes on mBERT | test_counts_of_parameters_are_right_for_mbert |
| §4: near the identity; BERT's head | test_adapter_and_head_start_as_the_papers_do |
| §4: a transformer, θa on top or inside | test_meta_gradient_of_a_transformer_equals_copies_with_sgd |
| §4.2: first order approximates | test_second_order_is_exact_and_first_order_only_without_inner_steps |
| §4.2: a transformer | test_second_order_gradient_of_a_transformer_equals_finite_differences |
| §4.2: it needs second derivatives | test_a_kernel_without_a_second_derivative_is_refused |
| §4.2: second derivatives are taken at θi | test_checkpointing_that_would_recompute_at_theta_is_refused |
| §4.3: who moves; dropout in full fine-tuning alone | test_fine_tuning_leaves_the_rest_bit_identical |
| §5.2: S = 0 is fine-tuning | test_without_inner_steps_the_gradient_is_that_of_fine_tuning |
| vendoring: prime.py needs torch alone | test_prime_imports_torch_alone |

§5.1, the MAML loop, is `maml` in most tests. `tests/` hold what is promised beside the paper.
"""

import copy
import re
import shutil
import subprocess
import sys
import weakref
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import adapters
import finetune
import prime

PE = ["adapter", "bitfit"]
PRIMING_AND_MAML = pytest.mark.parametrize("maml", [False, True], ids=["priming", "maml"])


class Small(nn.Module):
    """h(g(f(x))) with a buffer and a constant; keeps the parameters of every call."""

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

    def sets(self):
        named = dict(self.named_parameters())
        return [{n: p for n, p in named.items() if n.startswith(part)} for part in ("f.", "g.", "h.")]


def split_by_bias(model):
    """θa as "a small subset of θp" (§3.1): the encoder's biases."""
    theta_p, theta_a, theta_h = model.sets()
    body = {**theta_p, **theta_a}
    biases = {n: p for n, p in body.items() if n.endswith("bias")}
    return {n: p for n, p in body.items() if n not in biases}, biases, theta_h


def small_loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def make_tasks(count, seed=1, regression=False):
    """Six points a set, of three classes or with two targets each."""
    chance = torch.Generator().manual_seed(seed)

    def part():
        x, targets = torch.randn(6, 6, generator=chance, dtype=torch.float64).split([4, 2], 1)
        return x, targets if regression else torch.randint(3, (6,), generator=chance)

    return [(part(), part()) for _ in range(count)]


class Linear(nn.Sequential):
    """h(g(f(x))), three matrices, whose gradients can be written down: see `closed_form`."""

    def __init__(self):
        torch.manual_seed(0)
        shapes = {"f": (4, 5), "g": (5, 3), "h": (3, 2)}
        super().__init__(OrderedDict((n, nn.Linear(*shape, bias=False)) for n, shape in shapes.items()))
        self.double()

    sets = Small.sets


def squared_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().sum() / (2 * len(x))


def steps_of(model, batches, loss=small_loss, sets=None, lr=1e-2, steps=10, **settings):
    """Algorithm 1 with the paper's optimizer, not begun."""
    theta_p, theta_a, theta_h = sets or model.sets()
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, lr, steps)
    return prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=loss,
        optimizer=optimizer, scheduler=scheduler, **settings,
    )


def meta_step(model, tasks, *more, **settings):
    """One meta step; gives θ before it."""
    before = copy.deepcopy(model.state_dict())
    list(steps_of(model, [tasks], *more, **settings))
    return before


def moved(after, before):
    return {name for name in after if not torch.equal(after[name], before[name])}


def same(a, b, prefix=""):
    return not any(name.startswith(prefix) for name in moved(a, b))


def assert_refused(steps, model, told, kind=ValueError):
    """The first turn raises, and nothing in the model has moved."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=told):
        next(steps)
    assert same(model.state_dict(), before)


def closed_form(theta, batch):
    """The gradients of `squared_loss`, by hand."""
    (x, y), (f, g, h) = batch, theta
    error = (x @ f.T @ g.T @ h.T - y) / len(x)
    return (error @ h @ g).T @ x, (error @ h).T @ x @ f.T, error.T @ x @ f.T @ g.T


def closed_form_meta_gradient(theta, tasks, steps, maml, lr):
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


def adapted_copy(model, moving, loss, support, lr, steps):
    """θi: a deep copy of the model, moved by torch.optim.SGD."""
    copied = copy.deepcopy(model)
    named = dict(copied.named_parameters())
    optimizer = torch.optim.SGD([named[name] for name in moving], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(copied, support).backward()
        optimizer.step()
    copied.zero_grad()
    return copied


def copying_meta_gradient(model, sets, loss, tasks, steps, lr, maml):
    """First-order meta-gradient by name, θ1_h by name, and the query losses, by `adapted_copy`."""
    theta_p, theta_a, theta_h = sets
    moving = [*theta_a, *theta_h, *(theta_p if maml else ())]
    gradient, heads, losses = dict.fromkeys([*theta_p, *theta_a], 0.0), [], []
    for support, query in tasks:
        copied = adapted_copy(model, moving, loss, support, lr, steps)
        query_loss = loss(copied, query)
        query_loss.backward()
        named = dict(copied.named_parameters())
        gradient = {name: total + named[name].grad for name, total in gradient.items()}
        heads.append({name: named[name].detach() for name in theta_h})
        losses.append(query_loss.item())
    return gradient, heads[0], losses


def assert_equals_oracle(model, expected, tolerance):
    gradient, theta_1_h, _ = expected
    named = dict(model.named_parameters())
    for name, right in {**gradient, **theta_1_h}.items():
        found = named[name].grad if name in gradient else named[name].detach()
        torch.testing.assert_close(found, right, rtol=0, atol=tolerance)


def slope(model, parameters, direction, moving, loss, tasks, lr, steps, epsilon=1e-5):
    """Of Σ over tasks of the query loss at θi, along a direction in `parameters`, by central differences."""
    start, values = parameters_to_vector(parameters).detach(), []
    for size in (epsilon, -epsilon):
        vector_to_parameters(start + size * direction, parameters)
        adapted = [adapted_copy(model, moving, loss, support, lr, steps) for support, _ in tasks]
        values.append(sum(loss(theta_i, query).item() for theta_i, (_, query) in zip(adapted, tasks)))
    vector_to_parameters(start, parameters)
    return (values[0] - values[1]) / (2 * epsilon)


def demo_tagger(demo, pe, attention="sdpa"):
    """θa has left its starting point: LoRA's starts at zero, where much of it is flat."""
    torch.manual_seed(0)
    model = adapters.Tagger(copy.deepcopy(demo[0]), 7, pe, 8).double().eval()
    with torch.no_grad():
        for parameter in model.sets()[1].values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.encoder.set_attn_implementation(attention)
    model.choose_packing(demo[2])
    assert model.first_position == 0  # packed, as in the command
    return model


def demo_tasks(demo, count=2):
    args = Namespace(seed=0, steps=1, tasks=count, support=5, query=6, method="meta")
    return next(prime.sample_batches([demo[2]], args))


def padded_loss(model, sentences):
    """Cross-entropy as token classification does it: one padded batch, −100 for all but first pieces."""

    def padded(rows, value):
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    tags = [dict(zip(s.first, s.tags, strict=True)) for s in sentences]
    ids = padded([s.pieces for s in sentences], 0)
    mask = padded([[1] * len(s.pieces) for s in sentences], 0)
    labels = padded([[of.get(i, -100) for i in range(len(s.pieces))] for of, s in zip(tags, sentences)], -100)
    hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return nn.functional.cross_entropy(model.head(model.adapter(hidden)).flatten(0, 1), labels.flatten())


def test_the_table_of_claims_is_complete():
    tests = [name for name in globals() if name.startswith("test_")]  # in the order of the file
    assert re.findall(r"^\|.*\| (test_\w+) \|$", __doc__, re.MULTILINE) == tests


@PRIMING_AND_MAML
@pytest.mark.parametrize("kind", ["subset", "empty"])
def test_theta_a_may_be_a_subset_of_the_pretrained_parameters(kind, maml):
    """The empty one is head tuning as the PE method."""
    tasks, model = make_tasks(3), Small()
    theta_p, theta_a, theta_h = sets = split_by_bias(model)
    if kind == "empty":
        sets = {**theta_p, **theta_a}, {}, theta_h
    expected = copying_meta_gradient(model, sets, small_loss, tasks, 5, 0.1, maml)
    before = meta_step(model, tasks, sets=sets, inner_lr=0.1, maml=maml)
    assert_equals_oracle(model, expected, 1e-10)
    assert moved(model.state_dict(), before) == {*theta_p, *theta_a, *theta_h}


@pytest.mark.parametrize("second_order", [False, True])
def test_a_part_of_theta_without_gradient_stays_put(second_order):
    """One in each set that nothing uses; the rest moves as it does without."""
    tasks, model, without = make_tasks(2), Small(), Small()
    for part in (model.f, model.g, model.h):
        part.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = meta_step(model, tasks, second_order=second_order)
    meta_step(without, tasks, second_order=second_order)
    after = model.state_dict()
    assert all(torch.equal(after[f"{part}.unused"], before[f"{part}.unused"]) for part in "fgh")
    assert same(without.state_dict(), after)


@pytest.mark.parametrize("pe", [None, *PE])
def test_sets_are_disjoint_and_cover_the_model(pe, demo):
    model = demo_tagger(demo, pe)
    sets = [set(part) for part in model.sets()]
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in name}
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert set().union(*sets) | pooler == {name for name, _ in model.named_parameters()}
    assert pooler and not pooler & set().union(*sets)
    assert sets[2] == {"head.weight", "head.bias"} and bool(sets[1]) == bool(pe)
    assert all(p.requires_grad for p in model.parameters())


def without_adapter(model, batch):
    return nn.functional.cross_entropy(model.h(model.features(batch[0])), batch[1])


def without_head(model, batch):
    return nn.functional.cross_entropy(model.g(model.features(batch[0])), batch[1])


def logits(model, batch):
    return model(batch[0])


def detached(model):
    return torch.no_grad()(model.encode_sets)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "message, break_it",
    [
        ("^f.weight in theta_p is not a par", lambda args: setattr(args, "model", copy.deepcopy(args.model))),
        ("^f.weight in theta_p is not a par", lambda args: setattr(args, "model", nn.Sequential(args.model))),
        ("^theta_a must be a dict .* list", lambda args: setattr(args, "theta_a", [*args.theta_a])),
        ("^f.weight is in two sets", lambda args: args.theta_a.update(args.theta_p)),
        ("^f.weight is in two sets", lambda args: args.theta_h.update(args.theta_p)),
        ("^g.weight is in two sets", lambda args: args.theta_h.update(args.theta_a)),
        ("^f.weight in theta_p is frozen", lambda args: args.model.f.weight.requires_grad_(False)),
        ("^h.bias in theta_h is frozen", lambda args: args.model.h.bias.requires_grad_(False)),
        ("^theta_p is empty", lambda args: args.theta_p.clear()),
        ("^theta_a and theta_h are empty", lambda args: (args.theta_a.clear(), args.theta_h.clear())),
        ("^f.bias: the optimizer must hold .* 0 times", lambda args: args.optimized.pop(1)),
        ("^g.weight: the optimizer must hold .* 0 times", lambda args: args.optimized.pop(2)),
        ("^f.weight: the optimizer .* 2 times", lambda args: args.optimized.append(args.optimized[0])),
        ("^h.weight: the optimizer must not", lambda args: args.optimized.append(args.model.h.weight)),
        ("optimizer holds constant,", lambda args: args.optimized.append(args.model.constant)),
        ("optimizer holds a parameter,", lambda args: args.optimized.append(nn.Parameter(torch.ones(1)))),
        ("list of .* pairs", lambda args: args.tasks.clear()),
        ("list of .* pairs", lambda args: args.tasks.append((1, 2, 3))),
        ("list of .* pairs", lambda args: args.tasks.append({"input_ids": 1, "labels": 2})),
        ("list of .* pairs", lambda args: args.tasks.append(torch.ones(2, 2))),
        ("must not be a generator", lambda args: args.tasks.append((iter([1]), 2))),
        ("must return a scalar tensor, not float", lambda args: setattr(args, "loss", lambda *_: 1.0)),
        ("must return a scalar tensor, not NoneType", lambda args: setattr(args, "loss", lambda *_: None)),
        ("scalar tensor, not Tensor of shape .6, 3.$", lambda args: setattr(args, "loss", logits)),
        ("depends on no parameter", lambda args: setattr(args, "loss", lambda *_: torch.tensor(1.0))),
        ("depends on no parameter", lambda args: setattr(args, "loss", torch.no_grad()(small_loss))),
        ("does not depend on theta_h", lambda args: setattr(args, "loss", without_head)),
        ("inner_steps must be", lambda args: args.settings.update(inner_steps=-1)),
        ("inner_steps must be", lambda args: args.settings.update(inner_steps=2.0)),
        ("inner_lr must be", lambda args: args.settings.update(inner_lr=-0.1)),
        ("inner_lr must be", lambda args: args.settings.update(inner_lr=float("nan"))),
        ("encode must return one set", lambda args: args.settings.update(encode=lambda sets: sets[1:])),
        ("encode must return one set", lambda args: args.settings.update(encode=lambda sets: 2 * sets)),
        ("does encode detach", lambda args: args.settings.update(encode=detached(args.model))),
    ],
)
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_wrong_use_is_refused_before_anything_moves(inner_steps, message, break_it):
    args = Namespace(model=Small(), tasks=make_tasks(2), loss=small_loss)
    args.settings = {"inner_steps": inner_steps}
    args.theta_p, args.theta_a, args.theta_h = args.model.sets()
    args.optimized = [*args.theta_p.values(), *args.theta_a.values()]
    break_it(args)
    steps = prime.prime(
        args.model, theta_p=args.theta_p, theta_a=args.theta_a, theta_h=args.theta_h, batches=[args.tasks],
        loss=args.loss, optimizer=torch.optim.AdamW(args.optimized), **args.settings,
    )
    assert_refused(steps, args.model, message)


def test_settings_that_cannot_train_are_refused():
    """A scheduler that wants a metric, no gradients, a wrapped model, a rate that would never fall."""
    model, tasks = Small(), make_tasks(1)
    theta_p, theta_a, theta_h = model.sets()
    optimizer = torch.optim.AdamW([*theta_p.values(), *theta_a.values()])
    settings = dict(theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=[tasks], loss=small_loss)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    steps = prime.prime(model, optimizer=optimizer, scheduler=scheduler, **settings)
    assert_refused(steps, model, "ReduceLROnPlateau")
    with torch.no_grad():
        assert_refused(prime.prime(model, optimizer=optimizer, **settings), model, "gradients are disabled")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        prime.adamw_with_linear_decay(theta_p.values(), 1e-3, 0)


def test_a_call_does_nothing_a_turn_is_a_meta_step_and_break_ends_it():
    model, alone, drawn = Small(), Small(), []
    batches = [make_tasks(3, seed) for seed in range(4)]
    expected = copying_meta_gradient(model, model.sets(), small_loss, batches[0], 5, 0.03, False)
    before, calls = meta_step(alone, batches[0]), len(model.calls)
    steps = steps_of(model, (drawn.append(tasks) or tasks for tasks in batches))
    assert not drawn and len(model.calls) == calls and same(model.state_dict(), before)
    for losses in steps:
        assert losses == pytest.approx(expected[2], rel=0, abs=1e-12)  # of each task, at its θi
        assert same(model.state_dict(), alone.state_dict())
        break
    assert len(drawn) == 1 and same(model.state_dict(), alone.state_dict())


def test_support_and_query_are_disjoint():
    """FT priming takes the same sentences as the query set."""
    corpora = [[("en", i) for i in range(40)], [("es", i) for i in range(40)]]
    args = Namespace(seed=0, steps=20, tasks=3, support=19, query=21, method="meta")
    batches = list(prime.sample_batches(corpora, args))
    tasks = sum(batches, [])
    assert [len(batch) for batch in batches] == [3] * 20
    for number, (support, query) in enumerate(tasks):
        assert (len(support), len(query), len({*support, *query})) == (19, 21, 40)
        assert {language for language, _ in support + query} == {("en", "es")[number % 2]}
    assert len({tuple(support) for support, _ in tasks}) == 60  # each is drawn anew
    args.method = "ft"
    assert sum(prime.sample_batches(corpora, args), []) == [([], [*s, *q]) for s, q in tasks]


@PRIMING_AND_MAML
def test_inner_loop_starts_from_theta_and_moves_theta_p_in_maml_alone(maml):
    """To the bit: θi = θ at first; θp stays but for the red line; the model stays until line 9."""
    model, own = Small(), []
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())

    def watching_loss(model, batch):
        own.append({**before, **{name: p.detach().clone() for name, p in parameters.items()}})
        return small_loss(model, batch)

    meta_step(model, make_tasks(3), watching_loss, inner_steps=5, inner_lr=0.5, maml=maml)
    assert len(own) == len(model.calls) == 3 * (5 + 1)
    assert all(same(theta, before) for theta in [*own, *model.calls[0::6]])
    assert maml or all(same(theta_i, before, "f.") for theta_i in model.calls)
    for theta_i in model.calls[5::6]:
        assert [same(theta_i, before, part) for part in ("f.", "g.", "h.")] == [not maml, False, False]


@PRIMING_AND_MAML
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_first_order_meta_gradient_equals_the_closed_form(steps, count, maml):
    model, tasks = Linear(), make_tasks(count, regression=True)
    theta = [p.detach().clone() for p in model.parameters()]
    (f, g, _), theta_1_h = closed_form_meta_gradient(theta, tasks, steps, maml, lr=0.1)
    meta_step(model, tasks, squared_loss, inner_lr=0.1, inner_steps=steps, maml=maml)
    torch.testing.assert_close(model.f.weight.grad, f, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.g.weight.grad, g, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.h.weight.detach(), theta_1_h, rtol=0, atol=1e-10)


def test_inner_steps_keep_nothing_for_the_meta_gradient():
    """First order: what autograd keeps until the backward pass of line 9 does not grow with S."""
    most = []
    for steps in (1, 50):
        alive, counts = weakref.WeakValueDictionary(), []

        def keep(tensor, alive=alive, counts=counts):
            kept = alive[len(counts)] = Namespace(tensor=tensor.detach())  # or an output would keep itself
            counts.append(len(alive))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            meta_step(Small(), make_tasks(2), inner_steps=steps)
        most.append(max(counts))
    assert most[0] == most[1] > 0


@PRIMING_AND_MAML
def test_hoisting_changes_no_gradient(maml):
    """Where the inner loop moves θp, f(x; θp) is not invariant, and `hoist` is not used."""
    tasks, hoisted, textbook = make_tasks(2), Small(), Small()
    meta_step(hoisted, tasks, encode=hoisted.encode_sets, maml=maml)
    meta_step(textbook, tasks, maml=maml)
    for p, q in zip(hoisted.parameters(), textbook.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 50])
def test_encoding_happens_once_a_set_whatever_the_number_of_inner_steps(steps, demo):
    model, tasks, pieces = demo_tagger(demo, "adapter"), demo_tasks(demo, 3), []
    model.encoder.register_forward_hook(lambda _, inputs, __: pieces.append(inputs[0].count_nonzero()))
    meta_step(model, tasks, prime.tag_loss, lr=1e-4, inner_steps=steps, encode=model.encode_sets)
    assert pieces == [sum(len(s.pieces) for task in tasks for s in task[k]) for k in (1, 0)]


@pytest.mark.parametrize("training", [False, True])
def test_meta_step_moves_theta_p_and_theta_a_and_nothing_else(training):
    """But for θh, by the inner loop: no constant, buffer, flag, mode, gradient of others or random state."""
    model = Small().train(training)
    model.constant.requires_grad_(not training)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.h.weight.grad = torch.ones_like(model.h.weight)
    chance = torch.get_rng_state()
    before = meta_step(model, make_tasks(2))
    assert moved(model.state_dict(), before) == before.keys() - {"constant", "shift"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"constant", "h.bias"}
    assert torch.equal(model.h.weight.grad, torch.ones_like(model.h.weight))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), chance) != training  # dropout draws in train mode only
    assert all(p.is_leaf for p in model.parameters())


def test_five_meta_steps_equal_a_hand_written_adamw():
    """Loshchilov and Hutter 2019, Alg. 2, with weight decay and the linear schedule."""
    batches = [make_tasks(3, seed, regression=True) for seed in range(5)]
    model, lr, decay, b1, b2, eps = Linear(), 0.05, 0.01, 0.9, 0.999, 1e-8
    theta = [p.detach().clone() for p in model.parameters()]
    m, v = [0.0, 0.0], [0.0, 0.0]
    steps = steps_of(model, batches, squared_loss, lr=lr, steps=5, inner_lr=0.1, inner_steps=2)
    for t, tasks in enumerate(batches):
        gradient, theta_1_h = closed_form_meta_gradient(theta, tasks, 2, False, 0.1)
        rate = lr * (1 - t / 5)
        for k in (0, 1):
            m[k] = b1 * m[k] + (1 - b1) * gradient[k]
            v[k] = b2 * v[k] + (1 - b2) * gradient[k] ** 2
            step = (m[k] / (1 - b1 ** (t + 1))) / ((v[k] / (1 - b2 ** (t + 1))).sqrt() + eps)
            theta[k] = theta[k] - rate * decay * theta[k] - rate * step
        theta[2] = theta_1_h
        next(steps)
        for p, expected in zip(model.parameters(), theta):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)
        assert model.f.weight.grad.allclose(gradient[0], rtol=0, atol=1e-10)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert [*end.value.value] == model.sets()[:2]  # line 11


def test_theta_h_becomes_the_first_tasks_head():
    """Whatever the other tasks are; and to all but θh their order does not matter."""
    tasks, runs = make_tasks(4), []
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (0,), (2, 1, 0, 3)):
        model = Small()
        meta_step(model, [tasks[i] for i in order])
        runs.append(model.state_dict())
        theta_1 = model.calls[5]  # what the first query pass was given, after five inner steps
        assert not {name for name in moved(theta_1, runs[-1]) if name.startswith("h.")}
    given, permuted, _, another_first = runs
    assert [same(run, given, "h.") for run in runs] == [True, True, True, False]
    for key in given.keys() - {"h.weight", "h.bias"}:
        for run in (permuted, another_first):
            torch.testing.assert_close(run[key], given[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["hoisted", "textbook", "maml"])
def test_under_autocast_each_step_uses_the_new_weights(form):
    """Autocast keeps the casts of leaves until its end: three steps in one equal three in one each."""
    batches = [[tuple((x.float(), y) for x, y in task) for task in make_tasks(2, seed)] for seed in range(3)]
    models, runs = [Small().float() for _ in range(3)], []
    for model in models:
        encode = model.encode_sets if form == "hoisted" else None
        runs.append(steps_of(model, batches, lr=0.5, maml=form == "maml", encode=encode))
    in_one, in_each, in_float32 = runs
    with torch.autocast("cpu", torch.bfloat16):
        losses = list(in_one)
    for right in losses:
        with torch.autocast("cpu", torch.bfloat16):
            assert next(in_each) == right
    assert same(models[0].state_dict(), models[1].state_dict()) and list(in_float32) != losses


# mBERT: 12 layers of 768, 3072 in the feed-forward; by hand
IN_THETA_A = {"adapter": 2 * 64 * 768 + 64 + 768, "bitfit": 768 + 12 * (7 * 768 + 3072)}


@pytest.mark.parametrize("pe", PE)
def test_counts_of_parameters_are_right_for_mbert(pe):
    """177,853,440 parameters are mBERT's, 590,592 of them the pooler's."""
    import transformers

    with torch.device("meta"):
        encoder = transformers.BertModel(transformers.BertConfig(vocab_size=119_547))
        sets = adapters.Tagger(encoder, 7, pe).sets()
    count = [sum(p.numel() for p in part.values()) for part in sets]
    pretrained = 177_853_440 - 590_592
    assert count == [pretrained - (IN_THETA_A[pe] if pe == "bitfit" else 0), IN_THETA_A[pe], 768 * 7 + 7]


def test_adapter_and_head_start_as_the_papers_do(demo):
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
def test_meta_gradient_of_a_transformer_equals_copies_with_sgd(maml, pe, demo):
    model, tasks = demo_tagger(demo, pe), demo_tasks(demo)
    expected = copying_meta_gradient(model, model.sets(), padded_loss, tasks, 5, 0.03, maml)
    encode = model.encode_sets if pe == "adapter" else None
    meta_step(model, tasks, prime.tag_loss, lr=1e-4, maml=maml, encode=encode)
    assert_equals_oracle(model, expected, 1e-9)


@pytest.mark.parametrize("form", ["hoisted", "textbook", "maml", "subset"])
@pytest.mark.parametrize("steps", [0, 3])
def test_second_order_is_exact_and_first_order_only_without_inner_steps(steps, form):
    """Every element of θp and of θa, in float64, at an inner rate at which first order is far from it."""
    tasks, model = make_tasks(2), Small()
    sets = theta_p, theta_a, theta_h = split_by_bias(model) if form == "subset" else model.sets()
    moving = {**theta_a, **theta_h, **(theta_p if form == "maml" else {})}
    before, exact = copy.deepcopy(model.state_dict()), []
    for part in ([*theta_p.values()], [*theta_a.values()]):
        units = torch.eye(sum(p.numel() for p in part), dtype=torch.float64)
        slopes = [slope(model, part, unit, moving, small_loss, tasks, 0.5, steps) for unit in units]
        exact.append((part, torch.tensor(slopes, dtype=torch.float64)))
    encode = model.encode_sets if form == "hoisted" else None
    settings = dict(inner_steps=steps, maml=form == "maml", encode=encode)
    for second_order in (True, False):
        model.load_state_dict(before)
        meta_step(model, tasks, sets=sets, inner_lr=0.5, second_order=second_order, **settings)
        for part, right in exact:
            error = (parameters_to_vector([p.grad for p in part]) - right).norm() / right.norm()
            assert error < 1e-6 if second_order or steps == 0 else error > 1e-2


@pytest.mark.parametrize("pe", PE)
@PRIMING_AND_MAML
def test_second_order_gradient_of_a_transformer_equals_finite_differences(maml, pe, demo):
    """Along a random direction in θp and one in θa."""
    model, tasks = demo_tagger(demo, pe, "eager"), demo_tasks(demo)
    theta_p, theta_a, theta_h = model.sets()
    moving = {**theta_a, **theta_h, **(theta_p if maml else {})}
    slopes, chance = [], torch.Generator().manual_seed(0)
    for part in ([*theta_p.values()], [*theta_a.values()]):
        direction = torch.randn(sum(p.numel() for p in part), generator=chance, dtype=torch.float64)
        slopes.append((part, direction, slope(model, part, direction, moving, padded_loss, tasks, 0.01, 5)))
    settings = dict(maml=maml, encode=model.encode_sets if pe == "adapter" else None, second_order=True)
    meta_step(model, tasks, prime.tag_loss, lr=1e-4, inner_lr=0.01, **settings)
    for part, direction, right in slopes:
        ours = parameters_to_vector([p.grad for p in part]) @ direction
        assert abs(ours - right) < 1e-6 * abs(right)


def test_a_kernel_without_a_second_derivative_is_refused(demo):
    model = demo_tagger(demo, "bitfit", "sdpa")
    steps = steps_of(model, [demo_tasks(demo)], prime.tag_loss, second_order=True)
    assert_refused(steps, model, "scaled_dot_product", RuntimeError)


def test_checkpointing_that_would_recompute_at_theta_is_refused(demo):
    """Second derivatives, and an encoded adapter or head, are computed after the substitution has ended."""
    by_transformers, by_torch = demo_tagger(demo, "bitfit", "eager"), Small()
    by_transformers.encoder.train()
    by_transformers.encoder.gradient_checkpointing_enable()
    by_torch.g = checkpoint_wrapper(by_torch.g)
    steps = steps_of(by_transformers, [demo_tasks(demo)], prime.tag_loss, second_order=True)
    assert_refused(steps, by_transformers, "^encoder.*: turn off activation checkpointing")
    steps = steps_of(by_torch, [make_tasks(2)], second_order=True)
    assert_refused(steps, by_torch, "^g: turn off activation checkpointing")
    steps = steps_of(by_torch, [make_tasks(2)], encode=by_torch.encode_sets)
    assert_refused(steps, by_torch, "^g is in the inner loop")


@pytest.mark.parametrize("moves", ["full", "head", *PE])
def test_fine_tuning_leaves_the_rest_bit_identical(moves, demo, monkeypatch):
    """Whatever is frozen is a fixed function: dropout is for plain fine-tuning alone."""
    encoder, sentences = copy.deepcopy(demo[0]).float().train(), demo[2][:40]
    fresh, modes, tag_loss = copy.deepcopy(encoder.state_dict()), set(), prime.tag_loss
    tune, pe = (moves, None) if moves in ("full", "head") else ("adapter", moves)
    args = Namespace(tune=tune, pe=pe, bottleneck=8, types=["PER", "ORG", "LOC"], bf16=False, device="cpu",
                     epochs=2, min_steps=0, batch_size=8, lr=1e-2)  # fmt: skip
    model, tuned = finetune.start(args, encoder, {}, 0, sentences)
    assert not any(module.training for module in model.modules())  # sentences are encoded now
    theta_p, theta_a, theta_h = model.sets()
    assert tuned.keys() == {*theta_a, *theta_h, *(theta_p if moves == "full" else ())}
    before = copy.deepcopy(model.state_dict())

    def watching_loss(model, batch):
        modes.update(module.training for module in model.modules())
        return tag_loss(model, batch)

    monkeypatch.setattr(prime, "tag_loss", watching_loss)
    finetune.tune(args, model, tuned, sentences, seed=0)
    finetune.predict(model, sentences, prime.tag_names(args.types))
    still = {name for name in tuned if name.endswith("key.bias")}  # attention does not depend on it
    assert tuned.keys() - still <= moved(model.state_dict(), before) <= tuned.keys()
    assert same(encoder.state_dict(), fresh)  # the next run starts from the same encoder
    assert modes == {moves == "full"} and not any(module.training for module in model.modules())


@pytest.mark.parametrize("form", ["priming", "maml", "one set"])
def test_without_inner_steps_the_gradient_is_that_of_fine_tuning(form):
    """So `finetune.py` and FT priming take all that they move as one set, and θh = {}."""
    tasks, model, plain = make_tasks(2), Small(), Small()
    theta_p, theta_a, theta_h = model.sets()
    sets = ({**theta_p, **theta_a, **theta_h}, {}, {}) if form == "one set" else (theta_p, theta_a, theta_h)
    meta_step(model, tasks, sets=sets, inner_steps=0, maml=form == "maml")
    for _, query in tasks:
        small_loss(plain, query).backward()
    named = dict(plain.named_parameters())
    for name, p in {**sets[0], **sets[1]}.items():
        torch.testing.assert_close(p.grad, named[name].grad, rtol=0, atol=1e-14)
    assert same(model.state_dict(), plain.state_dict(), "h.") == (form != "one set")


def test_prime_imports_torch_alone(tmp_path):
    shutil.copy(prime.__file__, tmp_path)
    rest = ["adapters", "transformers", "datasets", "seqeval", "tqdm", "safetensors", "numpy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({rest})); import prime; print(prime.prime.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "prime\n", done.stderr
