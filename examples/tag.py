"""Tags new text with what `finetune.py --save tuned` wrote.

    python examples/tag.py tuned/hi-0 sentences.txt          # - reads standard input

The text has one sentence per line, with blanks between words. The output has a line `word<TAB>tag` per word
and an empty line after each sentence; an empty line of the text stays an empty line. Words that --max-length
cuts off are tagged O and counted on standard error. --init names the base if it was moved without the folder.

    python examples/tag.py tuned/hi-0 --gold demo/wikiann hi test

tags a split of a data set. The lines are then `word<TAB>gold tag<TAB>predicted tag`, as conlleval reads them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load import load_tagger

import adapters
import finetune


def split_words(text: bytes) -> list[list[str]]:
    """The words of each line. Only ASCII blanks separate words: a no-break space is part of one."""
    lines = text.removeprefix(b"\xef\xbb\xbf").splitlines()
    return [[word.decode() for word in line.split()] for line in lines]  # bytes split at ASCII blanks only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder LANG-SEED that finetune.py --save wrote")
    parser.add_argument("file", nargs="?", help="text in UTF-8, or - for standard input")
    parser.add_argument("--gold", nargs=3, metavar=("DATA", "LANG", "SPLIT"), help="tag a split instead")
    parser.add_argument("--init", help="the encoder that the folder was tuned on, if it was moved")
    args = parser.parse_args()
    if (args.file is None) == (args.gold is None):
        parser.error("expected either a file or --gold")
    if args.file:
        text = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        with adapters.error_context(f"{args.file}: expected UTF-8"):
            sentences = [(words, [0] * len(words)) for words in split_words(text)]
    model, tokenizer, tags = load_tagger(args.folder, args.init)
    if args.gold:
        types = [tag.removeprefix("B-") for tag in tags if tag.startswith("B-")]
        sentences = adapters.read_split(*args.gold, types)
    not_empty = [sentence for sentence in sentences if sentence[0]]
    predicted = iter([])
    if not_empty:
        tokenized = adapters.tokenize(not_empty, tokenizer, tokenizer.model_max_length)
        predicted = iter(finetune.predict(model, tokenized, tags))
    for words, gold in sentences:
        columns = [words, next(predicted)] if words else [[], []]
        if args.gold:
            columns.insert(1, [tags[tag] for tag in gold])
        lines = ["\t".join(row) + "\n" for row in zip(*columns, strict=True)]
        if sys.stdout:  # not closed
            sys.stdout.buffer.write("".join([*lines, "\n"]).encode())


if __name__ == "__main__":
    adapters.cli(main)
