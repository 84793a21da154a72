"""While the loss runs, and while its gradient is computed, the model's parameters are θi.

The oracle substitutes nothing. For each task, torch.optim.SGD updates a deep copy of the model; the sum of
the gradients of the copies' query losses is the first-order meta-gradient. A second-order meta-gradient is
compared with central finite differences."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from prime import prime

INNER_LR, INNER_STEPS = 0.2, 3
COUNTS = pytest.mark.parametrize("count", [1, 2, 5])
PRIMING_AND_MAML = pytest.mark.parametrize("maml", [False, True], ids=["priming", "maml"])


class Net(nn.Module):
    """h(g(f(x))): f is pretrained, g is the adapter and h the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
        self.g, self.h = nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def body(self, x):
        return torch.tanh(self.g(torch.tanh(self.f(x))))

    def forward(self, x):
        return self.h(self.body(x))


class ParametrizedInForward(Net):
    """Each forward pass registers a parametrization of a weight and removes it, as peft does for experts."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.get_submodule(self.layer)
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
        logits = super().forward(x)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        return logits


class SetInForward(Net):
    """Each forward pass calls `set_` on the weights of f, whose gradients then accumulate in new nodes."""

    def forward(self, x):
        with torch.no_grad():
            for p in self.f.parameters():
                p.set_(p)
        return super().forward(x)


class Checkpointed(nn.Module):
    """A layer that the backward pass calls again, with the parameters that it has then."""

    def __init__(self, layer, use_reentrant=False):
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


def net_with(name, wrap):
    model = Net()
    setattr(model, name, wrap(model.get_submodule(name)))
    return model


class Tied(Net):
    """The weight of one layer is also the weight of another, `again`."""

    def __init__(self, name):
        super().__init__()
        layer = self.get_submodule(name)
        self.again = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self.again.weight = layer.weight

    def forward(self, x):
        z = self.body(x)
        return self.h(z) + self.again(z)[:, :3]


class TiedEmbedding(Net):
    """Embedding and decoder share their weight; x is rounded to token numbers."""

    def __init__(self):
        super().__init__()
        self.f, self.decoder = nn.Embedding(9, 5).double(), nn.Linear(5, 9, bias=False)
        self.decoder.weight = self.f.weight

    def forward(self, x):
        z = self.body((2 * x).round().long().clamp(-4, 4) + 4).mean(1)
        return self.h(z) + self.decoder(z)[:, :3]


def classification_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def plain(_):
    return classification_loss


def regularised(name, _):
    return lambda model, batch: classification_loss(model, batch) + model.get_submodule(name).weight.square().sum()


SITUATIONS = {
    "a regulariser on theta_h": (Net, partial(regularised, "h")),
    "a regulariser on theta_a": (Net, partial(regularised, "g")),
    "a method other than forward": (Net, lambda _: lambda model, batch: cross_entropy(model.h(model.body(batch[0])), batch[1])),
    "a loss that closes over the model": (Net, lambda model: lambda _, batch: cross_entropy(model(batch[0]), batch[1])),
    "theta_a parametrized in forward": (partial(ParametrizedInForward, "g"), plain),
    "theta_h parametrized in forward": (partial(ParametrizedInForward, "h"), plain),
    "embedding and decoder tied in theta_p": (TiedEmbedding, plain),
    "two layers tied in theta_p": (partial(Tied, "f.2"), plain),
    "two layers tied in theta_a": (partial(Tied, "g"), plain),
    "two layers tied in theta_h": (partial(Tied, "h"), plain),
    "first order: theta_p parametrized in forward": (partial(ParametrizedInForward, "f.2"), plain),
    "first order: theta_p set in forward": (SetInForward, plain),
    "first order: theta_a checkpointed": (partial(net_with, "g", Checkpointed), plain),
}
BY_ORDER = [(name, second) for name in SITUATIONS for second in (False, True) if not (second and "first order" in name)]


def sets_of(model, theta_a=r"\bg\.", theta_h=r"\bh\."):
    """θp, θa and θh. The last two are given by regular expressions for their names."""
    named = dict(model.named_parameters())
    set_a, set_h = ({n: p for n, p in named.items() if re.search(part, n)} for part in (theta_a, theta_h))
    return {n: p for n, p in named.items() if n not in {**set_a, **set_h}}, set_a, set_h


def points(rng):
    return torch.randn(6, 4, generator=rng, dtype=torch.float64), torch.randint(3, (6,), generator=rng)


def make_tasks(count, draw=points):
    rng = torch.Generator().manual_seed(1)
    return [(draw(rng), draw(rng)) for _ in range(count)]


def copies_at_theta_i(model, sets, make_loss, tasks, maml):
    """For each task, the query loss of a deep copy that SGD has updated, and the copy's parameters."""
    inner_params = [*sets[1], *sets[2], *(sets[0] if maml else ())]
    for support, query in tasks:
        copied = copy.deepcopy(model)
        loss, named = make_loss(copied), dict(copied.named_parameters(remove_duplicate=False))
        optimizer = torch.optim.SGD([named[name] for name in inner_params], lr=INNER_LR)
        for _ in range(INNER_STEPS):
            optimizer.zero_grad()
            loss(copied, support).backward()
            optimizer.step()
        copied.zero_grad()
        yield loss(copied, query), named


def meta_gradient(model, sets, make_loss, tasks, maml=False):
    """First order: the meta-gradient of θp and θa, and θ1_h, by name."""
    grads, heads = dict.fromkeys([*sets[0], *sets[1]], 0.0), []
    for query_loss, named in copies_at_theta_i(model, sets, make_loss, tasks, maml):
        query_loss.backward()
        grads = {name: total + named[name].grad for name, total in grads.items()}
        heads.append({name: named[name].detach() for name in sets[2]})
    return grads, heads[0]


def finite_differences(model, sets, make_loss, tasks, maml, epsilon=1e-5):
    """Second order: a random direction in θp and one in θa, each with the meta-loss's derivative along it."""
    rng, derivatives = torch.Generator().manual_seed(2), []
    for part in ([*sets[0].values()], [*sets[1].values()]):
        start, meta_losses = parameters_to_vector(part).detach(), []
        direction = torch.randn(start.shape, generator=rng, dtype=torch.float64)
        for size in (epsilon, -epsilon):
            vector_to_parameters(start + size * direction, part)
            copies = copies_at_theta_i(model, sets, make_loss, tasks, maml)
            meta_losses.append(sum(query_loss.item() for query_loss, _ in copies))
        vector_to_parameters(start, part)
        derivatives.append((direction, (meta_losses[0] - meta_losses[1]) / (2 * epsilon)))
    return derivatives


def meta_step(model, sets, loss, tasks, **settings):
    """One meta step with an outer rate of 0: the `.grad` of θp and θa is the meta-gradient."""
    optimizer = torch.optim.SGD([*sets[0].values(), *sets[1].values()], lr=0.0)
    settings.update(zip(("theta_p", "theta_a", "theta_h"), sets), optimizer=optimizer, loss=loss)
    list(prime(model, batches=[tasks], inner_lr=INNER_LR, inner_steps=INNER_STEPS, **settings))


def assert_refused(error, message, model, *more, **settings):
    """The meta step raises before any parameter changes or is replaced."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        meta_step(model, *more, **settings)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def assert_first_order(sets, expected, tolerance=1e-12):
    grads, head = expected
    errors = [p.grad - grads[name] for part in sets[:2] for name, p in part.items()]
    errors += [p - head[name] for name, p in sets[2].items()]
    assert max(error.abs().max() for error in errors) < tolerance


def assert_second_order(sets, expected):
    for part, (direction, derivative) in zip(sets, expected):
        actual = parameters_to_vector([p.grad for p in part.values()]) @ direction
        assert abs(actual - derivative) < 1e-6 * abs(derivative)


ORDERS = [(meta_gradient, assert_first_order), (finite_differences, assert_second_order)]


@PRIMING_AND_MAML
@COUNTS
@pytest.mark.parametrize("situation, second_order", BY_ORDER)
def test_the_meta_gradient_equals_that_of_deep_copies(situation, second_order, count, maml):
    make_model, make_loss = SITUATIONS[situation]
    model, tasks, (oracle, assert_equals) = make_model(), make_tasks(count), ORDERS[second_order]
    sets = sets_of(model)
    expected = oracle(model, sets, make_loss, tasks, maml)
    meta_step(model, sets, make_loss(model), tasks, maml=maml, second_order=second_order)
    assert_equals(sets, expected)


def encode_with(f):
    return lambda batches: [(f(x), y) for x, y in batches]


def loss_on_features(model, batch):
    return cross_entropy(model.h(torch.tanh(model.g(torch.tanh(batch[0])))), batch[1])


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Checkpointed])
@pytest.mark.parametrize("layer, way", [(n, "second_order") for n in "fgh"] + [(n, "encode") for n in "gh"])
def test_checkpointing_that_would_recompute_at_theta_is_refused(layer, way, wrap):
    """Second derivatives, and the gradient of encoded query sets, are computed when the parameters are θ again."""
    model, tasks = net_with(layer, wrap), make_tasks(2)
    loss, settings = classification_loss, {"second_order": True}
    if way == "encode":
        loss, settings = loss_on_features, {"encode": encode_with(model.f)}
    assert_refused(RuntimeError, "activation checkpointing", model, sets_of(model), loss, tasks, **settings)


def test_checkpointing_by_transformers_is_refused_with_second_order():
    model, *_ = checkpointed_bert(pytest.importorskip("transformers"))
    args = model, sets_of(model, "bias$", "^classifier.weight"), its_own_loss(model), make_tasks(2, sentences)
    assert_refused(RuntimeError, "activation checkpointing", *args, second_order=True)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Checkpointed, "transformers"])
def test_a_checkpointed_encoder_behind_encode_has_the_gradient_of_deep_copies(wrap):
    """The inner loop does not change θp, so the encoder may compute its activations again at any time."""
    if wrap == "transformers":
        model, layer, _ = checkpointed_bert(pytest.importorskip("transformers"))
        sets, encode = sets_of(model.double(), "no adapter", "^classifier"), encode_with(lambda x: model.bert(x)[0])
        tasks, make_loss, loss = make_tasks(2, sentences), its_own_loss, classifier_loss
    else:
        model = net_with("f", wrap)
        layer, sets, encode = [*model.f.modules()][-1], sets_of(model), encode_with(model.f)
        tasks, make_loss, loss = make_tasks(2), plain, loss_on_features
    expected, passes = meta_gradient(model, sets, make_loss, tasks), []
    layer.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    meta_step(model, sets, loss, tasks, encode=encode)
    assert_first_order(sets, expected)
    assert (passes.count(False), passes.count(True)) == (2, 2 * 2)  # query sets: once more in the backward pass


@pytest.mark.parametrize("maml, message", [(True, "use_reentrant=False"), (False, "does not depend on theta_a")])
def test_reentrant_checkpointing_is_refused(maml, message):
    """If an inner parameter precedes the checkpointed layer, torch's message says what to use instead."""
    model = net_with("g", partial(Checkpointed, use_reentrant=True))
    error = RuntimeError if maml else ValueError
    assert_refused(error, message, model, sets_of(model), classification_loss, make_tasks(2), maml=maml)


@COUNTS
def test_a_tied_weight_may_be_given_by_its_second_name(count):
    model, tasks = Tied("g"), make_tasks(count)
    theta_p, theta_a, theta_h = sets_of(model)
    sets = theta_p, {"again.weight": theta_a["g.weight"], "g.bias": theta_a["g.bias"]}, theta_h
    expected = meta_gradient(model, sets, plain, tasks)
    meta_step(model, sets, classification_loss, tasks)
    assert_first_order(sets, expected)


@PRIMING_AND_MAML
@COUNTS
@pytest.mark.parametrize("second_order", [False, True])
def test_a_compiled_model_runs_its_graphs_with_theta_i(second_order, count, maml):
    """The sets are those of the compiled model. The oracle uses no compiler."""
    torch.compiler.reset()
    model, twin, tasks, calls = Net(), Net(), make_tasks(count), []
    compiled = torch.compile(model, backend=lambda graph, _: lambda *args: calls.append(1) or graph(*args))
    sets, (oracle, assert_equals) = sets_of(compiled), ORDERS[second_order]
    expected = oracle(twin, sets_of(twin), plain, tasks, maml)
    meta_step(compiled, sets, classification_loss, tasks, maml=maml, second_order=second_order)
    assert len(calls) == count * (INNER_STEPS + 1)
    sets = [{name.removeprefix("_orig_mod."): p for name, p in part.items()} for part in sets]
    assert_equals(sets, expected)


def sentences(rng):
    return torch.randint(20, (4, 6), generator=rng), torch.randint(3, (4, 6), generator=rng)


def its_own_loss(_):
    return lambda model, batch: model(input_ids=batch[0], labels=batch[1]).loss


def classifier_loss(model, batch):
    return cross_entropy(model.classifier(batch[0]).flatten(0, 1), batch[1].flatten())


SIZES = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6,
             max_position_embeddings=8, num_labels=3, attn_implementation="eager")  # fmt: skip


def checkpointed_bert(transformers):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForTokenClassification(config).train()
    model.gradient_checkpointing_enable()
    return model, model.bert.encoder.layer[0], {"target_modules": ["query", "value"]}


def mixture_of_experts(transformers):
    torch.manual_seed(0)
    experts = dict(num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")
    config = transformers.MixtralConfig(**SIZES, **experts, num_key_value_heads=1, classifier_dropout=0.0)
    model, targets = transformers.MixtralForTokenClassification(config), ["gate_up_proj", "down_proj"]
    return model, model.model.layers[0], {"target_modules": [], "target_parameters": targets}


@PRIMING_AND_MAML
@COUNTS
@pytest.mark.parametrize("make_model, passes", [(checkpointed_bert, 2), (mixture_of_experts, 1)])
def test_lora_by_peft_has_the_meta_gradient_of_deep_copies(make_model, passes, count, maml):
    """In a BERT whose backward pass runs each layer again, and on experts, which peft parametrizes in forward.
    Mixtral's norms and router compute in float32, so equality holds to fewer digits there."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, layer, targets = make_model(transformers)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)).double().requires_grad_()
    sets, calls = sets_of(model, r"\.lora_", r"\b(classifier|score)\."), []
    assert len(sets[1]) == 8  # A and B, of two weights in each of two layers
    with torch.no_grad():
        for p in sets[1].values():
            p.add_(0.1 * torch.randn_like(p))  # LoRA's B starts at zero
    tasks = make_tasks(count, sentences)
    expected = meta_gradient(model, sets, its_own_loss, tasks, maml)
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    meta_step(model, sets, its_own_loss(model), tasks, maml=maml)
    assert_first_order(sets, expected, 1e-6 if make_model is mixture_of_experts else 1e-12)
    assert len(calls) == passes * count * (INNER_STEPS + 1)


@COUNTS
def test_as_documented_a_weight_that_the_loss_keeps_from_elsewhere_stays_at_theta(count):
    """A regulariser on it is a constant in the inner loop; in the deep copies it is not."""

    def make_loss(model):
        weight = [model.h.weight]
        return lambda model, batch: classification_loss(model, batch) + weight[0].square().sum()

    model, tasks = Net(), make_tasks(count)
    sets = sets_of(model)
    constant, updated = (meta_gradient(model, sets, loss, tasks) for loss in (plain, make_loss))
    meta_step(model, sets, make_loss(model), tasks)
    assert_first_order(sets, constant)
    assert (model.h.weight - updated[1]["h.weight"]).abs().max() > 1e-2
    assert (model.g.weight.grad - updated[0]["g.weight"]).abs().max() > 1e-3


@COUNTS
def test_as_documented_a_gradient_hook_does_not_act_on_the_inner_loop(count):
    """It acts on the meta-gradient, which `backward` adds to `.grad`. The deep copies have no hook."""
    model, tasks = Net(), make_tasks(count)
    sets = sets_of(model)
    grads, head = meta_gradient(model, sets, plain, tasks)
    model.g.weight.register_hook(lambda grad: 3 * grad)
    meta_step(model, sets, classification_loss, tasks)
    assert_first_order(sets, ({**grads, "g.weight": 3 * grads["g.weight"]}, head))
