"""The model of §4, h(g(f(x; θp); θa); θh), its input, and what both commands share."""

import argparse
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MODEL_DEFAULTS = {"model": "bert-base-multilingual-cased", "pe": "adapter", "bottleneck": None,
                  "types": ["PER", "ORG", "LOC"]}
ParameterSets = NamedTuple("ParameterSets", [("p", dict), ("a", dict), ("h", dict)])

class Sentence(NamedTuple):
    words: list[str]
    tags: list[int]
    input_ids: list[int]  # word pieces, with special tokens
    word_starts: list[int]  # position of each word's first piece, -1 if it was cut off
    features: Tensor | None = None  # f(x; θp) at words that are not cut off, [words, hidden]

class Adapter(nn.Module):
    """Houlsby et al. 2019, §2.1: a bottleneck with a skip connection. It starts near the identity:
    weights normal with std 1e-2, truncated at two std; biases zero."""
    def __init__(self, hidden: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))

class Tagger(nn.Module):
    """f, an encoder of `AutoModel`, with g and h. θa is, by §3.1, new parameters ("adapter": g on
    top; "lora": inside f), a small subset of f's ("bitfit": its biases, Ben Zaken et al. 2022) or
    nothing (None). The head starts as BERT's own heads do: normal with std 0.02, zero bias."""
    def __init__(self, encoder: nn.Module, num_tags: int, pe="adapter", bottleneck=None, bf16=False):
        super().__init__()
        config = encoder.config
        self.pe, self.bf16 = pe, bf16
        self.bottleneck = bottleneck or (8 if pe == "lora" else 64)
        self.encoder = add_lora(encoder, self.bottleneck) if pe == "lora" else encoder
        # to save padding, encoder_inputs packs several sentences into a row. The encoder must take
        # position ids and a mask [rows, 1, length, length], and have no causal mask of its own
        self.packs = config.model_type in ("bert", "roberta", "xlm-roberta") and not config.is_decoder
        self.adapter = Adapter(config.hidden_size, self.bottleneck) if pe == "adapter" else nn.Identity()
        self.head = nn.Linear(config.hidden_size, num_tags)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        expect(not pe or self.split_parameters().a, f"--pe {pe}: the encoder has no such parameters")

    def split_parameters(self) -> ParameterSets:
        """θp, θa and θh: disjoint. BERT's pooler, which no tag depends on, is in none of them."""
        theta_p = {n: p for n, p in self.named_parameters() if ".pooler." not in n}
        theta_h = {n: theta_p.pop(n) for n in [*theta_p] if n.startswith("head.")}
        pattern = {"adapter": r"^adapter\.", "bitfit": r"bias$", "lora": r"\.lora_"}.get(self.pe)
        theta_a = {n: theta_p.pop(n) for n in [*theta_p] if pattern and re.search(pattern, n)}
        return ParameterSets(theta_p, theta_a, theta_h)

    def encoder_inputs(self, sentences: list[Sentence]) -> tuple[dict, tuple]:
        """Packs sentences into rows. Returns the encoder's arguments and two tensors [rows, length]:
        the number of the sentence at each position (0: padding) and whether a word starts there."""
        dtype, config = self.head.weight.dtype, self.encoder.config
        capacity = 2 * max(len(s.input_ids) for s in sentences) if self.packs else 0  # 0: one per row
        # pack gives four numbers for each position: rows are [rows, length, 4] here
        rows = nn.utils.rnn.pad_sequence(pack(sentences, capacity), batch_first=True)
        sentence_ids, input_ids, positions, starts = rows.to(self.head.weight.device).unbind(-1)
        inputs = {"input_ids": input_ids, "attention_mask": (sentence_ids > 0).long()}
        if self.packs:  # positions restart in each sentence, which attends to itself only
            other_sentence = sentence_ids[:, None, :, None] != sentence_ids[:, None, None, :]
            inputs["attention_mask"] = other_sentence.to(dtype) * torch.finfo(dtype).min
            first_position = 0 if config.model_type == "bert" else config.pad_token_id + 1
            inputs["position_ids"] = positions + first_position
        return inputs, (sentence_ids, starts == 1)

    def encode_sets(self, sets: list[list[Sentence]]) -> list[list[Sentence]]:
        """The same sets of sentences, with their features."""
        encoded, sentences = [], [s for part in sets for s in part]
        for start in range(0, len(sentences), 256):  # bounds memory
            chunk = sentences[start : start + 256]
            inputs, layout = self.encoder_inputs(chunk)
            with torch.autocast(layout[0].device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.encoder(**inputs).last_hidden_state  # [rows, length, hidden]
            features = unpack(hidden.to(self.head.weight.dtype), *layout)
            encoded += [s._replace(features=f) for s, f in zip(chunk, features)]
        remaining = iter(encoded)
        return [[next(remaining) for _ in part] for part in sets]

    def forward(self, sentences: list[Sentence]) -> Tensor:
        """Logits of the words that are not cut off, [words, num_tags]. Encodes if necessary."""
        if sentences[0].features is None:
            (sentences,) = self.encode_sets([sentences])
        return self.head(self.adapter(torch.cat([s.features for s in sentences])))

def add_lora(encoder: nn.Module, rank: int) -> nn.Module:
    """The encoder with LoRA (Hu et al. 2022, by peft), scaled by 2, on the layers that peft has for
    its architecture, or else on all linear layers but the pooler's. No parameter is frozen."""
    linear = [n for n, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    with error_context("--pe lora (pip install peft)"):
        import peft
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        layers = known.get(encoder.config.model_type) or [n for n in linear if "pooler" not in n]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
        return peft.get_peft_model(encoder, config).requires_grad_()

def pack(sentences: list[Sentence], capacity: int) -> list[Tensor]:
    """Rows [length, 4]: sentence number, input id, position in its sentence, whether a word starts.
    A sentence goes to the first row with room for it, or to a row of its own if `capacity` is 0."""
    rows = [[] for _ in sentences]
    for number, sentence in enumerate(sentences, start=1):
        length, starts = len(sentence.input_ids), {*sentence.word_starts}
        row = next(row for row in rows if not row or len(row) + length <= capacity)
        row += [(number, piece, k, k in starts) for k, piece in enumerate(sentence.input_ids)]
    return [torch.tensor(row) for row in rows if row]

def unpack(hidden: Tensor, sentence_ids: Tensor, is_word_start: Tensor) -> list[Tensor]:
    """The features of each sentence, [words, hidden], from hidden states [rows, length, hidden]."""
    features, sentence_of_word = hidden[is_word_start], sentence_ids[is_word_start]
    return [features[sentence_of_word == n] for n in range(1, sentence_ids.max() + 1)]

def tag_loss(model: nn.Module, sentences: list[Sentence]) -> Tensor:
    """L_Ti: the mean cross-entropy over the words that are not cut off."""
    logits = model(sentences)
    tags = [tag for s in sentences for start, tag in zip(s.word_starts, s.tags) if start >= 0]
    return nn.functional.cross_entropy(logits, torch.tensor(tags, device=logits.device))

def build_tagger(encoder, types, pe, bottleneck, device, bf16=False) -> Tagger:
    """A Tagger in eval mode on a device."""
    model = Tagger(encoder, len(tag_names(types)), pe, bottleneck, bf16).eval()
    with error_context(f"--device {device}"):
        model.to(device)
    return model

def load_encoder(name: str, max_length: int) -> tuple[nn.Module, Any]:
    """f in float32, and its tokenizer. Raises UserError if they do not load or do not fit."""
    from transformers import AutoModel, AutoTokenizer, logging
    # hides the report on missing and unexpected weights, which `faults` checks below instead
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with error_context(f"--model {name} (offline, give a folder)"):
        encoder, info = AutoModel.from_pretrained(name, dtype=torch.float, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)  # for BPE
        tokenizer("word").word_ids()  # raises for slow tokenizers
    config = encoder.config
    faults = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    # unexpected weights of a head are harmless, but not those of a surplus layer. If config.json
    # has num_hidden_layers = 12, layers are 0 to 11, and ".12." in a name shows that there are more
    faults += [key for key in info["unexpected_keys"] if f".{config.num_hidden_layers}." in key]
    expect(not faults, f"--model {name}: config.json and weights do not fit: {faults[:1]}")
    ignore_mask = ("fnet", "convbert", "nystromformer", "yoso")
    expect(config.model_type not in ignore_mask, f"--model {name}: padding changes its features")
    expect(not config.is_encoder_decoder, f"--model {name} has a decoder: take an encoder")
    pieces, known = len(tokenizer), encoder.get_input_embeddings().num_embeddings
    expect(pieces > len(tokenizer.all_special_ids), f"--model {name} has no vocabulary file")
    expect(pieces <= known, f"--model {name}: {pieces} word pieces, but the encoder has {known}")
    special = tokenizer.num_special_tokens_to_add()
    expect(max_length > special, f"--max-length must be above the {special} special tokens")
    limit = getattr(config, "max_position_embeddings", "unlimited")
    # a trial run with the greatest length and the last word piece
    with error_context(f"--max-length {max_length}: the encoder has {limit} positions"):
        encoder(torch.full((1, max_length), pieces - 1), attention_mask=torch.ones(1, max_length))
    return encoder, tokenizer

def tag_names(types: list[str]) -> list[str]:
    return ["O"] + [f"{position}-{name}" for name in types for position in "BI"]

def load_sentences(data, language, split, tokenizer, types, max_length, limit=None, min_sentences=1):
    """Tokenizes a split's first `limit` sentences; drops training sentences with no word left."""
    sentences = tokenize(read_split(data, language, split, types)[:limit], tokenizer, max_length)
    sentences = [s for s in sentences if split != "train" or max(s.word_starts) >= 0]
    found = f"{len(sentences)} sentences, {min_sentences} are needed"
    expect(len(sentences) >= min_sentences, f"--data {data}, {language} {split}: {found}")
    return sentences

def tokenize(sentences: list[tuple], tokenizer: Any, max_length: int) -> list[Sentence]:
    """Words and tags with word pieces, truncated to `max_length`, which is reported on stderr."""
    texts, tokenized = [words for words, _ in sentences], []
    encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
    for i, (words, tags) in enumerate(sentences):
        word_ids = encoded.word_ids(i)  # of each piece
        starts = [word_ids.index(word) if word in word_ids else -1 for word in range(len(words))]
        tokenized.append(Sentence(words, tags, encoded["input_ids"][i], starts))
    if truncated := sum(s.word_starts.count(-1) for s in tokenized):
        message = f"have no word piece within --max-length {max_length}: not in the loss, scored as O"
        print(f"{truncated} of {sum(map(len, texts))} words {message}", file=sys.stderr)
    return tokenized

def read_split(data: str, language: str, split: str, types: list[str]) -> list[tuple]:
    """Words and tag numbers of each sentence. `data` is a hub name, or a folder with
    `LANG/train.txt` and so on. Raises UserError with file and line."""
    expect(re.fullmatch(r"\w[\w.-]*", language), f"{language!r} is not a language code, such as hi")
    folder, tags = Path(data) / language, tag_names(types)
    file, sentences = folder / f"{split}.txt", [[]]
    # a local `data` must hold the file; the error lists the deepest folder that exists
    root = folder if folder.is_dir() else Path(data)
    if root.is_dir() and not file.exists():
        raise UserError(f"expected {file}, found in {root}: {sorted(os.listdir(root))}")
    lines = read_text(file) if file.exists() else read_hub(data, language, split)
    for location, word, tag in lines:
        if word == tag == "":
            sentences.append([])
            continue
        expected = f"expected word and tag, one of {' '.join(tags)} (--types)"
        expect(word and tag in tags, f"{location}: {expected}, found {word!r:.80} {tag!r:.80}")
        sentences[-1].append((word, tags.index(tag)))
    expect(any(sentences), f"{folder}: the {split} split is empty")
    return [([word for word, _ in s], [tag for _, tag in s]) for s in sentences if s]

def read_text(file: Path) -> Iterator[tuple]:
    """Location, word (first column) and tag (last) of each line, "" if blank. Splits at tabs if any."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    separator = "\t" if b"\t" in data else " "
    for number, line in enumerate(data.splitlines(), start=1):
        with error_context(f"{file}:{number}: expected UTF-8"):
            text = re.sub("^-DOCSTART-.*", "", line.decode().rstrip(" \t"))  # as if blank
        word, *columns = text.split(separator)
        yield f"{file}:{number}", word, columns[-1] if columns else ""

def read_hub(data: str, language: str, split: str) -> Iterator[tuple]:
    """The same from the hub. Tags without names stay numbers, which `read_split` refuses."""
    from datasets import load_dataset
    with error_context(f"--data {data}, {language} {split}: expected tokens, ner_tags"):
        hub = load_dataset(data, language, split=split).select_columns(["tokens", "ner_tags"])
        rows = [list(zip(words, tags, strict=True)) for words, tags in zip(hub["tokens"], hub["ner_tags"])]
    label = getattr(hub.features["ner_tags"], "feature", None)
    names = dict(enumerate(getattr(label, "names", [])))
    for number, row in enumerate(rows, start=1):
        for word, tag in [*row, ("", "")]:
            yield f"{data}, {language} {split} row {number}", word, names.get(tag, tag)

class UserError(ValueError):
    """Bad input: one line that says what was expected, what was found and what to do."""

def expect(condition: Any, message: str) -> None:
    if not condition:
        raise UserError(message)

@contextmanager
def error_context(source: str) -> Iterator[None]:
    """Re-raises an exception of a library, called in the block, as UserError, with `source`."""
    try:
        yield
    except Exception as error:
        message = f"{source}: {type(error).__name__}: {error}"
        raise UserError(" ".join(message.split())[:600]) from error

@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` on success and deleted on failure."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with error_context(f"writing {path}"):
        try:
            yield new
            # `new` may be gone: if another process with the same command finishes first, save_primed
            # deletes all *.new files. The output is then complete: this is no error
            with suppress(FileNotFoundError):
                new.replace(path)
        finally:
            new.unlink(missing_ok=True)

def find_run_or_claim(folder: Path, settings: dict, record_name: str) -> dict | None:
    """The record of a finished run, or None if the run is still to be done; settings.json marks the
    folder as this run's. Raises UserError if the folder holds another run or other files."""
    path, record_file = folder / "settings.json", folder / record_name
    folder.mkdir(parents=True, exist_ok=True)
    expect(not any(folder.iterdir()) or path.exists(), f"{folder} holds other files: choose another")
    try:
        with open(path, "x") as file:
            file.write(json.dumps(settings, indent=2))
    except FileExistsError:
        # another process may have created settings.json just now, and still be writing it
        time.sleep(0.1)
        read_record(path, settings)  # raises if they differ
    return read_record(record_file, check_weights=True) if record_file.exists() else None

def read_record(path: Path, settings: dict | None = None, check_weights: bool = False) -> dict:
    """Reads a JSON file that describes a run. Raises UserError if a value in it differs from
    `settings` or, with `check_weights`, if the weights beside it do not match its checksums."""
    with error_context(f"{path}: expected a run's record"):
        record = dict(json.loads(path.read_bytes()))
        match = not check_weights or record["files"] == file_checksums(path.parent)
    expect(match, f"{path.parent}: a weights file is missing or not as in {path.name}")
    for name, now in (settings or {}).items():
        found = f"holds a run with {name.replace('_', '-')} {record.get(name)} (now {now})"
        expect(record.get(name) == now, f"{path.parent} {found}: choose another folder")
    return record

def fingerprint(encoder: nn.Module, sentences: Any = None) -> dict:
    """Checksums of the encoder's weights and configuration, and of sentences if there are any."""
    ignored = ("transformers_version", "_name_or_path", "dtype", "architectures")
    config = [item for item in encoder.config.to_dict().items() if item[0] not in ignored]
    weights = [zlib.crc32(p.detach().cpu().numpy()) for p in encoder.parameters()]
    parts = {"weights": weights, "configuration": sorted(config), "sentences": sentences}
    return {name: zlib.crc32(repr(part).encode()) for name, part in parts.items() if part}

def file_checksums(folder: Path) -> dict:
    return {file.name: zlib.crc32(file.read_bytes()) for file in folder.glob("*.safetensors")}

def write_record(path: Path, record: dict) -> None:
    with atomic_write(path) as new:
        new.write_text(json.dumps(record, indent=2, default=str))

def load_checkpoint(path: Path, device: str, stateful: tuple) -> list[float]:
    """Restores an interrupted run of prime.py; returns the losses of its meta steps so far."""
    if not path.exists():
        return []
    with error_context(f"{path}: expected a checkpoint of this run; delete it to start again"):
        losses, states = torch.load(path, device, weights_only=True)
        for part, state in zip(stateful, states, strict=True):
            part.load_state_dict(state)
    return losses

def save_primed(folder: Path, model: Tagger, tokenizer: Any, record: dict, losses: list) -> None:
    """Writes θa*, then θp* as `AutoModel` loads it, and last priming.json: it marks completion."""
    with error_context(f"writing {folder}"):
        tokenizer.save_pretrained(folder)
        save_file(model.split_parameters().a, folder / "adapter.safetensors")
        if model.pe == "lora":  # θa in peft's format too
            model.encoder.peft_config["default"].base_model_name_or_path = str(folder)
            model.encoder.save_pretrained(folder / "lora", save_embedding_layers=False)
            model.encoder = model.encoder.unload()
        model.encoder.save_pretrained(folder)
    more = {"files": file_checksums(folder), "last_losses": losses[-10:]}
    write_record(folder / "priming.json", record | more)
    for path in [folder / "checkpoint.pt", *folder.glob("*.new")]:
        path.unlink(missing_ok=True)

def cli(main: Callable[[], None]) -> None:
    """Runs a command. Bad input ends it with one line on stderr and exit status 2."""
    # a terminal whose encoding has no θ shows ? instead of an error
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        # KeyboardInterrupt has no text
        message = " ".join(str(error).split()) or "interrupted; checkpoints and results are kept"
        argparse.ArgumentParser().exit(2, f"{Path(sys.argv[0]).name}: {message}\n")

def common_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # an unset flag is not in args: prime.py sets MODEL_DEFAULTS, finetune.py the primed values
    add, unset = parser.add_argument, argparse.SUPPRESS
    add("--model", default=unset, help="encoder: hub name or folder")
    add("--data", default="unimelb-nlp/wikiann", help="labelled sentences: hub name or folder")
    add("--types", default=unset, nargs="+", help="entity types, tagged B-X and I-X")
    add("--pe", default=unset, choices=["adapter", "bitfit", "lora"], help="PE method: what θa is")
    add("--bottleneck", default=unset, type=positive(int), help="width of adapter (64), rank of LoRA (8)")
    add("--max-length", type=positive(int), default=128, help="word pieces per sentence")
    add("--limit-train", type=positive(int), help="only the first N training sentences")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--bf16", action="store_true", help="run the encoder in bfloat16")
    return parser

def positive(kind: type, zero: bool = False) -> Callable:
    """A type for argparse: a positive, finite number, or with `zero` also 0."""
    def number(text: str) -> Any:
        value = kind(text)
        if 0 < value < 2**63 or zero and value == 0:
            return value
        raise argparse.ArgumentTypeError(f"{text} is out of range")
    return number
