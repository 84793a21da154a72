"""The examples: tags for text, export to transformers, LoRA, a causal language model, and sine waves."""

import copy
import io
import re
import sys

import pytest
import torch
from conftest import (
    FROM_PRETRAINED, HERE, HINDI, SMALL_TUNING, TAGS, command, moved, needs_peft,
    random_encoder, read_results, save_encoder, score_saved,
)
from load import load_tagger

import adapters
import finetune

TEXT = ("Delhi is a city .\n\n  zxq\u0301 \U0001f600 दिल्ली\tम\u200dें \n\t \n"
        "New\u00a0Delhi and\u3000so\u2028on\r\nDelhi\n")
WORDS = [  # of each line; only ASCII blanks separate them
    ["Delhi", "is", "a", "city", "."], [], ["zxq\u0301", "\U0001f600", "दिल्ली", "म\u200dें"], [],
    ["New\u00a0Delhi", "and\u3000so\u2028on"], ["Delhi"],
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder of --save for each --tune, trained until it finds entities."""
    root = tmp_path_factory.mktemp("tuned")
    for tune, lr in {"adapter": 1e-2, "head": 1e-1, "full": 1e-3}.items():
        command("finetune.py", *HINDI, *FROM_PRETRAINED, "--epochs", 10, "--tune", tune,
                "--lr", lr, "--save", root / tune, "--results", root / "results")
    assert all(record["f1"] > 20 for record in read_results(root / "results"))
    return root


def sentences_of(output):
    """The lines of each sentence; an empty line ends it."""
    assert output == "" or output.endswith("\n\n") or output == "\n"
    sentences = [[]]
    for line in output.split("\n")[:-1]:
        if line:
            sentences[-1].append(line.split("\t"))
        else:
            sentences.append([])
    return sentences[:-1]


# ---- tag.py ----


@pytest.mark.parametrize("tune", ["adapter", "head", "full"])
def test_each_word_of_a_text_gets_the_models_tag_and_each_line_of_text_a_sentence(tune, tuned, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    done = command("examples/tag.py", tuned / tune / "hi-0", tmp_path / "text.txt")
    sentences = sentences_of(done.stdout)
    assert [[word for word, _ in sentence] for sentence in sentences] == WORDS
    assert done.stderr == ""
    model, tokenizer, tags = load_tagger(str(tuned / tune / "hi-0"))
    assert tags == TAGS
    for sentence, words in zip(sentences, WORDS, strict=True):
        if words:
            (alone,) = adapters.tokenize([(words, [0] * len(words))], tokenizer, 128)
            best = iter(model([alone]).argmax(dim=-1).tolist())
            expected = [tags[next(best)] if start >= 0 else "O" for start in alone.word_starts]
            assert [tag for _, tag in sentence] == expected


def test_text_from_standard_input_gives_the_same_tags_as_from_a_file(tuned, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    from_file = command("examples/tag.py", tuned / "head/hi-0", tmp_path / "text.txt").stdout
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert command("examples/tag.py", tuned / "head/hi-0", "-").stdout == from_file


def test_words_that_are_cut_off_are_tagged_o_and_counted(tuned, tmp_path):
    (tmp_path / "text.txt").write_text("Delhi " * 200)
    done = command("examples/tag.py", tuned / "full/hi-0", tmp_path / "text.txt")
    ((*words,),) = sentences_of(done.stdout)
    cut_off = 200 - 126  # 128 pieces, two of them special tokens
    assert len(words) == 200 and all(tag == "O" for _, tag in words[-cut_off:])
    assert f"{cut_off} of 200 words" in done.stderr and "--max-length 128" in done.stderr


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_text_without_words_has_only_its_empty_lines(text, tuned, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    done = command("examples/tag.py", tuned / "head/hi-0", tmp_path / "text.txt")
    assert done.stdout == "\n" * text.count("\n")


def test_bad_text_and_bad_folders_end_tag_with_one_line(tuned, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"Delhi \xff\n")
    (line,) = command("examples/tag.py", tuned / "head/hi-0", path, status=2).stderr.splitlines()
    assert line.startswith(f"tag.py: {path}: expected UTF-8: UnicodeDecodeError")
    path.write_text("Delhi\n")
    (line,) = command("examples/tag.py", tmp_path, path, status=2).stderr.splitlines()
    assert line.startswith(f"tag.py: {tmp_path}/tuned.json: ")
    (line,) = command("examples/tag.py", tuned / "head/hi-0", tmp_path / "x", status=2).stderr.splitlines()
    assert "No such file" in line
    *_, line = command("examples/tag.py", tuned / "head/hi-0", status=2).stderr.splitlines()
    assert "either a file or --gold" in line


def test_the_tags_of_a_split_have_the_score_that_finetune_reports(tuned):
    """F1 is counted here by seqeval, from the gold and the predicted column."""
    from seqeval.metrics import f1_score

    (record,) = [record for record in read_results(tuned / "results") if record["tune"] == "full"]
    output = command("examples/tag.py", tuned / "full/hi-0", "--gold", "demo/wikiann", "hi", "test").stdout
    _, gold, predicted = zip(*(zip(*sentence) for sentence in sentences_of(output)))
    assert 100 * f1_score([*map(list, gold)], [*map(list, predicted)]) == pytest.approx(record["f1"])
    assert score_saved(tuned / "full/hi-0") == pytest.approx(record["f1"])


# ---- export.py ----


@pytest.mark.parametrize("tune", ["head", "full"])
def test_transformers_gives_the_same_logits_from_an_exported_folder(tune, tuned, tmp_path):
    import transformers

    command("examples/export.py", tuned / tune / "hi-0", tmp_path / "out")
    exported = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert exported.config.id2label == dict(enumerate(TAGS))
    model, tokenizer, _ = load_tagger(tuned / tune / "hi-0")
    (sentence,) = adapters.tokenize([(["Delhi", "is", "here"], [0, 0, 0])], tokenizer, 128)
    logits = exported(input_ids=torch.tensor([sentence.input_ids])).logits[0, sentence.word_starts]
    torch.testing.assert_close(logits, model([sentence]), rtol=0, atol=1e-5)
    tagger = transformers.pipeline("token-classification", model=str(tmp_path / "out"))
    assert {entity["entity"] for entity in tagger("Delhi is here")} <= {*TAGS}


def test_what_cannot_be_exported_ends_with_one_line_and_writes_nothing(tuned, tmp_path):
    def failure(folder, output):
        (line,) = command("examples/export.py", folder, output, status=2).stderr.splitlines()
        return line

    assert "transformers has no class for --pe adapter" in failure(tuned / "adapter/hi-0", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    assert f"{tmp_path}/mine already exists" in failure(tuned / "head/hi-0", tmp_path / "mine")
    encoder = save_encoder(random_encoder("Splinter", 1834), tmp_path / "encoder")
    command("finetune.py", *HINDI, *SMALL_TUNING, "--init", "none", "--model", encoder, "--tune", "head",
            "--save", tmp_path / "tuned", "--results", tmp_path / "results")
    line = failure(tmp_path / "tuned/hi-0", tmp_path / "out")
    assert "transformers has no class for token classification with splinter" in line
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob("out*.new")]


# ---- peft ----


@needs_peft
def test_a_primed_causal_model_is_the_same_after_saving_and_loading(tmp_path):
    """Base and LoRA: both were moved by priming, and only LoRA is trained later."""
    import causal_lm

    torch.manual_seed(0)
    model = causal_lm.add_lora(causal_lm.load_base(None))
    initial_state = copy.deepcopy(dict(model.named_parameters()))
    causal_lm.prime_lora(model, steps=2, outer_lr=2e-3)
    primed = copy.deepcopy(dict(model.named_parameters()))
    assert moved(primed, initial_state) == primed.keys()
    causal_lm.save(model, tmp_path)
    loaded = causal_lm.load(tmp_path)
    after = dict(loaded.named_parameters())
    assert after.keys() == primed.keys() and not moved(after, primed)
    trained = {name for name, p in after.items() if p.requires_grad}
    assert trained == {name for name in after if ".lora_" in name}


@needs_peft
@pytest.mark.early(["examples/causal_lm.py", "--output", "OUT/out"])
def test_causal_lm_shows_the_gain_of_priming_on_new_ciphers(early):
    """The example's own claim: ten steps of SGD get at least 25 points further after priming."""
    folder, (printed,) = early
    first, *lines = printed.splitlines()
    before, after = (float(number) for number in first.split("query loss ")[1].split(" in ")[0].split(" → "))
    assert after < before
    shares = [[float(part.split()[-1].rstrip("%")) for part in line.split(", ")] for line in lines]
    assert len(shares) == 2 and all(primed > not_primed for not_primed, primed in shares)
    assert shares[0][1] >= shares[0][0] + 25
    assert {"base", "lora"} == {path.name for path in (folder / "out").iterdir()}


# ---- sinusoid.py, README ----


@pytest.mark.early(["examples/sinusoid.py"])
def test_an_mlp_that_is_primed_for_sine_waves_fits_new_ones_in_100_steps(early):
    _, (printed,) = early
    first, *rows = printed.splitlines()[1:]
    errors = [float(row.split()[-1]) for row in rows]
    assert len(first.split()) == 3 + 11 and len(errors) == 4
    assert errors[3] < 0.5 * min(errors[:3])


def block_of_the_readme(call):
    """The code block of examples/README.md that calls a function."""
    readme = (HERE / "examples/README.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if call in code]
    return block


def test_serving_many_languages_from_one_encoder_as_the_examples_readme_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").mkdir()
    from_demo = ["--data", HERE / "demo/wikiann", "--init", "none", "--model", HERE / "demo/encoder"]
    for i, language in enumerate(("hi", "nl")):
        command("finetune.py", "--tgt", language, *from_demo, *SMALL_TUNING, "--seeds", i,
                "--save", tmp_path / "all", "--results", tmp_path / "r")
        (tmp_path / f"all/{language}-{i}").rename(tmp_path / f"tuned/{language}-0")
    scope = {}
    exec(block_of_the_readme("predict("), scope)
    assert scope["taggers"].keys() == {"hi-0", "nl-0"}
    for name, tagger in scope["taggers"].items():
        assert tagger.encoder is scope["first"].encoder
        alone, _, tags = load_tagger(tmp_path / "tuned" / name)
        served, expected = (finetune.predict(model, scope["sentences"], tags) for model in (tagger, alone))
        assert served == expected


def test_scoring_as_the_examples_readme_does_gives_the_score_of_finetune(tuned, tmp_path, monkeypatch):
    """finetune.py trains the same model again, and scores it itself on the validation split."""
    command("finetune.py", *HINDI, *FROM_PRETRAINED, "--epochs", 10, "--lr", 1e-2, "--split", "validation",
            "--results", tmp_path / "results")
    (record,) = read_results(tmp_path / "results")
    (tmp_path / "tuned").symlink_to(tuned / "adapter")
    (tmp_path / "conll").symlink_to(HERE / "demo/wikiann")
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(block_of_the_readme("evaluate("), {"print": printed.append})
    assert printed == [{name: pytest.approx(record[name]) for name in ("f1", "precision", "recall")}]
    assert record["f1"] > 20
