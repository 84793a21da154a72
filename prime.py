"""Priming for parameter-efficient (PE) fine-tuning: Algorithm 1 of Gheini, Ma and May (ACL 2023).
`python prime.py --src en es` runs the paper's experiment and writes θp* and θa* to `primed/`.
To prime your own model, copy the part above the dividing line: it needs torch 2.4 or newer alone."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Task = tuple[Any, Any]  # a support set and a query set: whatever the loss accepts
Loss = Callable[[nn.Module, Any], Tensor]  # L(f_θ, D)
Parameters = Mapping[str, nn.Parameter]  # a named part of `model.named_parameters()`
CHECKPOINTING_ERROR = "activation checkpointing works neither with second_order nor with encode"

def prime(
    model: nn.Module, *, theta_p: Parameters, theta_a: Parameters, theta_h: Parameters,
    batches: Iterable[Iterable[Task]], loss: Loss,
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None = None,
    inner_lr: float = 0.03, inner_steps: int = 5, maml: bool = False, second_order: bool = False,
    encode: Callable[[Sequence], Sequence] | None = None,
) -> Iterator[list[float]]:
    """Algorithm 1 as a generator. Each iteration runs one meta step (lines 2 to 9), which updates the
    parameters in place, and yields one query loss per task. Nothing happens until you iterate;
    afterwards θp* and θa* are in the model.
    model: encoder f, adapter g and head h in one module. Call `model.eval()` first, against dropout.
    theta_p, theta_a, theta_h: disjoint parts of `dict(model.named_parameters())` that require
        gradients (§3.1). A parameter in none of them is a constant.
    batches: one list of (support, query) pairs per meta step; a set is whatever `loss` accepts.
        Training ends when `batches` is exhausted or the caller breaks out of the loop.
    loss: loss(model, batch) returns L_Ti, a scalar. While it runs, the parameters of `model` are θi,
        plain tensors. Read them from `model`: parameters that you kept elsewhere still hold θ.
    optimizer, its scheduler: the "− β ∇" of line 9. The optimizer holds θp and θa, and not θh.
    inner_lr, inner_steps: α and S. maml: the red line, which also updates θi_p (an ablation).
    second_order: if False, inner gradients are constants, so dθi/dθ = 1: §4.2's first-order
        approximation. If True, the exact meta-gradient, which fused attention does not support.
    encode: encode(sets) returns the same sets, in order, with f(x; θp) instead of x. It runs with θ,
        not θi: give it only if θa and θh come after all of θp (an adapter on top), or inner_steps
        is 0. Each meta step calls it for all support sets (without gradients, unless second_order),
        then for all query sets (with gradients, for θp). Ignored with `maml`.
    Before each update, raises ValueError for mistakes that would otherwise give a wrong result.
    """
    encode = None if maml else encode
    thetas = {"theta_p": theta_p, "theta_a": theta_a, "theta_h": theta_h}
    # 1: while not converged do
    for tasks in batches:  # 2: sample a batch of tasks T
        check_arguments(model, thetas, optimizer, scheduler, inner_lr, inner_steps)
        outer_params = [*theta_p.values(), *theta_a.values()]
        inner_params = {**theta_a, **theta_h, **(theta_p if maml else {})}  # with θp: the red line
        task_loss = TaskLoss(model, loss, thetas, forbid_checkpointing=second_order or encode)
        supports, queries = support_and_query_sets(tasks, encode, second_order)
        optimizer.zero_grad()  # line 9's sum starts at zero
        query_losses, theta_of_first_task = [], {}
        for support, query in zip(supports, queries):  # 3: for all Ti in T do
            # copies, but not detached: through θi, the backward pass of line 9 reaches θ
            theta_i = {n: p.clone() for n, p in inner_params.items()}  # 4: θi = θ
            for _ in range(inner_steps):  # 5: for s = 1..S do
                grads = task_loss.gradients_at(theta_i, support, create_graph=second_order)
                theta_i = {n: theta_i[n] - inner_lr * grads[n] for n in theta_i}  # 6
            # 7: end for
            if encode:  # the query sets of all tasks share a graph: one backward pass, after line 8
                query_losses.append(task_loss.at(theta_i, query))
            else:  # adds ∇ L_Ti to .grad
                query_losses.append(task_loss.at(theta_i, query, backward_to=outer_params))
            theta_of_first_task = theta_of_first_task or theta_i
        # 8: end for
        if encode:
            sum(query_losses).backward(inputs=outer_params)  # 9: ∇ Σ L_Ti
        grads = {n: p.grad for n, p in {**theta_p, **theta_a}.items()}
        check_grads(grads, thetas, "the sum of the query losses")
        optimizer.step()  # 9: θa and θp
        for name, p in theta_h.items():
            p.data.copy_(theta_of_first_task[name])  # 9: θh = θ1_h
        if scheduler:
            scheduler.step()
        torch.clear_autocast_cache()  # autocast caches casts of the old θp
        yield [query_loss.item() for query_loss in query_losses]
    # 10: end while
    return theta_p, theta_a  # 11: updated in place

class TaskLoss(nn.Module):
    """L(f_θi, D): `functional_call(self, …)` runs the `forward` of this class with `theta_i` in the
    model, and then puts the model's own θ back. Activation checkpointing runs the model again
    during the backward pass. If that came after θ is back, it would silently use θ instead of θi:
    so `forward` also does the backward pass (`grads_of`, `backward_to`). In two cases a backward
    pass must come later, so checkpointing is forbidden: with second_order, line 9 goes back
    through the inner steps; with encode, one backward pass for all tasks follows line 8."""
    def __init__(self, model, loss, thetas, forbid_checkpointing):
        super().__init__()
        self.model, self.loss_function, self.thetas = model, loss, thetas
        self.forbid_checkpointing = forbid_checkpointing
        name_of = {p: name for part in thetas.values() for name, p in part.items()}
        # maps each parameter's path in this module ("model.head.bias", the key that functional_call
        # expects) to its name in theta_i ("head.bias"). A tied parameter has several paths, one name
        self.name_of_path = {}
        for path, module in self.named_modules():
            for n, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if p in name_of:
                    self.name_of_path[f"{path}.{n}"] = name_of[p]

    def forward(self, batch, grads_of=None, create_graph=False, backward_to=None):
        """Returns the loss with its graph. `grads_of`, tensors: returns their gradients instead.
        `backward_to`, parameters: adds their gradients to .grad, and returns the loss detached."""
        # checkpointing sets hooks on saved tensors; where they are disabled, it raises this error
        forbid = disable_saved_tensors_hooks(CHECKPOINTING_ERROR)
        with forbid if self.forbid_checkpointing else nullcontext():
            loss = self.loss_function(self.model, batch)
        scalar = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
        require(scalar, f"loss must return a scalar that depends on the parameters, not {loss}")
        if grads_of:
            return torch.autograd.grad(loss, grads_of, create_graph=create_graph, allow_unused=True)
        if backward_to:
            loss.backward(inputs=backward_to)
            return loss.detach()
        return loss

    def at(self, theta_i, batch, **options):
        """`forward(batch, **options)` with `theta_i` in the model."""
        replaced = {path: theta_i[name] for path, name in self.name_of_path.items() if name in theta_i}
        return functional_call(self, replaced, (batch,), options, tie_weights=False)

    def gradients_at(self, theta_i, batch, create_graph):
        """∇_θi L(f_θi, D) by name; zero for a parameter on which the loss does not depend."""
        grads = self.at(theta_i, batch, grads_of=[*theta_i.values()], create_graph=create_graph)
        grads = dict(zip(theta_i, grads))
        check_grads(grads, self.thetas, "the loss of a support set")
        return {n: torch.zeros_like(theta_i[n]) if g is None else g for n, g in grads.items()}

def support_and_query_sets(tasks, encode, second_order):
    """The support sets and the query sets of a batch of tasks, encoded if `encode` is given."""
    tasks = list(tasks)
    are_pairs = tasks and all(isinstance(task, (tuple, list)) and len(task) == 2 for task in tasks)
    require(are_pairs, "a batch must be a non-empty list of (support, query) pairs")
    supports, queries = zip(*tasks)
    if encode:
        with torch.set_grad_enabled(second_order):
            supports = list(encode(supports))
        # drop casts of θp that autocast has cached without gradients: queries would reuse them
        torch.clear_autocast_cache()
        queries = list(encode(queries))
        found = f"{len(supports)} and {len(queries)} sets for {len(tasks)} tasks"
        require(len(supports) == len(queries) == len(tasks), f"encode returned {found}")
    require(not any(isinstance(s, Iterator) for s in supports), "support sets cannot be generators")
    return supports, queries

def require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)

def check_arguments(model, thetas, optimizer, scheduler, inner_lr, inner_steps):
    """Raises ValueError for a wrong argument, and says what to do."""
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    require(not distributed, "DDP: pass model.module; all-reduce .grad by optimizer.register_step_pre_hook")
    require(torch.is_grad_enabled(), "do not iterate over prime() under torch.no_grad()")
    valid_steps = isinstance(inner_steps, int) and inner_steps >= 0
    require(valid_steps, f"inner_steps must be an integer ≥ 0, not {inner_steps}")
    require(0 < inner_lr < math.inf, f"inner_lr must be positive and finite, not {inner_lr}")
    require(not isinstance(scheduler, ReduceLROnPlateau), "step ReduceLROnPlateau in your own loop")
    require(all(isinstance(part, Mapping) for part in thetas.values()), "theta_* must be dicts")
    if inner_steps:  # else plain fine-tuning: any set may be empty
        require(thetas["theta_p"], "theta_p is empty: did a PE library freeze it?")
        require(thetas["theta_a"] or thetas["theta_h"], "theta_a and theta_h are empty")
    model_params = dict(model.named_parameters(remove_duplicate=False))
    optimized, seen = {p for group in optimizer.param_groups for p in group["params"]}, set()
    for set_name, part in thetas.items():
        for name, p in part.items():
            own = model_params.get(name) is p
            require(own, f"{name} is not the model's: build {set_name} after wrapping or moving it")
            require(p not in seen, f"{name} is in two sets, which must be disjoint")
            require(p.requires_grad, f"{name} is frozen: call requires_grad_()")
            should_hold = set_name != "theta_h"
            expected = f"{name}: the optimizer must {'' if should_hold else 'not '}hold {set_name}"
            require((p in optimized) == should_hold, expected)
            seen.add(p)
    extra = [tuple(p.shape) for p in optimized if p.requires_grad and p not in seen]
    require(not extra, f"the optimizer holds parameters in no set, of shapes {extra}")

def check_grads(grads, thetas, loss_name):
    """Raises ValueError if all gradients of a set are None. Sets not in `grads` are skipped."""
    for set_name, part in thetas.items():
        found = [grads[n] for n in part if n in grads]
        require(not found or any(g is not None for g in found), f"{loss_name} does not depend on {set_name}")

def adamw_with_linear_decay(parameters: Iterable[Tensor], lr: float, steps: int):
    """AdamW (Loshchilov and Hutter 2019) with weight decay 0.01 (not in the paper), and a scheduler
    under which the rate falls linearly to 0. Raises ValueError if `steps` is not positive."""
    require(steps >= 1, f"steps must be at least 1, not {steps}")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))

# ---- below: the paper's experiment, with the model and the data of adapters.py ----
def sample_batches(corpora, steps, tasks, support, query, seed, start_step=0) -> Iterator[list]:
    """Yields a list of (support, query) pairs per meta step: per task, disjoint samples of one
    language's corpus; corpora alternate. A step depends only on `seed` and the step's number."""
    for step in range(start_step, steps):
        rng, batch = random.Random(f"{seed} {step}"), []
        for task in range(step * tasks, (step + 1) * tasks):
            sample = rng.sample(corpora[task % len(corpora)], support + query)
            batch.append((sample[:support], sample[support:]))
        torch.manual_seed(rng.getrandbits(63))  # for dropout
        yield batch

def parse_arguments():
    from adapters import MODEL_DEFAULTS, common_parser, positive
    parser = common_parser("Prime an encoder, by Algorithm 1 or an ablation. The defaults of --steps, "
                           "sizes and lengths are ours, the others the paper's.")
    add = parser.add_argument
    add("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    add("--method", choices=["meta", "maml", "ft"], default="meta", help="meta: Algorithm 1 (Table "
        "1, row 4); maml: with the red line (row 6); ft: plain fine-tuning (row 5)")
    add("--inner-steps", type=positive(int), default=5, help="S, per task (row 7: 1)")
    add("--inner-lr", type=positive(float), default=0.03, help="α, the inner loop's rate, of SGD")
    add("--outer-lr", type=positive(float), default=5e-5, help="β, AdamW's rate, which falls to 0")
    add("--steps", type=positive(int), default=1000, help="meta steps")
    add("--tasks", type=positive(int), default=2, help="tasks per meta step")
    add("--support", type=positive(int), default=16, help="support sentences per task")
    add("--query", type=positive(int), default=16, help="query sentences per task")
    add("--seed", type=positive(int, zero=True), default=0, help="for weights and sampling")
    add("--save-every", type=positive(int), default=100, help="meta steps between checkpoints")
    add("--output", type=Path, default=Path("primed"), help="folder for θp* and θa*")
    parser.set_defaults(**MODEL_DEFAULTS)
    return parser.parse_args()

def main() -> None:
    args = parse_arguments()
    import adapters
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    min_sentences = args.support + args.query
    options = tokenizer, args.types, args.max_length, args.limit_train, min_sentences
    corpora = [adapters.load_sentences(args.data, name, "train", *options) for name in args.src]
    # a resumed run may change these: model and data are compared by content, not by name
    not_compared = ("model", "data", "device", "output", "save_every")
    settings = {n: v for n, v in vars(args).items() if n not in not_compared}
    settings |= adapters.fingerprint(encoder, corpora)
    model = adapters.build_tagger(encoder, args.types, args.pe, args.bottleneck, args.device, args.bf16)
    settings["bottleneck"] = model.bottleneck
    if adapters.find_run_or_claim(args.output, settings, "priming.json"):
        return print(f"{args.output} is complete")
    theta_p, theta_a, theta_h = model.split_parameters()
    inner_steps, support, query = args.inner_steps, args.support, args.query
    if args.method == "ft":  # row 5, §5.2: no inner steps, and AdamW updates θh too
        theta_p, theta_h, inner_steps = {**theta_p, **theta_h}, {}, 0
        support, query = 0, support + query  # the same sentences as other methods
        model.train()  # dropout
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = adamw_with_linear_decay(outer_params, args.outer_lr, args.steps)
    checkpoint, stateful = args.output / "checkpoint.pt", (model, optimizer, scheduler)
    losses = adapters.load_checkpoint(checkpoint, args.device, stateful)
    batches = sample_batches(corpora, args.steps, args.tasks, support, query, args.seed, len(losses))
    meta_training = prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches,
        loss=adapters.tag_loss, optimizer=optimizer, scheduler=scheduler, inner_lr=args.inner_lr,
        inner_steps=inner_steps, maml=args.method == "maml",
        encode=model.encode_sets if args.pe == "adapter" else None)  # else θa is inside f
    from tqdm import tqdm
    for query_losses in tqdm(meta_training, "priming", args.steps, initial=len(losses), disable=None):
        losses.append(sum(query_losses))
        norm = nn.utils.get_total_norm([p.grad for p in outer_params if p.grad is not None])
        found = f"meta step {len(losses)}: query losses {query_losses}, gradient norm {norm:.3g}"
        adapters.expect(math.isfinite(losses[-1] + norm), f"{found}; lower --inner-lr or --outer-lr")
        if len(losses) % args.save_every == 0 or len(losses) == args.steps:
            with adapters.atomic_write(checkpoint) as new:
                torch.save((losses, [part.state_dict() for part in stateful]), new)
    adapters.save_primed(args.output, model, tokenizer, {**vars(args), **settings}, losses)
    print(f"{args.output}: {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")

if __name__ == "__main__":
    from adapters import cli
    cli(main)
