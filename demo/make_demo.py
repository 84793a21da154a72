"""Write the demo's data and its tiny encoder: run `python demo/make_demo.py` from the repository root.

It makes two things, so that priming and fine-tuning can be tried in seconds, without a network:

    demo/wikiann/<language>/{train,validation,test}.txt   sentences with person, organisation, place tags
    demo/encoder/                                         a small BERT that has read all eight languages

Every sentence is generated from the frames and the name lists in `demo_languages.py`, which were written
for this project; nothing is copied from WikiAnn or from any other corpus. The sentences are grammatical, not
true: they put cities into whatever country the dice say. A quarter of all names, and a few frames, carry tags
in validation and test only, so that remembering the training split is not enough.

The encoder learns masked language modelling on untagged sentences of the same generator, none of them in any
split, half of them code-switched: words and names replaced by those of another language. That makes the
languages share one space, and so lets a skill learnt in English reach Hindi.
"""

import random
import re
import shutil
import string
from collections import Counter
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import demo_languages as words
from demo_languages import LANGUAGES

DEMO = Path(__file__).parent
SEED = 1
SOURCES = ("en", "es")
SOURCE_SIZES = {"train": 700, "validation": 100, "test": 150}
TARGET_SIZES = {"train": 160, "validation": 100, "test": 150}

HELD_OUT_EVERY = 4  # each fourth name of every list is kept from the training splits
HELD_OUT_SHARE = {"train": 0.0, "validation": 0.35, "test": 0.35, "pretraining": 0.25}
FOREIGN_NAME_SHARE = 0.15  # people of another language's name
LONG_SHARE = 0.06  # sentences strung together from three frames
SWITCH_SHARE = 0.5  # how much of a code-switched sentence comes from other languages

# Hindi shares no script, hence no name, with the others: only code-switching ties it to them.
SWITCH_TO = LANGUAGES + 4 * ("hi",)

PRETRAINING_SENTENCES = 3000  # per language
PRETRAINING_STEPS = 3000
PRETRAINING_BATCH = 64
PRETRAINING_RATE = 3e-3
WHOLE_WORDS, WORD_PIECES = 100, 150  # per language
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)

CASES = {"": 0, "gen": 1, "loc": 2}
SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
ENTITY_TYPES = {"P": "PER", "O": "ORG", "T": "ORG", "L": "LOC", "C": "LOC", "R": "LOC"}


def split_list(text):
    """Entries of a hand-written list: separated by semicolons, or by blanks where no entry has any."""
    return [entry.strip() for entry in (text.split(";") if ";" in text else text.split())]


NAMES = {
    "first": {language: split_list(text) for language, text in words.FIRST_NAMES.items()},
    "last": {language: split_list(text) for language, text in words.LAST_NAMES.items()},
    "place": {language: split_list(text) for language, text in words.PLACES.items()},
    "river": {language: split_list(text) for language, text in words.RIVERS.items()},
    "country": {language: split_list(text) for language, text in words.COUNTRIES.items()},
    "organisation": {language: split_list(text) for language, text in words.ORGANISATIONS.items()},
}
COMMON_NOUNS = {
    "role": {language: split_list(text) for language, text in words.ROLES.items()},
    "kind": {language: split_list(text) for language, text in words.KINDS.items()},
    "body": {language: split_list(text) for language, text in words.BODIES.items()},
}


def build_dictionary():
    """{(language, word): its row of the lexicon}, to translate single words when switching codes."""
    dictionary = {}
    for row in words.LEXICON:
        for language, alternatives in zip(LANGUAGES, row, strict=True):
            for word in alternatives:
                if word != "-":
                    dictionary.setdefault((language, word), row)
    return dictionary


class Writer:
    """Writes tagged sentences; `held_out_share` of their names and frames are held-out ones."""

    def __init__(self, rng, held_out_share, switch=False):
        self.rng, self.held_out_share, self.switch = rng, held_out_share, switch
        self.dictionary = build_dictionary()

    def sentence(self, language):
        """One sentence as a list of (token, tag) pairs."""
        if self.rng.random() >= LONG_SHARE:
            return self.fill(self.frame(language), language)
        parts = [self.fill(self.frame(language), language) for _ in range(3)]
        tokens = parts[0]
        for part in parts[1:]:
            tokens = tokens + [(";", "O")] + part
        return tokens

    def frame(self, language):
        if self.rng.random() < self.held_out_share:
            return self.rng.choice(words.HELD_OUT_FRAMES[language])
        if self.rng.random() < 0.4:
            return self.rng.choice(words.SHARED_FRAMES)
        return self.rng.choice(words.FRAMES[language])

    def fill(self, frame, language):
        tokens = []
        for part in frame.split():
            slot = SLOT.fullmatch(part)
            if not slot:
                tokens.append((self.translate(part, language), "O"))
                continue
            name, case = slot.groups(default="")
            if name == "X":
                name = self.rng.choice("PPOOLLC")
            speaker = self.speaker(language)
            phrase = [self.translate(word, speaker) for word in self.phrase(name, case, speaker).split()]
            entity = ENTITY_TYPES.get(name)
            tags = [f"B-{entity}"] + [f"I-{entity}"] * (len(phrase) - 1) if entity else ["O"] * len(phrase)
            tokens += zip(phrase, tags)
        return tokens

    def speaker(self, language):
        """The language that the next name is taken from."""
        return self.rng.choice(SWITCH_TO) if self.switch and self.rng.random() < SWITCH_SHARE else language

    def translate(self, word, language):
        row = self.dictionary.get((language, word))
        if row is None or not self.switch or self.rng.random() >= SWITCH_SHARE:
            return word
        alternatives = row[LANGUAGES.index(self.rng.choice(SWITCH_TO))]
        translation = self.rng.choice(alternatives)
        return word if translation == "-" else translation

    def phrase(self, slot, case, language):
        rng = self.rng
        if slot == "Y":
            return str(rng.randint(1801, 2019))
        if slot == "N":
            return str(rng.randint(0, 6))
        if slot in COMMON_NOUNS:
            return rng.choice(COMMON_NOUNS[slot][language])
        if slot == "P":
            return self.person(language)
        if slot == "O":
            if rng.random() < 0.5:
                return self.name("organisation", language)
            return self.with_place(rng.choice(words.ORGANISATION_PATTERNS[language]), language)
        if slot == "T":
            return self.with_place(rng.choice(words.TEAM_PATTERNS[language]), language)
        return self.place({"L": "place", "C": "country", "R": "river"}[slot], case, language)

    def person(self, language):
        if language != "hi" and self.rng.random() < FOREIGN_NAME_SHARE:
            language = self.rng.choice([other for other in LANGUAGES if other != "hi"])
        prefixes = words.LAST_NAME_PREFIXES.get(language, ())
        prefix = [self.rng.choice(prefixes)] if prefixes and self.rng.random() < 0.25 else []
        return " ".join([self.name("first", language), *prefix, self.name("last", language)])

    def with_place(self, pattern, language):
        return SLOT.sub(lambda slot: self.place("place", slot[2] or "", language), pattern)

    def place(self, kind, case, language):
        forms = self.name(kind, language).split("/")
        return forms[CASES[case] % len(forms)]  # languages without cases have one form for all

    def name(self, kind, language):
        entries = NAMES[kind][language]
        held_out = entries[HELD_OUT_EVERY - 1::HELD_OUT_EVERY]
        if self.rng.random() < self.held_out_share:
            return self.rng.choice(held_out)
        return self.rng.choice([entry for entry in entries if entry not in held_out])


def write_data(folder):
    """The splits of all languages. No sentence occurs twice in a language; returns all that were written."""
    written = set()
    for language in LANGUAGES:
        sizes = SOURCE_SIZES if language in SOURCES else TARGET_SIZES
        (folder / language).mkdir(parents=True)
        for split, size in sizes.items():
            writer = Writer(random.Random(f"{SEED} {language} {split}"), HELD_OUT_SHARE[split])
            lines, count = [], 0
            while count < size:
                pairs = writer.sentence(language)
                text = " ".join(token for token, _ in pairs)
                if (language, text) in written:
                    continue
                written.add((language, text))
                lines += [f"{token}\t{tag}\n" for token, tag in pairs] + ["\n"]
                count += 1
            (folder / language / f"{split}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    return {text for _, text in written}


def pretraining_text(tagged_sentences):
    """Untagged sentences of every language, none of them among the tagged: plain, and code-switched."""
    rng = random.Random(f"{SEED} pretraining")
    share = HELD_OUT_SHARE["pretraining"]

    def texts(writer, language):
        sentences = (writer.sentence(language) for _ in range(PRETRAINING_SENTENCES // 2))
        texts = (" ".join(token for token, _ in sentence) for sentence in sentences)
        return [text for text in texts if text not in tagged_sentences]

    plain = {language: texts(Writer(rng, share), language) for language in LANGUAGES}
    switched = {language: texts(Writer(rng, share, switch=True), language) for language in LANGUAGES}
    return plain, switched


def most_common(counter, size):
    """The most frequent keys. Ties are broken by the alphabet, so that the result is always the same."""
    return [key for key, _ in sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:size]]


def word_pieces(text):
    """What one language adds to the vocabulary: its frequent words and widely shared pieces."""
    occurrences = Counter(text.split())
    pieces = Counter()
    for word in occurrences:
        for length in (2, 3, 4):
            if len(word) > length:
                pieces[word[:length]] += 1
                pieces.update("##" + word[start:start + length] for start in range(1, len(word) - length + 1))
    return most_common(occurrences, WHOLE_WORDS) + most_common(pieces, WORD_PIECES)


def build_tokenizer(plain_texts):
    """A cased WordPiece tokenizer over every character there is and an equal share of each language."""
    everything = Path(words.__file__).read_text(encoding="utf-8") + string.digits
    characters = sorted(set(everything) - set(" \n"))
    vocabulary = SPECIAL_TOKENS + characters + ["##" + character for character in characters]
    for language in LANGUAGES:
        vocabulary += word_pieces(plain_texts[language])
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    # Stripping accents would delete the vowel signs of Devanagari.
    return BertTokenizer(vocab=vocabulary, do_lower_case=False, strip_accents=False, model_max_length=128)


def mask_tokens(token_ids, generator):
    """BERT's masking, a bit denser: of 20% to be guessed, 80% are masked, 10% made random, 10% kept."""
    def draw():
        return torch.rand(token_ids.shape, generator=generator)

    chosen = (draw() < 0.2) & (token_ids > MASK)
    labels = token_ids.masked_fill(~chosen, -100)
    how = draw()
    inputs = token_ids.masked_fill(chosen & (how < 0.8), MASK)
    noise = (draw() * (token_ids.max() - MASK)).long() + MASK + 1
    return torch.where(chosen & (how >= 0.9), noise, inputs), labels


def pretrain(texts, tokenizer):
    """A small BERT trained by masked language modelling; returns it without the prediction head."""
    torch.set_num_threads(1)  # sums in one order only, and nothing to gain from more at this size
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=128)
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PRETRAINING_RATE, total_steps=PRETRAINING_STEPS, pct_start=0.1)
    encoded = tokenizer(texts, truncation=True, max_length=96)["input_ids"]
    for step in range(1, PRETRAINING_STEPS + 1):
        rows = torch.randint(len(encoded), (PRETRAINING_BATCH,), generator=generator).tolist()
        batch = [torch.tensor(encoded[row]) for row in rows]
        token_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)
        inputs, labels = mask_tokens(token_ids, generator)
        hidden = model.bert(input_ids=inputs, attention_mask=(token_ids != PAD).long()).last_hidden_state
        chosen = labels != -100
        loss = torch.nn.functional.cross_entropy(model.cls(hidden[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"pretraining step {step}/{PRETRAINING_STEPS}, loss {loss.item():.2f}", flush=True)
    encoder = BertModel(config)  # with its pooler, which the released BERTs have too
    encoder.load_state_dict(model.bert.state_dict(), strict=False)
    return encoder


def main():
    for folder in ("wikiann", "encoder"):
        shutil.rmtree(DEMO / folder, ignore_errors=True)
    tagged_sentences = write_data(DEMO / "wikiann")
    plain, switched = pretraining_text(tagged_sentences)
    tokenizer = build_tokenizer({language: " ".join(texts) for language, texts in plain.items()})
    texts = [text for part in (plain, switched) for language in LANGUAGES for text in part[language]]
    print(f"{len(texts)} sentences to read, {len(tokenizer)} word pieces")
    encoder = pretrain(texts, tokenizer)
    encoder.save_pretrained(DEMO / "encoder")
    tokenizer.save_pretrained(DEMO / "encoder")


if __name__ == "__main__":
    main()
