"""The model of §4, h(g(f(x; θp); θa); θh), and the names of its three sets of parameters.

f is any encoder that `AutoModel` loads, g one adapter after its last layer, h a linear head on every word; in
the place of g, θa may be inside of f (`pe`). Nothing here knows of data or of training.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]  # a named part of `model.named_parameters()`


class Sentence(NamedTuple):
    """A tagged sentence in word pieces. A word that `--max-length` cuts off has a tag but no piece."""

    x: list[int] | Tensor  # the encoder's input, special tokens included; once encoded, [words, hidden]
    first: list[int]  # for every word that has one, the position in the input of its first piece
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

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The adapter as a forward hook; bound methods are copied with their model, closures are not."""
        return self(output)


class Tagger(nn.Module):
    """An encoder, a head of `num_tags` classes, and what `pe` names as θa:

    adapter: one `Adapter` on top of the encoder, as in the paper. houlsby: one after the attention and one
    after the feed-forward block of every layer, before the skip connection (§4; Houlsby et al. 2019).
    bitfit: the biases of the encoder (Ben Zaken et al. 2022). lora: updates of the matrices for queries and
    values, scaled by 2 (Hu et al. 2022). None: nothing. `bottleneck` is the width of the adapters and the
    rank of LoRA. Raises ValueError where the encoder has no parts that we know for it.

    The head starts as BERT's own do: normal with std 0.02, zero bias. The pooler that some encoders carry
    cannot affect the tag of a word: it is saved with the encoder, but is in no set and not counted.
    """

    def __init__(self, encoder: nn.Module, num_tags: int, pe: str | None = "adapter", bottleneck: int = 64,
                 bf16: bool = False):
        super().__init__()
        hidden = encoder.config.hidden_size
        self.encoder, self.pe, self.bf16 = encoder, pe, bf16
        self.on_top = pe in (None, "adapter")  # θa, if there is any, comes after all of θp
        after_padding = (getattr(encoder.config, "pad_token_id", None) or 0) + 1  # RoBERTa's way
        starts = {"bert": 0, "distilbert": 0, "roberta": after_padding, "xlm-roberta": after_padding}
        self.first_position = starts.get(encoder.config.model_type)  # None: not known, so we do not pack
        self.adapter = Adapter(hidden, bottleneck) if pe == "adapter" else nn.Identity()
        if pe == "houlsby":
            ends = ("output.dense", "out_lin", "lin2", "Wo", "attn.o")  # of a block, in the kin of BERT
            blocks = [module for name, module in encoder.named_modules() if name.endswith(ends)]
            if len(blocks) != 2 * encoder.config.num_hidden_layers:
                raise ValueError(f"{encoder.config.model_type} has not two blocks a layer that we know")
            self.adapters = nn.ModuleList(Adapter(hidden, bottleneck) for _ in blocks)
            for block, adapter in zip(blocks, self.adapters):
                block.register_forward_hook(adapter.hook)
        if pe == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            matrices = ["query", "value", "q_lin", "v_lin", "query_proj", "value_proj", "in_proj", "Wqkv"]
            config = LoraConfig(r=bottleneck, lora_alpha=2 * bottleneck, target_modules=matrices)
            inject_adapter_in_model(config, encoder)
            self.requires_grad_()  # peft freezes the rest
        self.head = nn.Linear(hidden, num_tags)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if pe == "bitfit" and not self.sets()[1]:
            raise ValueError(f"{encoder.config.model_type} has no biases")

    def sets(self) -> tuple[Parameters, Parameters, Parameters]:
        """θp, θa and θh: disjoint, and together the whole model but for the pooler."""
        theta = {n: p for n, p in self.named_parameters() if not n.startswith("encoder.pooler.")}
        theta_h = {n: theta.pop(n) for n in [*theta] if n.startswith("head.")}
        named = {"bitfit": r".*bias$", "lora": r".*\.lora_"}.get(self.pe, r"adapters?\.")
        theta_a = {n: theta.pop(n) for n in [*theta] if re.match(named, n)}
        return theta, theta_a, theta_h

    def save_encoder(self, folder: Path) -> None:
        """Writes what `AutoModel` reads: the encoder without what LoRA has added to it."""
        state = {n: p for n, p in self.encoder.state_dict().items() if ".lora_" not in n}
        state = {n.replace(".base_layer", ""): p for n, p in state.items()}
        self.encoder.save_pretrained(folder, state_dict=state)

    def encode(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """The sentences with f(x; θp) at the first piece of every word that has one in the place of x.

        Sentences share rows of the encoder's input, so that little of its work is padding. Each keeps its own
        positions and attends to itself alone: the result is that of a row a sentence.
        """
        if not 0 < len(sentences) <= 256:  # more would need much memory at once
            parts = (sentences[begin : begin + 256] for begin in range(0, len(sentences), 256))
            return [sentence for part in parts for sentence in self.encode(part)]
        rows = self.pack([len(sentence.x) for sentence in sentences])
        device, dtype = self.head.weight.device, self.head.weight.dtype

        def grid(values: Callable[[int], Iterable[int]], padding: int = 0) -> Tensor:
            """A value for every piece, [rows, length of the longest row]."""
            filled = [torch.tensor([value for i in row for value in values(i)]) for row in rows]
            return nn.utils.rnn.pad_sequence(filled, batch_first=True, padding_value=padding).to(device)

        owner = grid(lambda i: [i] * len(sentences[i].x), -1)
        where = {"attention_mask": owner >= 0}
        if self.first_position is not None:
            others = owner[:, None, :, None] != owner[:, None, None, :]  # [rows, 1, length, length]
            where["attention_mask"] = torch.finfo(dtype).min * others.to(dtype)
            where["position_ids"] = grid(lambda i: range(len(sentences[i].x))) + self.first_position
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(grid(lambda i: sentences[i].x), **where).last_hidden_state.to(dtype)
        first = grid(lambda i: [place in sentences[i].first for place in range(len(sentences[i].x))]).bool()
        order = [i for row in rows for i in row]
        features = dict(zip(order, hidden[first].split([len(sentences[i].first) for i in order])))
        return [sentence._replace(x=features[i]) for i, sentence in enumerate(sentences)]

    def pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of sentences in rows no longer than the longest sentence: longest first, first fit."""
        room = max(lengths) if self.first_position is not None else 0
        rows: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fitting = (row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= room)
            if (row := next(fitting, None)) is None:
                rows.append(row := [])
            row.append(i)
        return rows

    def hoist(self, sets: Sequence[Sequence[Sentence]]) -> list[list[Sentence]]:
        """What `encode` makes of several sets of sentences, in one go."""
        encoded = iter(self.encode([sentence for part in sets for sentence in part]))
        return [[next(encoded) for _ in part] for part in sets]

    def forward(self, sentences: Sequence[Sentence]) -> Tensor:
        """Scores of the tags, [words, num_tags], for sentences or for what `encode` made of them."""
        encoded = sentences if isinstance(sentences[0].x, Tensor) else self.encode(sentences)
        return self.head(self.adapter(torch.cat([sentence.x for sentence in encoded])))


def load_encoder(name: str, max_length: int, device: str) -> tuple[nn.Module, Any]:
    """f, in float32, and its fast tokenizer. Raises ValueError if they do not take `max_length` pieces."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32).to(device)
    if type(encoder.config) not in MODEL_FOR_MASKED_LM_MAPPING or encoder.config.is_encoder_decoder:
        raise ValueError(f"{encoder.config.model_type} is no encoder")
    tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # for words without one
    pieces = encoder.get_input_embeddings().num_embeddings
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= pieces:  # without its files it has no pieces
        raise ValueError(f"the tokenizer has {len(tokenizer)} pieces, the encoder {pieces}")
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", max_length))
    if not tokenizer.num_special_tokens_to_add() < max_length <= longest:
        raise ValueError(f"a sentence takes up to {longest} pieces, special tokens among them")
    return encoder, tokenizer


def load_parameters(parameters: Parameters, path: Path) -> None:
    """Reads safetensors into the parameters of the same names; with others it raises ValueError."""
    from safetensors.torch import load_file

    saved = load_file(path)
    if {n: p.shape for n, p in parameters.items()} != {n: p.shape for n, p in saved.items()}:
        raise ValueError(f"{path}: holds other parameters than the model has")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
