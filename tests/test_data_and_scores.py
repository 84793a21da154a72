"""Data in text files and on the hub, its split into word pieces, and the field's usual score."""

import random
import re

import datasets
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from torch import nn

import adapters
import finetune
from conftest import DEMO, HERE, SLOW_PRIMING, TAGS, TYPES, command, random_encoder, read_results, tensors

WORDS = datasets.List(datasets.Value("string"))
STRING = datasets.Value("string")
COLUMNS = ("tokens", "ner_tags")
HUB_NAME = "unimelb-nlp/wikiann"


def write_text(data, text, name="train.txt"):
    """Writes a file of the language `hi` and returns the folder for --data."""
    (data / "hi").mkdir(parents=True, exist_ok=True)
    (data / "hi" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(data)


def make_table(words, tags, tag_type, columns=COLUMNS):
    features = datasets.Features(dict(zip(columns, (WORDS, datasets.List(tag_type)))))
    return datasets.Dataset.from_dict(dict(zip(columns, (words, tags))), features=features)


@pytest.fixture
def hub(monkeypatch):
    """A function that puts rows on the hub and reads them. A stand-in for the network returns the rows, and
    `hub.requests` lists what it was asked for."""

    def load_dataset(name, language, *, split):
        read_from_hub.requests.append((name, language, split))
        return read_from_hub.table

    def read_from_hub(*table, split="train", **options):
        read_from_hub.table = make_table(*table, **options)
        return read(HUB_NAME, split)

    read_from_hub.requests = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read_from_hub


def read(data, split="train", language="hi"):
    return adapters.read_split(str(data), language, split, TYPES)


# ---- layouts ----


def test_columns_and_separators_do_not_change_the_sentences(tmp_path):
    for split in ("train", "validation", "test"):
        text = (HERE / "demo/wikiann/hi" / f"{split}.txt").read_text(encoding="utf-8")
        blocks = [block.split("\n") for block in text.strip("\n").split("\n\n")]
        words, tags = ([[line.split("\t")[k] for line in block] for block in blocks] for k in (0, 1))
        numbers = [[TAGS.index(tag) for tag in sentence] for sentence in tags]
        columns = ["\n".join(f"{w} NNP I-NP {t}" for w, t in zip(*pair)) for pair in zip(words, tags)]
        conll = write_text(tmp_path, "-DOCSTART- -X- O O\n\n" + "\n\n".join(columns), f"{split}.txt")
        for folder in ("demo/wikiann", conll):
            assert read(folder, split) == list(zip(words, numbers)), folder


def test_a_hub_name_is_read_by_datasets(tmp_path, monkeypatch):
    """From the cache of `datasets`, because the tests are offline. Its own features name the tags."""
    table = make_table([["a", "b"], ["c"]], [[0, 1], [2]], datasets.ClassLabel(names=["B-LOC", "I-LOC", "O"]))
    cache = tmp_path / "unimelb-nlp___wikiann/hi/0.0.0/revision"
    cache.mkdir(parents=True)
    split = {"name": "train", "num_examples": 2, "dataset_name": "wikiann"}
    info = datasets.DatasetInfo(features=table.features, config_name="hi", splits={"train": split})
    info.write_to_directory(cache)
    with ArrowWriter(path=str(cache / "wikiann-train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert read(HUB_NAME) == [(["a", "b"], [5, 6]), (["c"], [0])]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_tag_names_in_another_order_keep_their_meaning(split, hub):
    """The hub is asked once, for the language and the split."""
    names = ["B-LOC", "I-LOC", "O", "B-PER", "I-PER", "B-ORG", "I-ORG"]
    words, tags = [["a", "b"], ["c", "d"]], [[0, 1], [2, 3]]
    expected = [(["a", "b"], [5, 6]), (["c", "d"], [0, 1])]
    assert hub(words, tags, datasets.ClassLabel(names=names), split=split) == expected
    assert hub.requests == [(HUB_NAME, "hi", split)]


def test_tags_on_the_hub_may_be_strings(hub):
    assert hub([["a", "b"], ["c"]], [["B-LOC", "I-LOC"], ["O"]], STRING) == [(["a", "b"], [5, 6]), (["c"], [0])]


@pytest.mark.parametrize(
    "text",
    [
        "a\tO\nb\tB-LOC\n\nc\tO\n",
        "a\tO\r\nb\tB-LOC\r\n\r\nc\tO\r\n",
        "a\tO\rb\tB-LOC\r\rc\tO\r",  # old Macintosh line ends
        "\n\na\tO\nb\tB-LOC\n\n\nc\tO",
        "a O\nb B-LOC\n\nc O\n",
        "a NNP I-NP O\nb NNP I-NP B-LOC\n\nc . O O\n",
        "a\tNNP\tO\nb\tNNP\tB-LOC\n\nc\t.\tO\n",
        "a  O\nb    B-LOC\n\nc O\n",
        "-DOCSTART- -X- -X- O\n\na O\nb B-LOC\n\n-DOCSTART- -X- -X- O\n\nc O\n",
        "a\tO\nb\tB-LOC\n-DOCSTART-\nc\tO\n",
        "\ufeffa\tO\nb\tB-LOC\n\nc\tO\n",
        "a\tO  \nb\tB-LOC\t\n \t \nc\tO \r\n",
    ],
)
def test_common_text_formats_are_read(text, tmp_path):
    assert read(write_text(tmp_path, text)) == [(["a", "b"], [0, 5]), (["c"], [0])]


def test_only_ascii_blanks_separate_columns_and_only_in_a_file_without_tabs(tmp_path):
    assert read(write_text(tmp_path, "New York\tB-LOC\na b\tO\n")) == [(["New York", "a b"], [5, 0])]
    words = ["New\u00a0York", "\u00a0", "a\u2003b", "c\u3000"]  # U+00A0 is a no-break space
    for separator in (" ", "\t", " NNP "):
        text = "\n".join(f"{word}{separator}O" for word in words)
        assert read(write_text(tmp_path, text)) == [(words, [0] * 4)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\tO\nb\n", "train.txt:2: expected word and tag, one of O B-PER I-PER B-ORG I-ORG B-LOC I-LOC (--types), found 'b' ''"),
        ("a\tO\nb O\n", "train.txt:2: expected word and tag"),  # in a file with tabs
        ("a O\nb\tO\n", "train.txt:1: expected word and tag"),
        ("a\u00a0O\n", "train.txt:1: expected word and tag"),
        ("a O\n\u00a0\nb O\n", "train.txt:2: expected word and tag"),
        ("a\tO\nb\tO\tPER\n", "found 'b' 'PER'"),
        ("a\tO\n\nb\tB-DOG\n", "train.txt:3: expected word and tag"),
        ("a\rb\tB-DOG\r", "train.txt:1: expected word and tag"),
        ("a\tO\n\tO\n", "found '' 'O'"),
        ("a\tO\nb\t\n", "found 'b' ''"),
        ("a\tS-PER\n", "found 'a' 'S-PER'"),  # BIOES
        ("a\tB-PER\nb\tE-PER\n", "found 'b' 'E-PER'"),
        ("a\tPER\n", "found 'a' 'PER'"),
        ("\n\n", "the train split is empty"),
        ("-DOCSTART- O\n", "the train split is empty"),
        ("", "the train split is empty"),
        (b"a\tO\nb\xff\tO\n", "train.txt:2: expected UTF-8"),
        ("a\tO\n".encode("utf-16"), "train.txt:1: expected UTF-8"),
        ("a\tO\n".encode("utf-16-le"), "train.txt:1: expected word and tag"),
    ],
)
def test_a_wrong_line_is_reported_with_file_and_number(text, message, tmp_path):
    with pytest.raises(adapters.UserError, match=re.escape(message)) as raised:
        read(write_text(tmp_path, text))
    assert "\n" not in str(raised.value) and str(tmp_path / "hi") in str(raised.value)


def test_types_other_than_wikianns_are_read_and_a_misspelt_one_is_reported(tmp_path):
    tagged = "\n\n".join(["a\tB-DATE\nb\tI-DATE\nc\tO\nd\tB-PER"] * 40)
    for language in ("en", "es"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "train.txt").write_text(tagged)
    flags = [*SLOW_PRIMING, "--data", tmp_path, "--steps", 1, "--output", tmp_path / "out"]
    for types, listed in ([], "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC"), (["--types", "PER", "DTAE"], "O B-PER I-PER B-DTAE I-DTAE"):
        (line,) = command("prime.py", *flags, *types, status=2).stderr.splitlines()
        assert f"{tmp_path}/en/train.txt:1: expected word and tag, one of {listed} (--types), found 'a' 'B-DATE'" in line
    command("prime.py", *flags, "--types", "PER", "DATE")
    sentences = adapters.read_split(str(tmp_path), "en", "train", ["PER", "DATE"])
    assert sentences[0] == (["a", "b", "c", "d"], [3, 4, 0, 1])


@pytest.mark.parametrize("language", ["hi/", "../hi", "/hi", "x/../hi", ".", "..", ""])
def test_a_language_that_is_a_path_is_refused(language, tmp_path):
    write_text(tmp_path, "a\tO\n")
    with pytest.raises(adapters.UserError, match=f"^{re.escape(repr(language))} is not a language code"):
        read(tmp_path, language=language)


SHARDS = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("files", [SHARDS, ["dev.txt"], ["train"], ["dev.txt", "test.txt", "train", *SHARDS]])
def test_a_folder_without_the_text_file_is_refused_with_files_expected_and_found(files, split, tmp_path, hub):
    """The hub is not asked. The shards are files that `datasets` could read."""
    for name in files:
        write_text(tmp_path, "a\tO\n", name)
        if name in SHARDS:
            make_table([["a"]], [["O"]], STRING).to_parquet(str(tmp_path / "hi" / name))
    for language, folder, found in (("hi", tmp_path / "hi", files), ("af", tmp_path, ["hi"])):
        message = f"expected {tmp_path}/{language}/{split}.txt, found in {folder}: {found}"
        with pytest.raises(adapters.UserError, match=f"^{re.escape(message)}$"):
            read(tmp_path, split, language)
    assert not hub.requests


@pytest.mark.parametrize("tag", [0, 5])
def test_integer_tags_without_names_are_refused(tag, hub):
    message = f"^{HUB_NAME}, hi train row 1: expected word and tag, one of O B-PER .*found 'a' {tag}$"
    with pytest.raises(adapters.UserError, match=message):
        hub([["a"]], [[tag]], datasets.Value("int64"))


@pytest.mark.parametrize(
    "columns, missing", [(("words", "ner_tags"), "tokens"), (("tokens", "tags"), "ner_tags")])
def test_missing_columns_are_named_with_the_columns_found(columns, missing, hub):
    message = f"Column name ['{missing}'] not in the dataset. Current columns in the dataset: {[*columns]}"
    with pytest.raises(adapters.UserError, match=f"^--data {HUB_NAME}, hi train: .*{re.escape(message)}"):
        hub([["a"]], [["O"]], STRING, columns=columns)


def test_a_missing_word_is_reported_with_its_row(hub):
    with pytest.raises(adapters.UserError, match="train row 2: expected word and tag, .*found None 'O'"):
        hub([["a"], [None]], [["O"], ["O"]], STRING)


def test_a_row_with_more_words_than_tags_or_without_words_is_one_line(hub):
    for words in (["a", "b"], None):
        with pytest.raises(adapters.UserError, match=f"--data {HUB_NAME}, hi train: .*Error: "):
            hub([["a"], words], [["O"], ["O"]], STRING)


# ---- words and word pieces ----


def test_the_first_piece_of_a_word_carries_its_tag(demo):
    tokenizer, words, tags = demo[1], ["Zxqyvw", "in", "Qwxz"], [1, 0, 5]
    (sentence,) = adapters.tokenize([(words, tags)], tokenizer, 128)
    pieces = tokenizer.convert_ids_to_tokens(sentence.input_ids)
    assert len(pieces) > len(words) + 2 and (sentence.words, sentence.tags) == (words, tags)
    assert [pieces[start] for start in sentence.word_starts] == [tokenizer.tokenize(word)[0] for word in words]
    logits = torch.randn(3, 7)
    expected = nn.functional.cross_entropy(logits, torch.tensor(tags))
    assert torch.equal(adapters.tag_loss(lambda sentences: logits, [sentence]), expected)


def test_a_word_without_a_piece_has_no_features_and_no_loss(demo):
    """The word consists of an invisible character. Its neighbours keep their tags."""
    (sentence,) = adapters.tokenize([(["a", "\u200d", "b"], [1, 2, 5])], demo[1], 128)
    assert sentence.word_starts[1] == -1 and min(sentence.word_starts[::2]) > 0
    model = adapters.Tagger(random_encoder("Bert", len(demo[1])), 7).double().eval()
    assert model.encode_sets([[sentence]])[0][0].features.shape == (2, 16)
    logits = torch.randn(2, 7)
    expected = nn.functional.cross_entropy(logits, torch.tensor([1, 5]))
    assert torch.equal(adapters.tag_loss(lambda sentences: logits, [sentence]), expected)


class Predictor(nn.Module):
    """Predicts these tags for the words that have a piece."""

    def __init__(self, tags):
        super().__init__()
        self.tags = torch.tensor(tags)

    def forward(self, sentences):
        return nn.functional.one_hot(self.tags, 7).float()


def test_truncated_words_count_as_o_and_are_reported(demo, capsys):
    """By hand: five true entities, one of which loses its end and one is lost. Four are predicted."""
    tagged = [(list("abcdef"), [1, 2, 0, 3, 5, 6]), (list("ab"), [5, 0])]  # PER(ab) ORG(d) LOC(ef); LOC(a)
    complete = adapters.tokenize(tagged, demo[1], 128)
    assert [s.word_starts.count(-1) for s in complete] == [0, 0] and capsys.readouterr().err == ""
    tagged.append((["a"] * 5 + ["b"], [0] * 5 + [1]))
    sentences = adapters.tokenize(tagged, demo[1], 7)  # five words, [CLS] and [SEP]
    message = capsys.readouterr().err
    assert message.startswith("2 of 14 words have no word piece") and "--max-length 7" in message
    kept = [tag for s in sentences for start, tag in zip(s.word_starts, s.tags) if start >= 0]
    metrics = finetune.evaluate(Predictor(kept), sentences, TAGS)
    # true: PER ORG LOC | LOC | PER; predicted: PER ORG LOC(e) | LOC
    assert metrics["precision"] == pytest.approx(100 * 3 / 4)
    assert metrics["recall"] == pytest.approx(100 * 3 / 5)
    assert metrics["f1"] == pytest.approx(100 * 2 * 3 / (4 + 5))


# ---- the score ----


def conll_entities(tags):
    """By conlleval's rules: only I- of the same type continues an entity, and I- may also begin one."""
    entities, begun = set(), None
    for position, tag in enumerate([*tags, "O"]):
        if begun and tag != f"I-{begun[1]}":
            entities.add((*begun, position))
            begun = None
        if tag != "O" and not begun:
            begun = position, tag[2:]
    return entities


def conll_metrics(gold, predicted):
    """Precision, recall and F1 over the tags of several sentences."""
    true, guessed = ({(i, *e) for i, tags in enumerate(sentences) for e in conll_entities(tags)}
                     for sentences in (gold, predicted))
    correct = len(true & guessed)
    return {
        "precision": 100 * correct / len(guessed) if guessed else 0.0,
        "recall": 100 * correct / len(true) if true else 0.0,
        "f1": 200 * correct / (len(true) + len(guessed)) if true or guessed else 0.0,
    }


def test_the_oracle_counts_entities_as_conlleval_does():
    iob1 = ["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG", "I-ORG"]
    assert conll_entities(iob1) == {(0, "PER", 2), (3, "LOC", 4), (4, "LOC", 5), (5, "ORG", 7)}


def test_score_equals_an_independent_count_on_1000_random_tag_sequences():
    rng = random.Random(0)
    begins_with_i = 0
    for _ in range(100):
        lengths = [rng.randint(1, 12) for _ in range(10)]
        gold = [rng.choices(range(7), [4, 1, 2, 1, 2, 1, 2], k=length) for length in lengths]
        predicted = [[tag if rng.random() < 0.8 else rng.randrange(7) for tag in tags] for tags in gold]
        sentences = [adapters.Sentence(["w"] * len(tags), tags, [], [0] * len(tags)) for tags in gold]
        model = Predictor([tag for tags in predicted for tag in tags])
        names = [[[TAGS[tag] for tag in tags] for tags in sequences] for sequences in (gold, predicted)]
        begins_with_i += sum(tags[0].startswith("I-") for tags in names[0])
        assert finetune.evaluate(model, sentences, TAGS) == pytest.approx(conll_metrics(*names))
    assert begins_with_i > 100


def test_without_any_entity_the_score_is_zero():
    sentences = [adapters.Sentence(["w", "w"], [0, 0], [], [0, 0])]
    metrics = finetune.evaluate(Predictor([0, 0]), sentences, TAGS)
    assert (metrics["f1"], metrics["precision"], metrics["recall"]) == (0, 0, 0)


def test_score_equals_an_independent_count_on_the_predictions_of_a_tuned_model(demo, tmp_path):
    """An encoder and a head, combined here, tag one sentence at a time."""
    from transformers import AutoModel

    flags = ["--tune", "full", "--init", "none", "--lr", 1e-3, "--epochs", 6, "--limit-train", 400]
    outputs = ["--results", tmp_path / "results", "--save", tmp_path]
    command("finetune.py", "--tgt", "hi", *DEMO, *flags, *outputs, "--limit-test", 300)
    (record,) = read_results(tmp_path / "results")
    tuned = tensors(tmp_path / "hi-0", "tuned.safetensors")
    encoder = AutoModel.from_pretrained("demo/encoder", dtype=torch.float32).eval()
    weights = {n.removeprefix("encoder."): p for n, p in tuned.items() if n.startswith("encoder.")}
    assert not encoder.load_state_dict(weights, strict=False).unexpected_keys
    gold, predicted = [], []
    for block in (HERE / "demo/wikiann/hi/test.txt").read_text().strip().split("\n\n")[:300]:
        words, tags = zip(*(line.split("\t") for line in block.split("\n")))
        encoded = demo[1](list(words), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(encoded["input_ids"]).last_hidden_state[0]
        starts = [encoded.word_ids().index(word) for word in range(len(words))]
        logits = hidden[starts] @ tuned["head.weight"].T + tuned["head.bias"]
        gold.append(list(tags))
        predicted.append([TAGS[tag] for tag in logits.argmax(dim=1).tolist()])
    expected = conll_metrics(gold, predicted)
    pairs = [pair for tags in predicted for pair in zip(["O", *tags], tags)]
    assert expected["f1"] > 20 and any(b[0] == "I" and a[1:] != b[1:] for a, b in pairs)
    assert {name: record[name] for name in expected} == pytest.approx(expected)
