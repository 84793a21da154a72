"""Start here: priming in 30 seconds, without a transformer or language. `python examples/sinusoid.py`

A task is to fit a sine wave, the toy problem of MAML (Finn et al. 2017, §5.1). The model is a small MLP: θa
is a module in its middle, θh its last layer and θp the rest. After priming, "PE fine-tuning" updates θa and a
new θh by SGD, on ten points of a wave that was not seen before; θp stays as priming left it.
"""

import copy
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # or copy prime.py to your project
from prime import adamw_with_linear_decay, prime

META_STEPS, TASKS, INNER_LR = 1500, 4, 0.01


def sample_wave():
    """Support set, query set and a grid over the whole range, each a pair of x and y: [points, 1]."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(1), torch.pi * torch.rand(1)
    support_x, query_x = 10 * torch.rand(2, 10, 1) - 5
    grid_x = torch.linspace(-5, 5, 201)[:, None]
    return [(x, amplitude * torch.sin(x - phase)) for x in (support_x, query_x, grid_x)]


def loss(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def fine_tune(model, support, steps):
    """A copy of the model with a new head, after `steps` of SGD on θa and θh."""
    tuned = copy.deepcopy(model)
    tuned.head.reset_parameters()
    sgd = torch.optim.SGD([*tuned.adapter.parameters(), *tuned.head.parameters()], lr=INNER_LR)
    for _ in range(steps):
        sgd.zero_grad()
        loss(tuned, support).backward()
        sgd.step()
    return tuned


torch.manual_seed(0)
torch.set_num_threads(1)  # a model this small gains nothing from more
model = nn.Sequential(OrderedDict(
    below=nn.Sequential(nn.Linear(1, 40), nn.Tanh()),
    adapter=nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 40)),
    above=nn.Sequential(nn.Linear(40, 40), nn.Tanh()), head=nn.Linear(40, 1)))
not_primed = copy.deepcopy(model)

named = dict(model.named_parameters())
theta_p = {n: p for n, p in named.items() if n.startswith(("below", "above"))}
theta_a = {n: p for n, p in named.items() if n.startswith("adapter")}
theta_h = {n: p for n, p in named.items() if n.startswith("head")}
optimizer, scheduler = adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], 3e-3, META_STEPS)
batches = ([sample_wave()[:2] for _ in range(TASKS)] for _ in range(META_STEPS))  # (support, query) pairs
for _query_losses in prime(
    model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=loss,
    optimizer=optimizer, scheduler=scheduler, inner_lr=INNER_LR,
):
    pass  # each iteration is one meta step

waves = [sample_wave() for _ in range(50)]
print("first of 50 new waves, at x =" + " ".join(f"{x:6}" for x in range(-5, 6)) + "   MSE, all waves")
print(f"{'the wave itself':29}" + " ".join(f"{y:6.2f}" for y in waves[0][2][1][::20, 0]))
for steps in (0, 100):
    for name, start in {"not primed": not_primed, "primed": model}.items():
        tuned = [fine_tune(start, support, steps) for support, _, _ in waves]
        errors = [loss(mlp, grid).item() for mlp, (_, _, grid) in zip(tuned, waves)]
        curve = tuned[0](waves[0][2][0])[::20, 0]
        points = " ".join(f"{y:6.2f}" for y in curve)
        print(f"{name:11}{steps:3} steps of SGD  {points}{sum(errors) / len(errors):17.3f}")
