"""Tests the rule for α: the effect of an inner step depends on α‖f(x)‖², not on α alone.

    python benchmarks/feature_scale.py --model ENCODER --data WIKIANN --steps 100

Primes the same encoder with its features multiplied by a constant c, for several c and α, from the same
weights and on the same tasks. Prints the query loss per task, over the first and over the last ten meta
steps; it is nan if the run diverged. Where the rule holds, rows with the same α‖c f(x)‖² agree; where it does
not, rows with the same α do. The first row has α‖f(x)‖² of the encoder itself, for the paper's α and the mean
over the words of the first 100 English sentences. For that number alone, --steps 1 is enough.
"""

import copy
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import prime
import report

TYPES = ["PER", "ORG", "LOC"]
ROOT_10 = 10**0.5
SETTINGS = [  # c and α
    (1, 0.03), (1, 0.3), (ROOT_10, 0.03), (1 / ROOT_10, 0.3), (ROOT_10, 0.3), (1 / ROOT_10, 3)]


class ScaledTagger(adapters.Tagger):
    """A Tagger whose features are c f(x)."""

    scale = 1.0

    def encode_sets(self, sets):
        return [[sentence._replace(features=self.scale * sentence.features) for sentence in sentences]
                for sentences in super().encode_sets(sets)]


def measure(encoder, corpora, scale, alpha, *, steps, outer_lr, seed):
    """α‖c f(x)‖², and the query loss over the first and over the last ten meta steps."""
    torch.manual_seed(seed)
    model = ScaledTagger(copy.deepcopy(encoder), len(adapters.tag_names(TYPES))).eval()
    model.scale = scale
    with torch.no_grad():
        features = torch.cat([s.features for s in model.encode_sets([corpora[0][:100]])[0]])
    theta_p, theta_a, theta_h = model.split_parameters()
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, outer_lr, steps)
    batches = prime.sample_batches(corpora, steps=steps, tasks=2, support=16, query=16, seed=seed)
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=adapters.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_lr=alpha, encode=model.encode_sets)
    progress = tqdm(meta_training, f"c = {scale:g}, α = {alpha:g}", steps, disable=None)
    losses = [statistics.mean(query_losses) for query_losses in progress]
    effect = alpha * features.square().sum(-1).mean().item()
    return effect, statistics.mean(losses[:10]), statistics.mean(losses[-10:])


def main() -> None:
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="meta steps per row")
    add("--outer-lr", type=float, default=2e-4, help="β, AdamW's rate")
    add("--limit-train", type=int, default=5000, help="only the first N sentences of each language")
    add("--seed", type=int, default=0, help="seed of initialisation and sampling")
    args = parser.parse_args()
    encoder, tokenizer = adapters.load_encoder(args.model, 128)
    corpora = [
        adapters.load_sentences(
            args.data, language, "train", tokenizer, types=TYPES, max_length=128, limit=args.limit_train,
            min_sentences=32)
        for language in ("en", "es")]
    rows = []
    for scale, alpha in SETTINGS:
        effect, first, last = measure(
            encoder, corpora, scale, alpha, steps=args.steps, outer_lr=args.outer_lr, seed=args.seed)
        rows.append((f"{scale:.2f}", f"{alpha:g}", f"{effect:.2f}", f"{first:.3f}", f"{last:.3f}"))
    head = ["c", "α", "α‖c f(x)‖²", "query loss, first ten steps", "last ten"]
    print(report.markdown(head, rows))


if __name__ == "__main__":
    adapters.cli(main)
