"""Exports what `finetune.py --save` wrote, for transformers and peft.

    python examples/export.py tuned/nl-0 exported

What --tune full, --tune head or --pe bitfit saved becomes a folder for `AutoModelForTokenClassification` and
`pipeline`, with the names of the tags and the tokenizer. After `--pe lora`, it holds LoRA and the head
in peft's format, and refers to the primed encoder:

    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, pipeline

    config = AutoConfig.from_pretrained("exported")
    base = AutoModelForTokenClassification.from_pretrained("primed", config=config)
    model = PeftModel.from_pretrained(base, "exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer)

transformers has no class for an adapter on top of an encoder: use examples/tag.py for those.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load import load_tagger

import adapters


def to_token_classifier(encoder: torch.nn.Module, head: torch.nn.Linear, tags: list[str]) -> torch.nn.Module:
    """Encoder and head in the class that transformers has for them. Raises UserError if it has none."""
    from transformers import AutoModelForTokenClassification

    config = encoder.config
    config.id2label, config.label2id = dict(enumerate(tags)), {tag: i for i, tag in enumerate(tags)}
    source = f"transformers has no class for token classification with {config.model_type}"
    with adapters.error_context(source), torch.device("meta"):
        classifier = AutoModelForTokenClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, encoder)
    classifier.classifier = head
    if any(p.is_meta for p in classifier.parameters()):
        raise adapters.UserError(f"transformers' head for {config.model_type} is not one linear layer")
    return classifier


def to_peft(model: adapters.Tagger, tags: list[str], base: str) -> torch.nn.Module:
    """A PeftModel of the token classifier, with the head in peft's `modules_to_save`. In the classifier the
    encoder is one of the modules, so each parameter of LoRA gets another name (`bert.encoder…`)."""
    import peft

    lora = peft.get_peft_model_state_dict(model.encoder, save_embedding_layers=False)
    config = model.encoder.peft_config["default"]
    config.task_type, config.base_model_name_or_path = peft.TaskType.TOKEN_CLS, base
    classifier = to_token_classifier(model.encoder.unload(), model.head, tags)
    classifier.name_or_path = base
    with_lora = peft.get_peft_model(classifier, config)
    prefix = f"base_model.model.{classifier.base_model_prefix}."
    state = {name.replace("base_model.model.", prefix, 1): p for name, p in lora.items()}
    state |= {f"base_model.model.classifier.{name}": p for name, p in model.head.state_dict().items()}
    result = peft.set_peft_model_state_dict(with_lora, state)
    if result.unexpected_keys:
        raise RuntimeError(f"LoRA has other names: {result.unexpected_keys}")
    return with_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder LANG-SEED that finetune.py --save wrote")
    parser.add_argument("output", type=Path, help="new folder for the exported model")
    parser.add_argument("--init", help="the encoder that the folder was tuned on, if it was moved")
    args = parser.parse_args()
    if args.output.exists():
        raise adapters.UserError(f"{args.output} already exists: choose a new folder")
    model, tokenizer, tags = load_tagger(args.folder, args.init)
    if model.pe == "adapter":
        raise adapters.UserError(f"{args.folder}: transformers has no class for --pe adapter; use tag.py")
    if model.pe == "lora":
        exported = to_peft(model, tags, model.encoder.name_or_path)
        config = exported.get_base_model().config  # the names of the tags
    else:
        exported = config = to_token_classifier(model.encoder, model.head, tags)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as parent:
        new = Path(parent, args.output.name)
        with adapters.error_context(f"writing {args.output}"):
            for part in (exported, config, tokenizer):
                part.save_pretrained(new)
        new.replace(args.output)
    print(f"{args.output}: {' '.join(sorted(path.name for path in args.output.iterdir()))}")


if __name__ == "__main__":
    adapters.cli(main)
