"""Priming without a transformer and without language: sine waves, the toy of MAML (Finn et al. 2017, §5.1).

`python examples/sinusoid.py`: a task is a sine wave. θa is a small module in the middle of an MLP, θh its
last layer, θp the rest. "PE fine-tuning" moves θa and a new θh by SGD, on ten points of a wave that was not
seen before.
"""

import copy
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # or copy prime.py here
from prime import adamw_with_linear_decay, prime


def draw_task():
    """Ten support points of a wave, ten query points, and 201 from end to end to look at."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(1), torch.pi * torch.rand(1)
    points = *(10 * torch.rand(2, 10, 1) - 5), torch.linspace(-5, 5, 201)[:, None]
    return [(x, amplitude * torch.sin(x - phase)) for x in points]


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


torch.manual_seed(0)
torch.set_num_threads(1)  # so small a model gains nothing from more
model = nn.Sequential(OrderedDict(
    below=nn.Sequential(nn.Linear(1, 40), nn.Tanh()),
    adapter=nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 40)),
    above=nn.Sequential(nn.Linear(40, 40), nn.Tanh()), head=nn.Linear(40, 1)))
not_primed, meta_steps = copy.deepcopy(model), 2000
theta_p, theta_a, theta_h = ({n: p for n, p in model.named_parameters() if n.startswith(part)}
                             for part in (("below", "above"), "adapter", "head"))
outer = [*theta_p.values(), *theta_a.values()]
optimizer, scheduler = adamw_with_linear_decay(outer, lr=3e-3, steps=meta_steps)
batches = ([draw_task()[:2] for _ in range(4)] for _ in range(meta_steps))
meta_training = prime(
    model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=loss,
    optimizer=optimizer, scheduler=scheduler, inner_lr=0.01)
for _query_losses in meta_training:  # each turn is a meta step
    pass

waves = [draw_task() for _ in range(50)]
print("the first of 50 new waves, x =" + " ".join(f"{x:6}" for x in range(-5, 6)) + "   MSE, all waves")
print(f"{'the wave itself':30}" + " ".join(f"{y:6.2f}" for y in waves[0][2][1][::20, 0]))
for steps in (0, 100):
    for name, start in {"not primed": not_primed, "primed": model}.items():
        errors = []
        for support, _, whole in waves:
            tuned = copy.deepcopy(start)
            tuned.head.reset_parameters()
            sgd = torch.optim.SGD([*tuned.adapter.parameters(), *tuned.head.parameters()], lr=0.01)
            for _ in range(steps):
                sgd.zero_grad()
                loss(tuned, support).backward()
                sgd.step()
            errors.append(loss(tuned, whole).item())
            if len(errors) == 1:
                curve = " ".join(f"{y:6.2f}" for y in tuned(whole[0])[::20, 0])
        print(f"{name:11}{steps:4} steps of SGD  {curve}{sum(errors) / len(errors):17.3f}")
