"""What transformers loads, from what `finetune.py --save` left.

    python examples/export.py tuned/nl-0 exported

`--tune full` and `--tune head` become a folder for `AutoModelForTokenClassification` and `pipeline`, with
names of tags and tokenizer. transformers has no class for an adapter on top, or for biases that were tuned
with it: examples/tag.py tags with them.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import finetune
import prime


def export_whole(model, tokenizer, tags: list[str], folder: Path) -> None:
    """Encoder and head under transformers' names; refused where its head has more layers than ours."""
    from transformers import AutoModelForTokenClassification

    config = model.encoder.config
    config.id2label, config.label2id = dict(enumerate(tags)), {tag: number for number, tag in enumerate(tags)}
    with torch.device("meta"):
        whole = AutoModelForTokenClassification.from_config(config)
    setattr(whole, whole.base_model_prefix, model.encoder)
    whole.classifier = model.head
    if any(parameter.is_meta for parameter in whole.parameters()):
        raise prime.BadInput(f"transformers' head for {config.model_type} has more layers than ours")
    with prime.blaming(f"writing {folder}"):
        folder.mkdir(parents=True)
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of finetune.py --save")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--init", help="the base that the folder was tuned on, if it is elsewhere now")
    parser.print_usage = lambda file=None: None  # a wrong flag ends with one line
    given = parser.parse_args()
    moved = ["--init", given.init] if given.init else []
    sys.argv[1:] = ["--tgt", "-", "--load", str(given.folder), *moved]
    args = finetune.parse_arguments()
    if args.tune == "adapter":
        raise prime.BadInput(f"{given.folder}: transformers has no class for --tune adapter")
    encoder, tokenizer, saved = finetune.load_base(args)
    model, _ = finetune.start(args, encoder, saved, 0, [])
    export_whole(model, tokenizer, prime.tag_names(args.types), given.output)
    print(f"{given.output}: {' '.join(sorted(path.name for path in given.output.iterdir()))}")


if __name__ == "__main__":
    prime.run(main)
