"""What other tools load, from what `finetune.py --save` or `prime.py --pe lora` left.

    python examples/export.py tuned/nl-0 exported

`--tune full` and `--tune head` become a folder for `AutoModelForTokenClassification` and `pipeline`, with
names of tags and tokenizer. `--pe lora`, tuned or only primed, becomes a folder for
`PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)`. transformers has no class for an adapter
on top: examples/tag.py tags with it.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_lora(model, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    model.encoder.peft_config["default"].save_pretrained(folder)
    state = get_peft_model_state_dict(model.encoder)
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of finetune.py --save, or of prime.py --pe lora")
    parser.add_argument("output", type=Path, help="a new folder")
    given = parser.parse_args()
    primed = (given.folder / "priming.json").exists()
    sys.argv[1:] = ["--tgt", "-", "--init" if primed else "--load", str(given.folder)]
    args = finetune.parse_arguments()
    if args.tune == "adapter" and args.pe != "lora":
        told = f"no other tool has a class for --pe {args.pe} with a head on top"
        raise prime.BadInput(f"{given.folder}: {told}")
    with prime.blaming(f"writing {given.output}"):
        given.output.mkdir(parents=True)
    encoder, tokenizer, saved = finetune.load_base(args)
    model, _ = finetune.start(args, encoder, saved, 0, [])
    if args.tune == "adapter":
        export_lora(model, given.output)
    else:
        export_whole(model, tokenizer, prime.tag_names(args.types), given.output)
    print(f"{given.output}: {' '.join(sorted(path.name for path in given.output.iterdir()))}")


if __name__ == "__main__":
    prime.run(main)
