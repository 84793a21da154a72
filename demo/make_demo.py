"""Write the demo's data and its tiny encoder: run `python demo/make_demo.py` from the repository root.

    demo/wikiann/<language>/{train,validation,test}.txt   sentences with person, organisation, place tags
    demo/encoder/                                         a small BERT, made to tell what country a text is about

Every sentence is generated from the frames and the name lists in `demo_languages.py`, which were written for this
project; they are grammatical, not true. Each language mentions names of all others; Hindi, in its own script, those of
English and Spanish. No name of a target's training split is in its validation or test split. The sources have them all.

The encoder has never seen a tag. Like multilingual sentence encoders, it has first learnt words and their translations
(masked words in sentences, half of them beside their translation), and then that texts on one subject are alike, in
whatever language: the means of its last layer, for sentences about the same country. Names of people, firms
and cities of that country are all alike there, and so are the words between them.
"""

import random
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import demo_languages as words
from demo_languages import LANGUAGES

DEMO = Path(__file__).parent
SEED = 1
SOURCES = ("en", "es")
SOURCE_SIZES = {"train": 1000, "validation": 100, "test": 100}
TARGET_SIZES = {"train": 240, "validation": 150, "test": 200}
KNOWN_IN_HINDI = ("en", "es", "hi")  # whose names have a Hindi spelling
HOME_SHARE = 0.5  # of names: those of the language itself

SIZES = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192)
WORDS = dict(steps=2000, rate=2e-3)  # the first stage of pretraining ...
SUBJECTS = dict(steps=400, rate=1e-3)  # ... and the second
MASKED = 0.25  # of the words
TEMPERATURE = 0.5  # high, so that alike is never alike enough
NORM = 14  # of the last layer's vectors, like BERT-base's: how far an inner step goes depends on it
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MASK = 4

SLOT = re.compile(r"\{(\w+)\}")
ENTITY_TYPES = {"P": "PER", "O": "ORG", "T": "ORG", "L": "LOC", "C": "LOC"}
NAMES = ("FIRST_NAMES", "LAST_NAMES", "PLACES", "ORGANISATIONS")
OTHERS = ("ORGANISATION_PATTERNS", "TEAM_PATTERNS", "COUNTRIES", "ROLES", "KINDS", "BODIES")
LISTS = {name: {language: text.split(", ") for language, text in getattr(words, name).items()}
         for name in NAMES + OTHERS}
FRAMES = {language: words.SHARED_FRAMES + words.FRAMES[language] for language in LANGUAGES}


class Writer:
    """Writes sentences; `parity` says whether it takes names of even or of odd place in their lists, or all."""

    def __init__(self, rng, parity=None):
        self.rng, self.parity = rng, parity

    def translations(self, languages, home=None):
        """A sentence in several languages, each a list of (token, tag) pairs; all names are of `home`, if given."""
        number, chosen = self.rng.randrange(len(FRAMES["en"])), {}
        return [self.fill(FRAMES[language][number], language, languages, home, chosen) for language in languages]

    def fill(self, frame, language, languages, home, chosen):
        tokens, before = [], Counter()
        for part in frame.split():
            if not (slot := SLOT.fullmatch(part)):
                tokens.append((part, "O"))
                continue
            key = slot[1], before[slot[1]]  # the second person of a sentence is the second in every language
            before[slot[1]] += 1
            if key not in chosen:
                kind = self.rng.choice("PPOOLLC") if slot[1] == "X" else slot[1]
                chosen[key] = kind, self.choose(kind, languages, home)
            kind, texts = chosen[key]
            phrase, entity = texts[language].split(), ENTITY_TYPES.get(kind)
            tags = [f"B-{entity}"] + [f"I-{entity}"] * (len(phrase) - 1) if entity else ["O"] * len(phrase)
            tokens += zip(phrase, tags)
        return tokens

    def choose(self, kind, languages, home):
        """What fills a slot, in each language."""
        rng = self.rng
        if kind in "YN":
            return dict.fromkeys(languages, str(rng.randint(1980, 2019) if kind == "Y" else rng.randint(0, 6)))
        if kind == "P":
            first, last = (self.name(table, languages, home) for table in ("FIRST_NAMES", "LAST_NAMES"))
            return {language: f"{first[language]} {last[language]}" for language in languages}
        if kind == "L":
            return self.name("PLACES", languages, home)
        if kind == "O" and rng.random() < 0.5:
            return self.name("ORGANISATIONS", languages, home)
        if kind in "OT":
            patterns = LISTS["ORGANISATION_PATTERNS" if kind == "O" else "TEAM_PATTERNS"]
            number, place = rng.randrange(4), self.name("PLACES", languages, home)
            return {language: patterns[language][number].format(L=place[language]) for language in languages}
        table = LISTS[{"C": "COUNTRIES", "role": "ROLES", "kind": "KINDS", "body": "BODIES"}[kind]]
        number = self.number(table["en"]) if kind == "C" else rng.randrange(len(table["en"]))
        number = LANGUAGES.index(home) if kind == "C" and home else number
        return {language: table[language][number] for language in languages}

    def name(self, table, languages, home):
        known = KNOWN_IN_HINDI if "hi" in languages else LANGUAGES
        at_home = [language for language in languages if language in known]
        home = home or self.rng.choice(at_home if at_home and self.rng.random() < HOME_SHARE else known)
        names = LISTS[table][home]
        latin, _, hindi = names[self.number(names)].partition("=")
        return {language: hindi if language == "hi" else latin for language in languages}

    def number(self, names):
        return self.rng.choice([n for n in range(len(names)) if self.parity in (None, n % 2)])


def text_of(sentence):
    return " ".join(token for token, _ in sentence)


def write_data(folder):
    """The splits of all languages; no sentence occurs twice in a language."""
    for language in LANGUAGES:
        written = set()
        (folder / language).mkdir(parents=True)
        for split, size in (SOURCE_SIZES if language in SOURCES else TARGET_SIZES).items():
            parity = None if language in SOURCES else int(split != "train")
            writer, lines = Writer(random.Random(f"{SEED} {language} {split}"), parity), []
            while size:
                (sentence,) = writer.translations([language])
                if text_of(sentence) not in written:
                    written.add(text_of(sentence))
                    lines += [f"{token}\t{tag}\n" for token, tag in sentence] + ["\n"]
                    size -= 1
            (folder / language / f"{split}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")


def build_tokenizer():
    """A cased WordPiece tokenizer of all words that the generator knows, and of all characters."""
    writer = Writer(random.Random(f"{SEED} words"))
    texts = (text_of(writer.translations([language])[0]) for _ in range(5000) for language in LANGUAGES)
    seen = sorted({word for text in texts for word in text.split()})
    characters = sorted(set("".join(seen)))
    vocabulary = SPECIAL_TOKENS + characters + ["##" + character for character in characters] + seen
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    # Stripping accents would delete the vowel signs of Devanagari.
    return BertTokenizer(vocab=vocabulary, do_lower_case=False, strip_accents=False, model_max_length=128)


def train(model, steps, rate, loss):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}, loss {value.item():.2f}", flush=True)


def pretrain(tokenizer):
    torch.set_num_threads(1)  # sums in one order only, and nothing to gain from more at this size
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED} pretraining")
    writer = Writer(rng)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZES)
    model = BertForMaskedLM(config).train()

    def encode(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return batch["input_ids"], batch["attention_mask"]

    def words_loss():
        pairs = [writer.translations(rng.sample(LANGUAGES, 2))[:rng.choice((1, 2))] for _ in range(64)]
        token_ids, real = encode([" ".join(map(text_of, pair)) for pair in pairs])
        masked = (torch.rand(token_ids.shape) < MASKED) & (token_ids > MASK)
        inputs = torch.where(masked & (torch.rand(token_ids.shape) < 0.9), MASK, token_ids)
        hidden = model.bert(input_ids=inputs, attention_mask=real).last_hidden_state
        return cross_entropy(model.cls(hidden[masked]), token_ids[masked])

    def subjects_loss():
        homes = 8 * LANGUAGES
        texts = []
        for home in 2 * homes:
            language = rng.choice([other for other in LANGUAGES if other != "hi" or home in KNOWN_IN_HINDI])
            texts.append(text_of(writer.translations([language], home)[0]))
        token_ids, real = encode(texts)
        hidden = model.bert(input_ids=token_ids, attention_mask=real).last_hidden_state
        means = normalize((hidden * real[:, :, None]).sum(1) / real.sum(1, keepdim=True), dim=1)
        likeness = means[:len(homes)] @ means[len(homes):].T / TEMPERATURE
        same = torch.tensor([[float(a == b) for b in homes] for a in homes])
        return cross_entropy(likeness, same / same.sum(1, keepdim=True))

    train(model, **WORDS, loss=words_loss)
    train(model.bert, **SUBJECTS, loss=subjects_loss)
    with torch.no_grad():  # what the subjects taught, the length of a vector has no part in
        for parameter in model.bert.encoder.layer[-1].output.LayerNorm.parameters():
            parameter *= NORM / SIZES["hidden_size"] ** 0.5
    encoder = BertModel(config)  # with a pooler, which the released BERTs have too
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    return encoder


def main():
    for folder in ("wikiann", "encoder"):
        shutil.rmtree(DEMO / folder, ignore_errors=True)
    write_data(DEMO / "wikiann")
    tokenizer = build_tokenizer()
    encoder = pretrain(tokenizer)
    encoder.half().save_pretrained(DEMO / "encoder")  # half precision halves the download
    tokenizer.save_pretrained(DEMO / "encoder")


if __name__ == "__main__":
    main()
