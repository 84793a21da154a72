"""Data in every layout, its words as word pieces, and the score that the field computes."""

import random
import re
import shutil
from argparse import Namespace

import datasets
import pytest
import torch
from conftest import DEMO, HERE, LONG, TAGS, TYPES, command, random_encoder, read_results, tensors
from torch import nn

import adapters
import finetune
import prime

WORDS = datasets.List(datasets.Value("string"))


def write(folder, text, name="train.txt"):
    (folder / "hi").mkdir(parents=True, exist_ok=True)
    (folder / "hi" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


COLUMNS = ("tokens", "ner_tags")


def write_table(folder, words, tags, kind, name="train-00000-of-00001.parquet", columns=COLUMNS):
    features = datasets.Features(dict(zip(columns, (WORDS, datasets.List(kind)))))
    (folder / "hi").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(dict(zip(columns, (words, tags))), features=features)
    table.to_parquet(str(folder / "hi" / name))
    return str(folder)


# ---- layouts ----


def test_data_layouts_load_the_same_sentences(tmp_path):
    strings = datasets.Value("string")
    for split, archive in (("train", "train"), ("validation", "dev"), ("test", "test")):
        text = (HERE / "demo/wikiann/hi" / f"{split}.txt").read_text(encoding="utf-8")
        blocks = [block.split("\n") for block in text.strip("\n").split("\n\n")]
        words, tags = ([[line.split("\t")[k] for line in block] for block in blocks] for k in (0, 1))
        numbers = [[TAGS.index(tag) for tag in row] for row in tags]
        prefixed = ["\n".join(f"hi:{w}\t{t}" for w, t in zip(*row)) for row in zip(words, tags)]
        columns = ["\n".join(f"{w} NNP I-NP {t}" for w, t in zip(*row)) for row in zip(words, tags)]
        data = {
            "demo/wikiann",
            write(tmp_path / "rahimi", "\n\n".join(prefixed) + "\n", archive),
            write(tmp_path / "prefixed", "\n\n".join(prefixed) + "\n", f"{split}.txt"),
            write(tmp_path / "conll", "-DOCSTART- -X- O O\n\n" + "\n\n".join(columns), f"{split}.txt"),
            write_table(tmp_path / "hub", words, numbers, datasets.ClassLabel(names=TAGS),
                        f"{split}-00000-of-00001.parquet"),
            write_table(tmp_path / "strings", words, tags, strings, f"{split}.parquet"),
        }
        for folder in data:
            assert prime.read_split(folder, "hi", split, TYPES) == list(zip(words, numbers)), folder


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    """As `load_dataset("unimelb-nlp/wikiann", "hi", split="train")` gives it; its features name the tags."""
    names = ["B-LOC", "I-LOC", "O"]
    features = datasets.Features(tokens=WORDS, ner_tags=datasets.List(datasets.ClassLabel(names=names)))
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [2]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or table)
    found = prime.read_split("unimelb-nlp/wikiann", "hi", "train", TYPES)
    assert found == [(["a", "b"], [5, 6]), (["c"], [0])]
    assert calls == [(("unimelb-nlp/wikiann", "hi"), {"split": "train"})]


EXPECTED = [(["a", "b"], [0, 5]), (["c"], [0])]


@pytest.mark.parametrize(
    "text",
    [
        "a\tO\nb\tB-LOC\n\nc\tO\n",
        "a\tO\r\nb\tB-LOC\r\n\r\nc\tO\r\n",
        "\n\na\tO\nb\tB-LOC\n\n\nc\tO",
        "a O\nb B-LOC\n\nc O\n",
        "a NNP I-NP O\nb NNP I-NP B-LOC\n\nc . O O\n",
        "a\tNNP\tO\nb\tNNP\tB-LOC\n\nc\t.\tO\n",
        "a  O\nb    B-LOC\n\nc O\n",
        "-DOCSTART- -X- -X- O\n\na O\nb B-LOC\n\n-DOCSTART- -X- -X- O\n\nc O\n",
        "a O\nb B-LOC\n-DOCSTART-\tO\nc O\n",
        "\ufeffa\tO\nb\tB-LOC\n\nc\tO\n",
        "a\tO  \nb\tB-LOC\t\n \t \nc\tO \r\n",
        "hi:a\tO\nhi:b\tB-LOC\n\nhi:c\tO\n",
    ],
)
def test_text_as_people_have_it_is_read(text, tmp_path):
    assert prime.read_split(write(tmp_path, text), "hi", "train", TYPES) == EXPECTED


def test_a_prefix_that_not_every_word_has_is_a_part_of_the_word(tmp_path):
    data = write(tmp_path, "hi:a\tO\nb\tO\n")
    assert prime.read_split(data, "hi", "train", TYPES) == [(["hi:a", "b"], [0, 0])]
    data = write(tmp_path, "hi\tO\nhi:hi:a\tO\n")
    assert prime.read_split(data, "hi", "train", TYPES) == [(["hi", "hi:hi:a"], [0, 0])]


def test_an_archives_file_needs_the_prefix(tmp_path):
    with pytest.raises(prime.BadInput, match=r"train:2: 'b' 'O' is not hi:word and tag"):
        prime.read_split(write(tmp_path, "hi:a\tO\nb\tO\n", "train"), "hi", "train", TYPES)


def test_a_word_with_a_space_in_a_file_with_tabs_is_one_word(tmp_path):
    data = write(tmp_path, "New York\tB-LOC\na b\tO\n")
    assert prime.read_split(data, "hi", "train", TYPES) == [(["New York", "a b"], [5, 0])]


@pytest.mark.parametrize(
    "text, told",
    [
        ("a\tO\nb\n", "train.txt:2: 'b' ''"),
        ("a\tO\nb\tO\tPER\n", "train.txt:2: 'b' 'PER'"),
        ("a\tO\n\nb\tB-DOG\n", "train.txt:3: 'b' 'B-DOG' is not word and tag, of O B-"),
        ("a\tO\n\tO\n", "train.txt:2: '' 'O'"),
        ("a\tO\nb\t\n", "train.txt:2: 'b' ''"),
        ("a\tS-PER\n", "train.txt:1: 'a' 'S-PER'"),  # BIOES
        ("a\tB-PER\nb\tE-PER\n", "train.txt:2: 'b' 'E-PER'"),
        ("a\tPER\n", "train.txt:1: 'a' 'PER'"),
        ("\n\n", "the train split is empty"),
        ("-DOCSTART- O\n", "the train split is empty"),
        ("", "the train split is empty"),
        (b"a\tO\nb\xff\tO\n", "train.txt:2: UnicodeDecodeError"),
    ],
)
def test_bad_lines_are_told_with_file_line_and_the_flag(text, told, tmp_path):
    with pytest.raises(prime.BadInput, match=re.escape(told)) as raised:
        prime.read_split(write(tmp_path, text), "hi", "train", TYPES)
    assert "--types" in str(raised.value) or "B-" not in told


def test_other_types_are_a_flag_away_and_a_typing_error_is_told(tmp_path):
    tagged = "\n\n".join(["a\tB-DATE\nb\tI-DATE\nc\tO\nd\tB-PER"] * 40)
    for language in ("en", "es"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "train.txt").write_text(tagged)
    flags = [*LONG, "--data", tmp_path, "--steps", 1, "--output", tmp_path / "out"]
    (line,) = command("prime.py", *flags, status=2).stderr.splitlines()
    assert f"{tmp_path}/en/train.txt:1: 'a' 'B-DATE'" in line and "--types" in line
    (line,) = command("prime.py", *flags, "--types", "PER", "DTAE", status=2).stderr.splitlines()
    assert "'B-DATE' is not word and tag, of O B-PER I-PER B-DTAE I-DTAE (--types)" in line
    command("prime.py", *flags, "--types", "PER", "DATE")
    rows = prime.read_split(str(tmp_path), "en", "train", ["PER", "DATE"])
    assert rows[0] == (["a", "b", "c", "d"], [3, 4, 0, 1])


def test_integer_tags_that_nothing_names_are_refused(tmp_path):
    data = write_table(tmp_path, [["a"]], [[5]], datasets.Value("int64"))
    with pytest.raises(prime.BadInput, match="row 1 of train: 'a' '5' is not word and tag, of O B-PER"):
        prime.read_split(data, "hi", "train", TYPES)


def test_names_in_another_order_keep_their_meaning(tmp_path):
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-ORG", "I-ORG"]
    data = write_table(tmp_path, [["a", "b"]], [[1, 3]], datasets.ClassLabel(names=names))
    assert prime.read_split(data, "hi", "train", TYPES) == [(["a", "b"], [5, 1])]


@pytest.mark.parametrize("columns", [("words", "ner_tags"), ("tokens", "tags")])
def test_a_column_that_is_missing_is_told(columns, tmp_path):
    data = write_table(tmp_path, [["a"]], [["O"]], datasets.Value("string"), columns=columns)
    args = Namespace(data=data, limit_train=None, types=TYPES, max_length=128)
    with pytest.raises(prime.BadInput, match=f"{data}.* hi train: .*Error: .*({'|'.join(COLUMNS)})"):
        prime.load(args, None, "hi", "train")


def test_a_missing_word_is_told_by_its_row(tmp_path):
    data = write_table(tmp_path, [["a"], [None]], [["O"], ["O"]], datasets.Value("string"))
    with pytest.raises(prime.BadInput, match="row 2 of train: 'None' 'O' is not word and tag"):
        prime.read_split(data, "hi", "train", TYPES)


def test_a_row_with_more_words_than_tags_is_told_by_its_number(tmp_path):
    data = write_table(tmp_path, [["a"], ["a", "b"]], [["O"], ["O"]], datasets.Value("string"))
    with pytest.raises(prime.BadInput, match="row 2 of train"):
        prime.read_split(data, "hi", "train", TYPES)


# ---- words and word pieces ----


def test_the_first_piece_of_a_word_carries_its_tag(demo):
    tokenizer = demo[1]
    words = ["Zxqyvw", "in", "Qwxz"]
    (sentence,) = adapters.tokenize([(words, [1, 0, 5])], tokenizer, 128)
    pieces = tokenizer.convert_ids_to_tokens(sentence.pieces)
    assert len(pieces) > len(words) + 2 and (sentence.words, sentence.tags) == (words, [1, 0, 5])
    assert [pieces[at] for at in sentence.first] == [tokenizer.tokenize(word)[0] for word in words]
    scores = torch.randn(3, 7)
    expected = nn.functional.cross_entropy(scores, torch.tensor([1, 0, 5]))
    assert torch.equal(prime.tag_loss(lambda sentences: scores, [sentence]), expected)


def test_a_word_without_a_piece_has_no_features_and_no_loss(demo):
    """A word of invisible characters; the words beside it keep their tags."""
    (sentence,) = adapters.tokenize([(["a", "\u200d", "b"], [1, 2, 5])], demo[1], 128)
    assert sentence.first[1] == -1 and min(sentence.first[::2]) > 0
    model = adapters.Tagger(random_encoder("Bert", len(demo[1])), 7).double().eval()
    assert model.encode([sentence])[0].features.shape == (2, 16)
    scores = torch.randn(2, 7)
    expected = nn.functional.cross_entropy(scores, torch.tensor([1, 5]))
    assert torch.equal(prime.tag_loss(lambda sentences: scores, [sentence]), expected)


class Predictor(nn.Module):
    """Tags the words that have a piece with these numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = torch.tensor(numbers)

    def forward(self, sentences):
        return nn.functional.one_hot(self.numbers, 7).float()


def test_words_cut_off_count_as_o_and_are_told(demo, capsys):
    """By hand: five true entities, of which one loses its end and one is lost; four are predicted."""
    rows = [(list("abcdef"), [1, 2, 0, 3, 5, 6]), (list("ab"), [5, 0])]  # PER(ab) ORG(d) LOC(ef); LOC(a)
    whole = adapters.tokenize(rows, demo[1], 128)
    assert [sentence.first.count(-1) for sentence in whole] == [0, 0] and capsys.readouterr().err == ""
    rows.append((["a"] * 5 + ["b"], [0] * 5 + [1]))
    sentences = adapters.tokenize(rows, demo[1], 7)  # with [CLS] and [SEP] five words are left
    told = "no piece within --max-length 7: 2 of 14 words, in 2 of 3 sentences\n"
    assert capsys.readouterr().err == told
    kept = [tag for s in sentences for first, tag in zip(s.first, s.tags) if first >= 0]
    result = finetune.evaluate(Predictor(kept), sentences, TAGS)
    # true: PER ORG LOC | LOC | PER; predicted: PER ORG LOC(e) | LOC
    assert result["precision"] == pytest.approx(100 * 3 / 4)
    assert result["recall"] == pytest.approx(100 * 3 / 5)
    assert result["f1"] == pytest.approx(100 * 2 * 3 / (4 + 5))


# ---- the score ----


def conll_entities(tags):
    """By the rules of conlleval: an entity goes on with I- of its own type alone, and I- may begin one."""
    entities, begun = set(), None
    for position, tag in enumerate([*tags, "O"]):
        if begun and tag != f"I-{begun[1]}":
            entities.add((*begun, position))
            begun = None
        if tag != "O" and not begun:
            begun = position, tag[2:]
    return entities


def conll_score(gold, predicted):
    """Precision, recall and F1."""
    true, found = ({(i, *e) for i, tags in enumerate(rows) for e in conll_entities(tags)}
                   for rows in (gold, predicted))

    def part(true, found):
        right = len(true & found)
        f1 = 200 * right / (len(true) + len(found)) if true or found else 0.0
        return [100 * right / len(found) if found else 0.0, 100 * right / len(true) if true else 0.0, f1]

    return dict(zip(("precision", "recall", "f1"), part(true, found)))


def test_the_count_of_the_tests_is_conlls():
    iob1 = ["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG", "I-ORG"]
    assert conll_entities(iob1) == {(0, "PER", 2), (3, "LOC", 4), (4, "LOC", 5), (5, "ORG", 7)}


def test_score_equals_an_independent_count_on_1000_random_tag_sequences():
    chance = random.Random(0)
    begins_with_i = 0
    for _ in range(100):
        lengths = [chance.randint(1, 12) for _ in range(10)]
        gold = [chance.choices(range(7), [4, 1, 2, 1, 2, 1, 2], k=length) for length in lengths]
        predicted = [[tag if chance.random() < 0.8 else chance.randrange(7) for tag in row] for row in gold]
        words = [adapters.Sentence(["w"] * len(row), row, [], [0] * len(row)) for row in gold]
        model = Predictor([tag for row in predicted for tag in row])
        named = [[[TAGS[tag] for tag in row] for row in rows] for rows in (gold, predicted)]
        begins_with_i += sum(row[0].startswith("I-") for row in named[0])
        assert finetune.evaluate(model, words, TAGS) == pytest.approx(conll_score(*named))
    assert begins_with_i > 100


def test_nothing_found_where_there_is_nothing_has_the_score_zero():
    words = [adapters.Sentence(["w", "w"], [0, 0], [], [0, 0])]
    result = finetune.evaluate(Predictor([0, 0]), words, TAGS)
    assert (result["f1"], result["precision"], result["recall"]) == (0, 0, 0)


def test_score_equals_an_independent_count_on_the_predictions_of_a_tuned_model(demo, tmp_path):
    """Each sentence is tagged by itself, by an encoder and a head that are put together here."""
    from transformers import AutoModel

    flags = ["--tune", "full", "--init", "none", "--lr", 1e-3, "--epochs", 6, "--limit-train", 400]
    out = ["--results", tmp_path / "r", "--save", tmp_path]
    command("finetune.py", "--tgt", "hi", *DEMO, *flags, *out, "--limit-test", 300)
    (line,) = read_results(tmp_path / "r")
    tuned = tensors(tmp_path / "hi-0", "tuned.safetensors")
    encoder = AutoModel.from_pretrained("demo/encoder", dtype=torch.float32).eval()
    names = {n.removeprefix("encoder."): p for n, p in tuned.items() if n.startswith("encoder.")}
    assert not encoder.load_state_dict(names, strict=False).unexpected_keys
    gold, predicted = [], []
    for block in (HERE / "demo/wikiann/hi/test.txt").read_text().strip().split("\n\n")[:300]:
        words, tags = zip(*(row.split("\t") for row in block.split("\n")))
        encoded = demo[1](list(words), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(encoded["input_ids"]).last_hidden_state[0]
        firsts = [encoded.word_ids().index(word) for word in range(len(words))]
        scores = hidden[firsts] @ tuned["head.weight"].T + tuned["head.bias"]
        gold.append(list(tags))
        predicted.append([TAGS[best] for best in scores.argmax(dim=1).tolist()])
    expected = conll_score(gold, predicted)
    pairs = [pair for row in predicted for pair in zip(["O", *row], row)]
    assert expected["f1"] > 20 and any(b[0] == "I" and a[1:] != b[1:] for a, b in pairs)
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    shutil.rmtree(tmp_path / "hi-0")
