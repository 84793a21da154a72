"""Loads what `finetune.py --save` wrote, for your own code:

    import sys
    sys.path += [".", "examples"]  # from the folder of finetune.py
    from load import load_tagger

    model, tokenizer, tags = load_tagger("tuned/hi-0")
"""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapters


def load_tagger(
    folder: str | Path, base: str | None = None, device: str = "cpu"
) -> tuple[adapters.Tagger, Any, list[str]]:
    """The model in eval mode, its tokenizer and the names of its tags.

    folder: LANG-SEED, as `--save` wrote it.
    base: where its encoder is now, if that was moved without the folder.

    Raises UserError if a file is missing or is not the one that was saved, or if `base` is another encoder.
    """
    folder = Path(folder)
    record = adapters.read_record(folder / "tuned.json", check_weights=True)
    local_base = (folder / record["base"]).resolve()
    if base is None and record["base"].startswith("..") and not local_base.is_dir():
        raise adapters.UserError(f"{folder}: its encoder is not at {local_base} any more: say where (--init)")
    base = base or str(local_base if local_base.is_dir() else record["base"])
    encoder, tokenizer = adapters.load_encoder(base, record["max_length"])
    same = adapters.fingerprint(encoder).items() <= record.items()
    adapters.expect(same, f"{folder} was not tuned on {base}: pass its encoder")
    pe = record["pe"] if record["tune"] == "adapter" else None
    model = adapters.build_tagger(
        encoder, record["types"], pe, record["bottleneck"], device, record["bf16"])
    model.load_state_dict(model.state_dict() | load_file(folder / "tuned.safetensors"))
    tokenizer.model_max_length = record["max_length"]
    return model, tokenizer, adapters.tag_names(record["types"])
