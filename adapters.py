"""The model of §4, h(g(f(x; θp); θa); θh), and its three named sets of parameters.

f: an encoder of `AutoModel`; g: an adapter on top, or else θa is a part of f; h: a linear head on words."""

import sys
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor, nn


class Sentence(NamedTuple):
    words: list[str]
    tags: list[int]
    pieces: list[int]  # special tokens included
    first: list[int]  # of each word, the position of its first piece; -1 if it has none
    features: Tensor | None = None  # f(x; θp) of the words that have a piece, [words, hidden]


class Adapter(nn.Module):
    """Houlsby et al. 2019, §2.1: down-projection, non-linearity, up-projection, skip connection.
    It starts near the identity: weights normal with std 1e-2, truncated at two std, biases zero."""

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
    """An encoder, a head of `num_tags` classes, and θa as §3.1 has it: additional parameters (`pe` is
    "adapter": on top), a small subset of the encoder's ("bitfit": its biases, Ben Zaken et al. 2022),
    or none (None). The head starts as BERT's own do: normal with std 0.02, zero bias. A pooler
    cannot affect the tag of a word: it is saved with the encoder, but is in no set and not counted."""

    def __init__(self, encoder: nn.Module, num_tags: int, pe: str | None = "adapter", bottleneck: int = 64):
        super().__init__()
        hidden = encoder.config.hidden_size
        self.encoder, self.pe, self.bf16 = encoder, pe, False
        self.first_position = None  # of a sentence in a packed row; None: do not pack
        self.adapter = Adapter(hidden, bottleneck) if pe == "adapter" else nn.Identity()
        self.head = nn.Linear(hidden, num_tags)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if pe and not self.sets()[1]:
            raise ValueError(f"{encoder.config.model_type} has no part for {pe}")

    def sets(self) -> tuple[dict[str, nn.Parameter], ...]:
        """θp, θa and θh: disjoint, and together the whole model but for the pooler."""
        theta = {n: p for n, p in self.named_parameters() if not n.startswith("encoder.pooler.")}
        theta_h = {n: theta.pop(n) for n in [*theta] if n.startswith("head.")}
        pattern = "*bias" if self.pe == "bitfit" else "adapter.*"
        theta_a = {n: theta.pop(n) for n in [*theta] if fnmatch(n, pattern)}
        return theta, theta_a, theta_h

    @torch.no_grad()
    def choose_packing(self, sentences: Sequence[Sentence]) -> None:
        """From now on packs, if packed the shortest and the longest of `sentences` keep the features
        that they have alone. Raises ValueError if even a batch of them, padded, changes those."""
        probe = [choose(sentences, key=lambda s: len(s.pieces)) for choose in (min, max)]
        alone = torch.cat([self.encode([s])[0].features for s in probe])
        after_padding = (getattr(self.encoder.config, "pad_token_id", None) or 0) + 1  # RoBERTa's
        for self.first_position in (0, after_padding, None):
            with suppress(Exception):  # some encoders refuse it
                packed = torch.cat([s.features for s in self.encode(probe)])
                if (packed - alone).norm() <= 1e-5 * alone.norm():
                    return
        raise ValueError(f"{self.encoder.config.model_type} mixes the sentences of a batch")

    def encode(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """The sentences with their features. They share rows of the encoder's input, so that little
        is padding; each keeps its own positions and attends to itself alone."""
        device, dtype = self.head.weight.device, self.head.weight.dtype
        encoded = []
        for part in (sentences[k : k + 256] for k in range(0, len(sentences), 256)):  # for memory
            room = 2 * max(len(s.pieces) for s in part) if self.first_position is not None else 0
            rows = []
            for i, s in enumerate(part):
                row = next((row for row in rows if len(row) + len(s.pieces) <= room), [])
                if not row:
                    rows.append(row)
                row += [(i, piece, at, at in s.first) for at, piece in enumerate(s.pieces)]
            padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -1).to(device)
            owner, pieces, positions, is_first = padded.unbind(-1)  # [rows, length]
            where = {"attention_mask": (owner >= 0).long()}
            if self.first_position is not None:
                apart = owner[:, None, :, None] != owner[:, None, None, :]  # [rows, 1, length, length]
                where["attention_mask"] = apart.to(dtype) * torch.finfo(dtype).min
                where["position_ids"] = positions.clamp(min=0) + self.first_position
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.encoder(pieces.clamp(min=0), **where).last_hidden_state.to(dtype)
            in_order = owner[is_first == 1].argsort(stable=True)
            counts = [len(s.first) - s.first.count(-1) for s in part]
            features = iter(hidden[is_first == 1][in_order].split(counts))
            encoded += [s._replace(features=next(features)) for s in part]
        return encoded

    def encode_sets(self, sets: Sequence[Sequence[Sentence]]) -> list[list[Sentence]]:
        """`encode` for several sets of sentences."""
        encoded = iter(self.encode(sum(map(list, sets), [])))
        return [[next(encoded) for _ in part] for part in sets]

    def forward(self, sentences: Sequence[Sentence]) -> Tensor:
        """Scores of the tags, [words, num_tags], for sentences or for what `encode` made of them."""
        if sentences[0].features is None:
            sentences = self.encode(sentences)
        return self.head(self.adapter(torch.cat([s.features for s in sentences])))


def load_encoder(name: str, max_length: int) -> tuple[nn.Module, Any]:
    """f, in float32, and its fast tokenizer. Raises an error if f takes no `max_length` pieces."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # for words without one
    pieces = encoder.get_input_embeddings().num_embeddings
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= pieces:  # its files may be missing
        raise ValueError(f"a tokenizer of {len(tokenizer)} pieces, an encoder of {pieces}")
    encoder(torch.full((1, max_length), len(tokenizer) - 1))
    return encoder, tokenizer


def tokenize(rows: Sequence[tuple], tokenizer: Any, max_length: int) -> list[Sentence]:
    """Words and tags with word pieces, cut off after `max_length`, which is told on stderr."""
    texts = [words for words, _ in rows]
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    sentences = []
    for i, (words, tags) in enumerate(rows):
        of = encoded.word_ids(i)  # the word of each piece
        first = [of.index(word) if word in of else -1 for word in range(len(words))]
        sentences.append(Sentence(words, tags, encoded["input_ids"][i], first))
    lost = [s.first.count(-1) for s in sentences if -1 in s.first]
    if lost:
        told = f"{sum(lost)} of {sum(map(len, texts))} words, in {len(lost)} of {len(texts)} sentences"
        print(f"no piece within --max-length {max_length}: {told}", file=sys.stderr)
    return sentences
