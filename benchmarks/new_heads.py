"""Algorithm 1 with a new random head for each meta step, in the place of line 9's θh = θ1_h.

    python benchmarks/new_heads.py --model ENCODER --data WIKIANN --output primed-new-heads

Fine-tuning starts from a random head (§3.2); this makes each inner loop start from one too. All else, flags
included, is prime.py.
"""

import sys
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prime

algorithm_1 = prime.prime


def with_new_heads(model, *, theta_h, **settings):
    if not theta_h:
        raise prime.BadInput("--method ft has no inner loop, and so no new heads")
    for query_losses in algorithm_1(model, theta_h=theta_h, **settings):
        nn.init.normal_(theta_h["head.weight"], std=0.02)  # as `Tagger` draws it
        nn.init.zeros_(theta_h["head.bias"])
        yield query_losses


if __name__ == "__main__":
    prime.prime, identify = with_new_heads, prime.identify
    prime.identify = lambda *given: f"new heads {identify(*given)}"
    prime.run(prime.main)
