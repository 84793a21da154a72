"""The model of §4, h(g(f(x; θp); θa); θh), and the names of its three sets of parameters.

f is any encoder that `AutoModel` loads, g one adapter after its last layer, h a linear head on every word.
Nothing here knows of data or of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]  # a named part of `model.named_parameters()`


class Sentence(NamedTuple):
    """A tagged sentence in word pieces. A word that `--max-length` cuts off has a tag but no piece."""

    ids: list[int]  # the encoder's input, special tokens included
    first: list[int]  # for every word that has one, the position in `ids` of its first piece
    words: list[int]  # ... and the number of that word in the sentence
    tags: list[int]  # the gold tag of every word, also of those cut off


class Adapter(nn.Module):
    """Houlsby et al. 2019, §2.1: down-projection, non-linearity, up-projection, skip connection.

    It starts near the identity: weights normal with std 1e-2, truncated at two std, biases zero.
    Maps [..., hidden] to [..., hidden] and adds 2 · hidden · bottleneck + hidden + bottleneck parameters.
    """

    def __init__(self, hidden: int, bottleneck: int = 64):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


class Tagger(nn.Module):
    """An encoder, an adapter on top of it (none if `bottleneck` is 0) and a head of `num_tags` classes.

    The head starts as BERT's own do: normal with std 0.02, zero bias. The pooler that some encoders carry
    cannot affect the tag of a word: it is saved with the encoder, but is in no set and not counted.
    """

    def __init__(self, encoder: nn.Module, num_tags: int, bottleneck: int = 64):
        super().__init__()
        hidden = encoder.config.hidden_size
        self.encoder = encoder
        self.adapter = Adapter(hidden, bottleneck) if bottleneck else nn.Identity()
        self.head = nn.Linear(hidden, num_tags)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def sets(self) -> tuple[Parameters, Parameters, Parameters]:
        """θp, θa and θh: disjoint, and together the whole model but for the pooler."""
        theta = {n: p for n, p in self.named_parameters() if not n.startswith("encoder.pooler.")}
        parts = ("encoder.", "adapter.", "head.")
        return tuple({n: p for n, p in theta.items() if n.startswith(part)} for part in parts)

    def encode(self, sentences: Sequence[Sentence]) -> list[Tensor]:
        """f(x; θp) of each sentence at the first piece of every word that has one, [words, hidden].

        Sentences of like length go through the encoder together, so that little of its work is padding; all
        share one look-up in the word embeddings, so that its dense gradient is built once.
        """
        device = self.head.weight.device
        lengths = [len(sentence.ids) for sentence in sentences]
        order = sorted(range(len(sentences)), key=lengths.__getitem__)
        ids = torch.tensor([piece for i in order for piece in sentences[i].ids], device=device)
        embedded = self.encoder.get_input_embeddings()(ids).split([lengths[i] for i in order])
        features, done = [], 0
        while done < len(order):
            # Up to 64 sentences, none more than 1.3 times as long as the shortest.
            chunk = [i for i in order[done : done + 64] if lengths[i] <= 1.3 * lengths[order[done]]]
            x = nn.utils.rnn.pad_sequence(embedded[done : done + len(chunk)], batch_first=True)
            mask = torch.arange(x.shape[1]) < torch.tensor([lengths[i] for i in chunk]).unsqueeze(1)
            hidden = self.encoder(inputs_embeds=x, attention_mask=mask.to(device)).last_hidden_state
            rows = [row for row, i in enumerate(chunk) for _ in sentences[i].first]
            columns = [column for i in chunk for column in sentences[i].first]
            features.append(hidden[rows, columns])  # of [chunk, length, hidden], the [words, hidden] wanted
            done += len(chunk)
        parts = torch.cat(features).split([len(sentences[i].first) for i in order])
        return [part for _, part in sorted(zip(order, parts), key=lambda pair: pair[0])]  # as they came

    def forward(self, x: Sequence[Sentence] | Sequence[Tensor]) -> Tensor:
        """Scores of the tags, [words, num_tags], for sentences or for what `encode` made of them."""
        features = self.encode(x) if isinstance(x[0], Sentence) else x
        return self.head(self.adapter(torch.cat(list(features))))


def load_encoder(name: str, max_length: int, device: str) -> tuple[nn.Module, Any]:
    """f, in float32, and its fast tokenizer. Raises ValueError if they do not take `max_length` pieces."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # for words without one
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", max_length))
    if not tokenizer.num_special_tokens_to_add() < max_length <= longest:
        raise ValueError(f"a sentence takes up to {longest} pieces, special tokens among them")
    if not tokenizer.is_fast:
        raise ValueError("only a fast tokenizer tells which word a piece is of")
    return encoder, tokenizer


def save_parameters(parameters: Parameters, path: Path) -> None:
    """Writes a set of parameters as safetensors, under the names they have in the model."""
    from safetensors.torch import save_file

    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, path)


def load_parameters(parameters: Parameters, path: Path) -> None:
    """Reads what `save_parameters` wrote into `parameters`. Raises ValueError if names or shapes differ."""
    from safetensors.torch import load_file

    saved = load_file(path)
    if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in saved.items()}:
        raise ValueError(f"{path}: holds other parameters than the model has")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
