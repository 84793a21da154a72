"""The examples that carry what was tuned to text and to other tools."""

import sys

import pytest
import torch
from conftest import DEMO, EXTRA, HINDI, SMALL_PRIMING, SMALL_TUNING, START, command, read_results

import adapters
import finetune
import prime

TEXT = "Delhi is a city .\n\n  zxq\u0301 \U0001f600 दिल्ली\tम\u200dें \nDelhi\n"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A pair tuned by each --tune."""
    root = tmp_path_factory.mktemp("tuned")
    for tune in ("adapter", "head", "full"):
        command("finetune.py", *HINDI, *START, *SMALL_TUNING, "--tune", tune, "--save", root / tune,
                "--results", root / "results")
    return root


def model_of(folder):
    """What finetune.py loads."""
    argv, sys.argv = sys.argv, ["finetune.py", "--tgt", "-", *map(str, folder)]
    try:
        args = finetune.parse_arguments()
    finally:
        sys.argv = argv
    encoder, tokenizer, saved = finetune.load_base(args)
    return finetune.start(args, encoder, saved, 0, [])[0], tokenizer


@pytest.mark.parametrize("tune", ["adapter", "head", "full"])
def test_every_word_of_a_text_gets_a_line_and_the_tag_that_the_model_gives(tune, tuned, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    done = command("examples/tag.py", tuned / tune / "hi-0", tmp_path / "text.txt")
    blocks = [[line.split("\t") for line in block.split("\n")] for block in done.stdout.strip("\n").split("\n\n")]
    words = [line.split() for line in TEXT.split("\n") if line.split()]
    assert [[word for word, _ in block] for block in blocks] == words and done.stderr == ""
    model, tokenizer = model_of(["--load", tuned / tune / "hi-0"])
    tags = prime.tag_names(["PER", "ORG", "LOC"])
    for block, sentence in zip(blocks, words, strict=True):
        (alone,) = adapters.tokenize([(sentence, [0] * len(sentence))], tokenizer, 128)
        best = model([alone]).argmax(dim=-1).tolist()
        assert [tag for _, tag in block] == [tags[i] for i in best]


def test_a_text_that_is_too_long_or_not_utf_8_is_told(tuned, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Delhi " * 200)
    done = command("examples/tag.py", tuned / "head/hi-0", path)
    assert done.stdout.count("Delhi\t") == 200 and "no piece within --max-length 128: " in done.stderr
    path.write_text("\n \n")
    assert command("examples/tag.py", tuned / "head/hi-0", path).stdout == ""
    path.write_bytes(b"Delhi \xff\n")
    (line,) = command("examples/tag.py", tuned / "head/hi-0", path, status=2).stderr.splitlines()
    assert "text.txt: UnicodeDecodeError" in line
    (line,) = command("examples/tag.py", tmp_path, path, status=2).stderr.splitlines()
    assert "which --save writes: FileNotFoundError" in line


@pytest.mark.parametrize("tune", ["head", "full"])
def test_transformers_loads_what_was_exported_and_scores_alike(tune, tuned, tmp_path):
    import transformers

    command("examples/export.py", tuned / tune / "hi-0", tmp_path / "out")
    whole = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert whole.config.id2label == dict(enumerate(prime.tag_names(["PER", "ORG", "LOC"])))
    model, tokenizer = model_of(["--load", tuned / tune / "hi-0"])
    (sentence,) = adapters.tokenize([(["Delhi", "is", "here"], [0, 0, 0])], tokenizer, 128)
    scores = whole(input_ids=torch.tensor([sentence.pieces])).logits[0, sentence.first]
    torch.testing.assert_close(scores, model([sentence]), rtol=0, atol=1e-5)
    tagger = transformers.pipeline("token-classification", model=str(tmp_path / "out"))
    assert {found["entity"] for found in tagger("Delhi is here")} <= {*whole.config.id2label.values()}


def test_predictions_of_a_split_have_the_score_that_finetune_tells(tuned, tmp_path):
    """Counted by seqeval in its own words: the columns are gold and predicted."""
    from seqeval.metrics import f1_score

    command("finetune.py", *HINDI, "--load", tuned / "full/hi-0", "--results", tmp_path)
    (line,) = read_results(tmp_path)
    told = command("examples/tag.py", tuned / "full/hi-0", "--gold", "demo/wikiann", "hi", "test").stdout
    blocks = [[row.split("\t") for row in block.split("\n")] for block in told.strip("\n").split("\n\n")]
    _, gold, found = zip(*(zip(*block) for block in blocks))
    assert 100 * f1_score([*map(list, gold)], [*map(list, found)]) == pytest.approx(line["f1"])


@EXTRA
def test_peft_loads_what_was_primed_for_lora(monkeypatch, tmp_path):
    """With the features of the model that was primed; both θp and θa have moved."""
    import peft
    import transformers

    primed, saved = [], peft.PeftModel.save_pretrained
    ids = torch.arange(10, 40)[None]

    def spy(self, folder, **more):
        primed.append(self(input_ids=ids).last_hidden_state.detach().clone())
        saved(self, folder, **more)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", spy)
    command("examples/lora.py", *DEMO, *SMALL_PRIMING, "--outer-lr", 1e-3, "--output", tmp_path / "primed")
    base = transformers.AutoModel.from_pretrained(tmp_path / "primed")
    pretrained = transformers.AutoModel.from_pretrained("demo/encoder")
    plain, before = (model(input_ids=ids).last_hidden_state for model in (base, pretrained))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "primed/lora").eval()
    found = theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, primed[0], rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-5 and (plain - before).abs().max() > 1e-3


def test_what_no_other_tool_has_a_class_for_is_refused(tuned, tmp_path):
    (line,) = command("examples/export.py", tuned / "adapter/hi-0", tmp_path / "out", status=2).stderr.splitlines()
    assert "transformers has no class" in line and not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (line,) = command("examples/export.py", tuned / "head/hi-0", tmp_path / "mine", status=2).stderr.splitlines()
    assert "mine: FileExistsError" in line
