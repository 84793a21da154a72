"""The rule for α: what an inner step does follows α‖f(x)‖², and not α.

    python benchmarks/scale.py --model ENCODER --data WIKIANN --steps 100

primes the same encoder with its features times a constant c, for several c and α, from the same weights with
the same tasks, and prints the query loss of a task over the first and the last ten meta steps. Rows of one
α‖c f(x)‖² should agree where the rule holds, rows of one α where it does not.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime


class Scaled(adapters.Tagger):
    """A Tagger whose encoder gives c f(x)."""

    c = 1.0

    def encode(self, sentences):
        encoded = super().encode(sentences)
        return [sentence._replace(features=self.c * sentence.features) for sentence in encoded]


def measure(encoder, corpora, c, alpha, args):
    torch.manual_seed(args.seed)
    model = Scaled(copy.deepcopy(encoder), 7).eval()
    model.choose_packing(sum(corpora, []))
    model.c = c
    with torch.no_grad():
        features = torch.cat([s.features for s in model.encode(corpora[0][:100])])
    theta_p, theta_a, theta_h = model.sets()
    outer = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer, args.outer_lr, args.steps)
    batches, losses = prime.sample_batches(corpora, args), []
    steps = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=prime.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_lr=alpha, encode=model.encode_sets,
    )
    for query_losses in tqdm(steps, f"c = {c:g}, α = {alpha:g}", args.steps, disable=None):
        losses.append(sum(query_losses) / len(query_losses))
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    return alpha * features.square().sum(-1).mean().item(), first, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("--model", default=str(ROOT / "demo/encoder"))
    flag("--data", default=str(ROOT / "demo/wikiann"))
    flag("--steps", type=int, default=100)
    flag("--outer-lr", type=float, default=2e-4)
    flag("--limit-train", type=int, default=5000)
    flag("--seed", type=int, default=0)
    parser.set_defaults(types=["PER", "ORG", "LOC"], max_length=128, method="meta", tasks=2, support=16,
                        query=16)
    args = parser.parse_args()
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    corpora = [prime.load(args, tokenizer, language, "train", 32) for language in ("en", "es")]
    print("| c | α | α‖c f(x)‖² | query loss, first ten steps | last ten |\n|---|---|---|---|---|")
    root = 10**0.5
    for c, alpha in ((1, 0.03), (1, 0.3), (root, 0.03), (1 / root, 0.3), (root, 0.3), (1 / root, 3)):
        scale, first, last = measure(encoder, corpora, c, alpha, args)
        print(f"| {c:.2f} | {alpha:g} | {scale:.2f} | {first:.3f} | {last:.3f} |", flush=True)


if __name__ == "__main__":
    main()
