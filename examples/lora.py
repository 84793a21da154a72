"""Priming for LoRA (Hu et al. 2022) as peft has it, with the flags of prime.py; --bottleneck is its rank.

    python examples/lora.py --model demo/encoder --data demo/wikiann --steps 400 --output primed-lora

leaves θp* as `AutoModel` reads it, and in its folder lora/ θa* in peft's own format. Go on with

    PeftModel.from_pretrained(AutoModel.from_pretrained("primed-lora"), "primed-lora/lora", is_trainable=True)
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapters
import prime


def main() -> None:
    args = prime.parse_arguments()
    try:
        import peft
    except ImportError:
        raise prime.BadInput("LoRA needs peft: pip install peft==0.21.2") from None
    if args.method == "ft" or args.pe != "adapter" or args.bf16:
        raise prime.BadInput("this example has no --method ft, --pe or --bf16")
    torch.manual_seed(args.seed)
    with prime.blaming(f"--model {args.model}"):
        encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    if args.second_order:
        encoder.set_attn_implementation("eager")  # fused kernels have no second derivative
    least = args.support + args.query
    corpora = [prime.load(args, tokenizer, language, "train", least) for language in args.src]
    config = peft.LoraConfig("FEATURE_EXTRACTION", r=args.bottleneck, lora_alpha=2 * args.bottleneck)
    lora = peft.get_peft_model(encoder, config)
    with prime.blaming(f"--device {args.device}"):
        model = adapters.Tagger(lora, len(prime.tag_names(args.types)), None).to(args.device).eval()
        model.choose_packing(sum(corpora, []))
    if args.output.exists():
        raise prime.BadInput(f"--output {args.output} is there: name a new folder")
    model.requires_grad_()  # peft froze θp, which line 9 moves
    theta_p, _, theta_h = model.sets()
    theta_a = {name: theta_p.pop(name) for name in [*theta_p] if ".lora_" in name}
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer, args.outer_lr, args.steps)
    steps = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, loss=prime.tag_loss,
        batches=prime.sample_batches(corpora, args), optimizer=optimizer, scheduler=scheduler,
        inner_lr=args.inner_lr, inner_steps=args.inner_steps, maml=args.method == "maml",
        second_order=args.second_order,
    )
    for query_losses in tqdm(steps, "priming", args.steps, disable=None):
        last = sum(query_losses)
    lora.save_pretrained(args.output / "lora")
    tokenizer.save_pretrained(args.output)
    lora.unload().save_pretrained(args.output)
    print(f"{args.output}: query loss {last:.3f}")


if __name__ == "__main__":
    prime.run(main)
