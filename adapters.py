"""The model of §4, h(g(f(x; θp); θa); θh), and its three named sets of parameters.

f is an encoder that `AutoModel` loads, g an adapter after its last layer, h a linear head on words;
with another `pe`, θa is inside f. Nothing here knows of data sets or of training.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]  # a named part of `model.named_parameters()`


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

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """For a forward hook: bound methods are copied with their model, closures are not."""
        return self(output)


class Tagger(nn.Module):
    """An encoder, a head of `num_tags` classes, and what `pe` names as θa:

    adapter: one `Adapter` on top of the encoder, as in the paper. houlsby: one after the attention and
    one after the feed-forward block of every layer, before the skip connection (§4). bitfit: the biases
    of the encoder (Ben Zaken et al. 2022). lora: updates of the matrices for queries and values, scaled
    by 2 (Hu et al. 2022). None: nothing. Raises ValueError where the encoder has no such parts.

    The head starts as BERT's own do: normal with std 0.02, zero bias. The pooler of some encoders cannot
    affect the tag of a word: it is saved with the encoder, but is in no set and not counted.
    """

    def __init__(self, encoder: nn.Module, num_tags: int, pe: str | None = "adapter",
                 bottleneck: int = 64, bf16: bool = False):
        super().__init__()
        hidden, kind = encoder.config.hidden_size, encoder.config.model_type
        self.encoder, self.pe, self.bf16 = encoder, pe, bf16
        self.on_top = pe in (None, "adapter")  # θa, if there is any, comes after all of θp
        self.first_position = None  # of a sentence in a packed row; None: do not pack
        self.adapter = Adapter(hidden, bottleneck) if pe == "adapter" else nn.Identity()
        if pe == "houlsby":
            ends = ("output.dense", "out_lin", "lin2", "Wo", "attn.o")  # of a block, in BERT's kin
            blocks = [module for name, module in encoder.named_modules() if name.endswith(ends)]
            if len(blocks) != 2 * encoder.config.num_hidden_layers:
                raise ValueError(f"{kind} has not two blocks a layer that we know")
            self.adapters = nn.ModuleList(Adapter(hidden, bottleneck) for _ in blocks)
            for block, adapter in zip(blocks, self.adapters):
                block.register_forward_hook(adapter.hook)
        if pe == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            names = ["query", "value", "q_lin", "v_lin", "query_proj", "value_proj", "in_proj", "Wqkv"]
            config = LoraConfig(r=bottleneck, lora_alpha=2 * bottleneck, target_modules=names)
            inject_adapter_in_model(config, encoder)
            self.requires_grad_()  # peft freezes the rest
        self.head = nn.Linear(hidden, num_tags)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if pe and not self.sets()[1]:
            raise ValueError(f"{kind} has no parameters for {pe}")

    def sets(self) -> tuple[Parameters, Parameters, Parameters]:
        """θp, θa and θh: disjoint, and together the whole model but for the pooler."""
        theta = {n: p for n, p in self.named_parameters() if not n.startswith("encoder.pooler.")}
        theta_h = {n: theta.pop(n) for n in [*theta] if n.startswith("head.")}
        of_pe = {"bitfit": r".*bias$", "lora": r".*\.lora_"}.get(self.pe, r"adapters?\.")
        theta_a = {n: theta.pop(n) for n in [*theta] if re.match(of_pe, n)}
        return theta, theta_a, theta_h

    @torch.no_grad()
    def choose_packing(self, sentences: Sequence[Sentence]) -> None:
        """Packs from now on, if the shortest and longest of `sentences` have the features then that
        they have alone. Raises ValueError if even a padded row of its own changes those of one."""
        by_length = sorted(sentences, key=lambda sentence: len(sentence.pieces))
        probe = by_length[:2] + by_length[-1:]
        bf16, self.bf16 = self.bf16, False  # whose rounding would hide what we look for
        alone = torch.cat([self.encode([sentence])[0].features for sentence in probe])
        after_padding = (getattr(self.encoder.config, "pad_token_id", None) or 0) + 1  # RoBERTa's
        for self.first_position in (0, after_padding, None):
            try:
                packed = torch.cat([sentence.features for sentence in self.encode(probe)])
            except Exception:  # who takes no positions or no mask of pairs tells it in many ways
                continue
            if (packed - alone).norm() <= 1e-5 * alone.norm():
                self.bf16 = bf16
                return
        raise ValueError(f"{self.encoder.config.model_type} mixes the sentences of a batch")

    def encode(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """The sentences with their features. They share rows of the encoder's input, so that little
        is padding; each keeps its own positions and attends to itself alone."""
        device, dtype = self.head.weight.device, self.head.weight.dtype
        encoded = []
        for begin in range(0, len(sentences), 256):  # for memory
            part = sentences[begin : begin + 256]
            order = self.pack([len(sentence.pieces) for sentence in part])
            rows = [torch.tensor([(i, piece, place, place in part[i].first) for i in row
                                  for place, piece in enumerate(part[i].pieces)]) for row in order]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
            owner, pieces, places, is_first = padded.unbind(-1)
            where = {"attention_mask": (owner >= 0).long()}
            if self.first_position is not None:
                others = owner[:, None, :, None] != owner[:, None, None, :]  # [rows, 1, length, length]
                where["attention_mask"] = others.to(dtype) * torch.finfo(dtype).min
                where["position_ids"] = places.clamp(min=0) + self.first_position
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.encoder(pieces.clamp(min=0), **where).last_hidden_state.to(dtype)
            counts = [len(part[i].first) - part[i].first.count(-1) for row in order for i in row]
            features = dict(zip(sum(order, []), hidden[is_first == 1].split(counts)))
            encoded += [sentence._replace(features=features[i]) for i, sentence in enumerate(part)]
        return encoded

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Sentences' numbers in rows no longer than the longest: longest first, first fit."""
        room = max(lengths) if self.first_position is not None else 0
        rows = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            for row in rows:
                if sum(lengths[j] for j in row) + lengths[i] <= room:
                    row.append(i)
                    break
            else:
                rows.append([i])
        return rows

    def hoist(self, sets: Sequence[Sequence[Sentence]]) -> list[list[Sentence]]:
        """`encode` for several sets of sentences."""
        encoded = iter(self.encode([sentence for part in sets for sentence in part]))
        return [[next(encoded) for _ in part] for part in sets]

    def forward(self, sentences: Sequence[Sentence]) -> Tensor:
        """Scores of the tags, [words, num_tags], for sentences or for what `encode` made of them."""
        if sentences[0].features is None:
            sentences = self.encode(sentences)
        return self.head(self.adapter(torch.cat([sentence.features for sentence in sentences])))

    def save_encoder(self, folder: Path) -> None:
        """Writes what `AutoModel` reads: the encoder, LoRA's updates left out."""
        state = {n: p for n, p in self.encoder.state_dict().items() if ".lora_" not in n}
        state = {n.replace(".base_layer", ""): p for n, p in state.items()}
        self.encoder.save_pretrained(folder, state_dict=state)


def load_encoder(name: str, max_length: int) -> tuple[nn.Module, Any]:
    """f, in float32, and its fast tokenizer. Raises an error if f takes no `max_length` pieces."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # for words without one
    pieces = encoder.get_input_embeddings().num_embeddings
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= pieces:  # its files may be missing
        raise ValueError(f"the tokenizer has {len(tokenizer)} pieces, the encoder {pieces}")
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
    lost = [sentence.first.count(-1) for sentence in sentences if -1 in sentence.first]
    if lost:
        told = f"{sum(lost)} of {sum(map(len, texts))} words, in {len(lost)} of {len(texts)} sentences"
        print(f"cut off after --max-length {max_length}: {told}", file=sys.stderr)
    return sentences


def put(saved: dict[str, Tensor], parameters: Parameters) -> None:
    """Into the parameters of the same names; with others it raises ValueError."""
    if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in saved.items()}:
        raise ValueError("it holds other parameters than the model has")
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
