"""Algorithm 1 with a new random head for each meta step, instead of line 9's θh = θ1_h.

    python benchmarks/ablate_new_heads.py --model ENCODER --data WIKIANN --output primed-new-heads

Fine-tuning starts from a random head (§3.2); here each inner loop does so too. The flags are those of
prime.py, without --method ft, which has no inner loop. The run is otherwise the same, but writes no
checkpoints.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime


def with_new_heads(meta_training, head):
    """Yields what `meta_training` yields. After each meta step the head is drawn as a Tagger draws it."""
    for query_losses in meta_training:
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        yield query_losses


def build_model_and_data(args):
    """The Tagger, its tokenizer, and the training sentences of each source language, as in prime.py. Raises
    UserError if the output exists, because these runs cannot be resumed."""
    if args.output.exists():
        raise adapters.UserError(f"{args.output} already exists: choose another --output")
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    corpora = [
        adapters.load_sentences(
            args.data, language, "train", tokenizer, types=args.types, max_length=args.max_length,
            limit=args.limit_train, min_sentences=args.support + args.query)
        for language in args.src]
    model = adapters.build_tagger(
        encoder, types=args.types, pe=args.pe, bottleneck=args.bottleneck, device=args.device,
        bf16=args.bf16)
    return model, tokenizer, corpora


def main() -> None:
    args = prime.parse_arguments()
    if args.method == "ft":
        raise adapters.UserError("--method ft has no inner loop that could start from a new head")
    model, tokenizer, corpora = build_model_and_data(args)
    theta_p, theta_a, theta_h = model.split_parameters()
    optimizer, scheduler = prime.adamw_with_linear_decay(
        [*theta_p.values(), *theta_a.values()], args.outer_lr, args.steps)
    batches = prime.sample_batches(
        corpora, steps=args.steps, tasks=args.tasks, support=args.support, query=args.query, seed=args.seed)
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=adapters.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_lr=args.inner_lr, inner_steps=args.inner_steps,
        maml=args.method == "maml",
        encode=model.encode_sets if args.pe == "adapter" else None)
    losses = []
    for query_losses in tqdm(with_new_heads(meta_training, model.head), "priming", args.steps, disable=None):
        losses.append(sum(query_losses))
        if not math.isfinite(losses[-1]):
            found = f"query losses {query_losses}"
            raise adapters.UserError(f"meta step {len(losses)}: {found}; lower --inner-lr or --outer-lr")
    adapters.save_primed(args.output, model, tokenizer, {**vars(args), "heads": "new"}, losses)
    print(f"{args.output}: {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


if __name__ == "__main__":
    adapters.cli(main)
