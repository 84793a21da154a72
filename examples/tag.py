"""Tags for new text from what `finetune.py --save tuned` kept: one sentence a line, its words between blanks.

    python examples/tag.py tuned/hi-0 sentences.txt          # - reads standard input

writes `word<TAB>tag` lines and a blank line after each sentence. Words that --max-length cuts off are tagged
O and told on standard error. `--init` names the base where it has been moved without the folder. With

    python examples/tag.py tuned/hi-0 --gold demo/wikiann hi test

the sentences are those of a split, and the lines `word<TAB>gold<TAB>tag`, as `conlleval` reads them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapters
import finetune
import prime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="DIR/LANG-SEED of finetune.py --save")
    parser.add_argument("file", nargs="?", help="text in UTF-8, or - for standard input")
    parser.add_argument("--gold", nargs=3, metavar=("DATA", "LANG", "SPLIT"), help="instead of the file")
    parser.add_argument("--init", help="the base that the folder was tuned on, if it is elsewhere now")
    parser.print_usage = lambda file=None: None  # a wrong flag ends with one line
    given = parser.parse_args()
    moved = ["--init", given.init] if given.init else []
    sys.argv[1:] = ["--tgt", "-", "--load", given.folder, *moved]  # the rest of the flags is in the folder
    args = finetune.parse_arguments()
    tags = prime.tag_names(args.types)
    if (given.file is None) == (given.gold is None):
        parser.error("name a file, or --gold")
    with prime.blaming(given.file or " ".join(given.gold)):
        if given.gold:
            rows = prime.read_split(*given.gold, args.types)
        else:
            data = sys.stdin.buffer.read() if given.file == "-" else Path(given.file).read_bytes()
            texts = [words for line in data.decode("utf-8-sig").split("\n") if (words := line.split())]
            rows = [(words, [0] * len(words)) for words in texts]
    encoder, tokenizer, saved = finetune.load_base(args)
    sentences = adapters.tokenize(rows, tokenizer, args.max_length)
    model, _ = finetune.start(args, encoder, saved, 0, sentences)
    predicted = finetune.predict(model, sentences, tags) if sentences else []
    for (words, gold), found in zip(rows, predicted, strict=True):
        columns = (words, [tags[tag] for tag in gold], found) if given.gold else (words, found)
        lines = ["\t".join(line) + "\n" for line in zip(*columns, strict=True)]
        sys.stdout.buffer.write("".join([*lines, "\n"]).encode())


if __name__ == "__main__":
    prime.run(main)
