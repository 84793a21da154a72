"""Priming for peft's LoRA (Hu et al. 2022), with the flags of prime.py; --bottleneck is the rank.

    python examples/lora.py --model demo/encoder --data demo/wikiann --steps 400 --output primed-lora

writes θp* to the folder, as `AutoModel` reads it, and θa* to its folder lora/ in peft's format. To tune it:

    PeftModel.from_pretrained(AutoModel.from_pretrained("primed-lora"), "primed-lora/lora", is_trainable=True)
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapters
import prime


def add_lora(encoder, rank):
    """A PeftModel of the encoder, none of it frozen: peft freezes θp, but line 9 updates it."""
    try:
        import peft
    except ImportError:
        raise adapters.UserError("LoRA needs peft: pip install peft==0.21.2") from None
    config = peft.LoraConfig("FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank)
    return peft.get_peft_model(encoder, config).requires_grad_()


def main() -> None:
    args = prime.parse_arguments()
    if args.method == "ft" or args.pe != "adapter" or args.bf16:
        raise adapters.UserError("this example has no --method ft, --pe or --bf16")
    if args.output.exists():
        raise adapters.UserError(f"{args.output} already exists: choose another --output")
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    if args.second_order:
        encoder.set_attn_implementation("eager")  # fused attention has no second derivative
    corpora = [
        adapters.load_sentences(
            args.data, language, "train", tokenizer, types=args.types, max_length=args.max_length,
            limit=args.limit_train, min_sentences=args.support + args.query)
        for language in args.src]
    lora = add_lora(encoder, args.bottleneck)
    model = adapters.build_tagger(
        lora, types=args.types, pe=None, bottleneck=args.bottleneck, device=args.device, bf16=False,
        sentences=sum(corpora, []))
    theta_p, _, theta_h = model.split_parameters()
    theta_a = {name: theta_p.pop(name) for name in [*theta_p] if ".lora_" in name}
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, args.outer_lr, args.steps)
    batches = prime.sample_batches(
        corpora, steps=args.steps, tasks=args.tasks, support=args.support, query=args.query, seed=args.seed)
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=adapters.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_lr=args.inner_lr, inner_steps=args.inner_steps,
        maml=args.method == "maml", second_order=args.second_order)
    losses = [sum(query_losses) for query_losses in tqdm(meta_training, "priming", args.steps, disable=None)]
    lora.save_pretrained(args.output / "lora")
    tokenizer.save_pretrained(args.output)
    lora.unload().save_pretrained(args.output)
    print(f"{args.output}: query loss {losses[0]:.3f} → {losses[-1]:.3f}")


if __name__ == "__main__":
    adapters.cli(main)
