"""FT priming with PE parameters and a head for each source language, and one θp for all of them.

    python benchmarks/joint_priming.py --model ENCODER --data WIKIANN --output primed-joint

In Algorithm 1 each task has its own θi_a and θi_h, which the inner loop makes from θ; in FT priming all
tasks share one θa and one θh. Here each language has its own from the first step to the last, without an
inner loop: AdamW trains them and θp jointly, on the sentences of FT priming. (Block et al. 2025, arXiv
2410.22264, analyse this for linear models with LoRA.) The output holds θp*; its θa is the one that all
languages started from, because fine-tuning starts from new PE parameters. The flags are those of prime.py;
--method, --inner-steps and --inner-lr have no effect. The run writes no checkpoints.
"""

import math
import sys
from pathlib import Path

from torch.func import functional_call
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime
from ablate_new_heads import build_model_and_data


def loss_with(parameters, model, sentences):
    """The loss with a language's own θa and θh in the model."""
    return adapters.tag_loss(lambda batch: functional_call(model, parameters, (batch,)), sentences)


def train_jointly(model, batches, languages, tasks, lr, steps):
    """Trains θp in place, with θa and θh of each language. Yields the losses of each step's tasks. Task k of
    all steps is from language k modulo `languages`, as in sample_batches, and its support set is not used."""
    theta_p, theta_a, theta_h = model.split_parameters()
    own = [{n: p.detach().clone().requires_grad_() for n, p in {**theta_a, **theta_h}.items()}
           for _ in range(languages)]
    outer_params = [*theta_p.values(), *(p for parameters in own for p in parameters.values())]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, lr, steps)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        losses = []
        for task, (_, sentences) in enumerate(batch, start=step * tasks):
            loss = loss_with(own[task % languages], model, sentences)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        yield losses


def main() -> None:
    args = prime.parse_arguments()
    model, tokenizer, corpora = build_model_and_data(args)
    model.train()  # dropout, as in FT priming
    batches = prime.sample_batches(
        corpora, args.steps, args.tasks, support=0, query=args.support + args.query, seed=args.seed)
    training = train_jointly(model, batches, len(corpora), args.tasks, args.outer_lr, args.steps)
    losses = []
    for task_losses in tqdm(training, "joint priming", args.steps, disable=None):
        losses.append(sum(task_losses))
        if not math.isfinite(losses[-1]):
            raise adapters.UserError(f"step {len(losses)}: losses {task_losses}; lower --outer-lr")
    record = {**vars(args), "bottleneck": model.bottleneck, "method": "joint"}
    adapters.save_primed(args.output, model, tokenizer, record, losses)
    print(f"{args.output}: {args.steps} steps; loss {losses[0]:.3f} → {losses[-1]:.3f}")


if __name__ == "__main__":
    adapters.cli(main)
