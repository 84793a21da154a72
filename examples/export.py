"""Exports what `finetune.py --save` wrote to transformers.

    python examples/export.py tuned/nl-0 exported

What --tune full or --tune head saved becomes a folder for `AutoModelForTokenClassification` and `pipeline`,
with the names of the tags and the tokenizer. transformers has no class for an adapter on top of an encoder:
use examples/tag.py for what --tune adapter saved.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapters
import finetune


def to_token_classifier(model: adapters.Tagger, tags: list[str]) -> torch.nn.Module:
    """Encoder and head in the class that transformers has for them. Raises UserError if it has none."""
    from transformers import AutoModelForTokenClassification

    config = model.encoder.config
    config.id2label, config.label2id = dict(enumerate(tags)), {tag: i for i, tag in enumerate(tags)}
    source = f"transformers has no class for token classification with {config.model_type}"
    with adapters.error_context(source), torch.device("meta"):
        classifier = AutoModelForTokenClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.encoder)
    classifier.classifier = model.head
    if any(p.is_meta for p in classifier.parameters()):
        raise adapters.UserError(f"transformers' head for {config.model_type} is not one linear layer")
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder LANG-SEED that finetune.py --save wrote")
    parser.add_argument("output", type=Path, help="new folder for the exported model")
    parser.add_argument("--init", help="the encoder that the folder was tuned on, if it was moved")
    args = parser.parse_args()
    if args.output.exists():
        raise adapters.UserError(f"{args.output} already exists: choose a new folder")
    model, tokenizer, tags = finetune.load_tagger(args.folder, args.init)
    if model.pe:
        raise adapters.UserError(f"{args.folder}: transformers has no class for --tune adapter; use tag.py")
    classifier = to_token_classifier(model, tags)
    with adapters.atomic_write(args.output) as new:
        new.mkdir(parents=True)
        classifier.save_pretrained(new)
        tokenizer.save_pretrained(new)
    print(f"{args.output}: {' '.join(sorted(path.name for path in args.output.iterdir()))}")


if __name__ == "__main__":
    adapters.cli(main)
