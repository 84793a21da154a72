"""LoRA (Hu et al. 2022, by peft) in the paper's experiment: priming, tuning, and a folder for `pipeline`.

    python examples/lora.py prime --src en es --model demo/encoder --data demo/wikiann --steps 400
    python examples/lora.py tune --tgt hi --data demo/wikiann --save tuned-lora

`prime` writes θp* to primed-lora/, as `AutoModel` reads it, and θa* to primed-lora/lora/, in peft's format.
`tune` continues from there, or with `--init none` from --model, prints F1 and saves LoRA and head:

    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, pipeline

    config = AutoConfig.from_pretrained("tuned-lora")
    base = AutoModelForTokenClassification.from_pretrained("primed-lora", config=config)
    model = PeftModel.from_pretrained(base, "tuned-lora")
    tokenizer = AutoTokenizer.from_pretrained("tuned-lora")
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer)

`prime` keeps checkpoints as prime.py does: the same command again resumes an interrupted run.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export

import adapters
import finetune
import prime

warnings.filterwarnings("ignore", "Could not find a config file", module="peft")  # a moved base is no fault


def lora_config(encoder, rank: int, task: str = "FEATURE_EXTRACTION"):
    """LoRA of rank `rank` with α = 2 · rank, on peft's default layers of the encoder, or if peft has none on
    all linear layers but the pooler's."""
    try:
        import peft
    except ImportError:
        raise adapters.UserError("LoRA needs peft: pip install peft==0.21.2") from None
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    known = encoder.config.model_type in DEFAULTS
    layers = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    targets = None if known else [name for name in layers if not name.startswith("pooler.")]
    return peft.LoraConfig(task, r=rank, lora_alpha=2 * rank, target_modules=targets)


def add_lora(encoder, rank: int):
    """A PeftModel of the encoder, none of it frozen: peft freezes θp, but line 9 updates it."""
    config = lora_config(encoder, rank)
    from peft import get_peft_model

    return get_peft_model(encoder, config).requires_grad_()


def split_parameters(model: adapters.Tagger) -> adapters.ParameterSets:
    """θp, θa and θh: the encoder without its pooler, LoRA, and the head."""
    theta_p, _, theta_h = model.split_parameters()
    theta_a = {name: theta_p.pop(name) for name in [*theta_p] if ".lora_" in name}
    theta_p = {name: p for name, p in theta_p.items() if ".pooler." not in name}
    return adapters.ParameterSets(theta_p, theta_a, theta_h)


def prime_lora(args) -> None:
    """Algorithm 1 or an ablation with LoRA as θa. It is inside of f, so each inner step runs the encoder."""
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, args.max_length)
    options = tokenizer, args.types, args.max_length, args.limit_train, args.support + args.query
    corpora = [adapters.load_sentences(args.data, name, "train", *options) for name in args.src]
    not_compared = ("model", "data", "device", "output", "save_every")  # as in prime.py
    settings = {name: value for name, value in vars(args).items() if name not in not_compared}
    settings |= adapters.fingerprint(encoder, corpora)
    lora = add_lora(encoder, args.rank)
    model = adapters.build_tagger(lora, args.types, None, 0, args.device, args.bf16)
    adapters.claim(args.output, settings)
    if (args.output / "priming.json").exists():
        adapters.read_record(args.output / "priming.json", check_weights=True)
        return print(f"{args.output} is complete")
    theta_p, theta_a, theta_h = split_parameters(model)
    inner_steps, support, query = args.inner_steps, args.support, args.query
    if args.method == "ft":  # as in prime.py
        theta_p, theta_h, inner_steps = {**theta_p, **theta_h}, {}, 0
        support, query = 0, support + query
        model.train()
    outer_params = [*theta_p.values(), *theta_a.values()]
    optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, args.outer_lr, args.steps)
    checkpoint, stateful = args.output / "checkpoint.pt", (model, optimizer, scheduler)
    losses = adapters.load_checkpoint(checkpoint, args.device, stateful)
    batches = prime.sample_batches(
        corpora, args.steps, args.tasks, support, query, args.seed, start_step=len(losses))
    meta_training = prime.prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=adapters.tag_loss,
        optimizer=optimizer, scheduler=scheduler, inner_lr=args.inner_lr, inner_steps=inner_steps,
        maml=args.method == "maml")
    for query_losses in tqdm(meta_training, "priming", args.steps, initial=len(losses), disable=None):
        losses.append(sum(query_losses))
        message = f"meta step {len(losses)}: lower --inner-lr or --outer-lr"
        adapters.expect(math.isfinite(losses[-1]), message)
        if len(losses) % args.save_every == 0 or len(losses) == args.steps:
            with adapters.atomic_write(checkpoint) as new:
                torch.save((losses, [part.state_dict() for part in stateful]), new)
    lora.peft_config["default"].base_model_name_or_path = str(args.output)  # not the pretrained encoder
    with adapters.error_context(f"writing {args.output}"):
        lora.save_pretrained(args.output / "lora")
        tokenizer.save_pretrained(args.output)
        lora.unload().save_pretrained(args.output)
    record = {**vars(args), **settings, "last_losses": losses[-10:]}
    record["files"] = adapters.file_checksums(args.output)
    adapters.write_record(args.output / "priming.json", record)
    for path in [checkpoint, *args.output.glob("*.new")]:
        path.unlink(missing_ok=True)
    print(f"{args.output}: {args.steps} steps; query loss {losses[0]:.3f} → {losses[-1]:.3f}")


def tune_lora(args) -> None:
    """Tunes LoRA and a new head for one language, prints the score and saves both."""
    torch.manual_seed(args.seed)
    primed = args.init != "none"
    priming = Path(args.init) / "priming.json"
    record = adapters.read_record(priming, check_weights=True) if primed else vars(args)
    base, rank, types = args.init if primed else args.model, record["rank"], record["types"]
    encoder, tokenizer = adapters.load_encoder(base, args.max_length)
    options = tokenizer, types, args.max_length
    train = adapters.load_sentences(args.data, args.tgt, "train", *options, args.limit_train)
    test = adapters.load_sentences(args.data, args.tgt, args.split, *options, args.limit_test)
    lora = add_lora(encoder, rank)
    if primed:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(lora, load_peft_weights(str(Path(base) / "lora"), "cpu"))
    model, tags = adapters.build_tagger(lora, types, None, 0, args.device), adapters.tag_names(types)
    theta_p, theta_a, theta_h = split_parameters(model)
    for p in theta_p.values():
        p.requires_grad_(False)
    finetune.fine_tune(
        model, theta_a | theta_h, train, epochs=args.epochs, min_steps=args.min_steps, lr=args.lr,
        batch_size=args.batch_size, seed=args.seed, dropout=False)
    score = finetune.evaluate(model, test, tags)
    print(f"{args.tgt} seed {args.seed}: " + "F1 {f1:.2f}  P {precision:.2f}  R {recall:.2f}".format(**score))
    if args.save:
        with adapters.error_context(f"writing {args.save}"):
            save_for_transformers(model, tags, base, rank, args.save)
            tokenizer.save_pretrained(args.save)
    if args.results:
        names = {"target": args.tgt, "train_sentences": len(train), "test_sentences": len(test)}
        with args.results.open("a") as file:
            file.write(json.dumps({**vars(args), **names, **score}, default=str) + "\n")


def save_for_transformers(model: adapters.Tagger, tags, base: str, rank: int, folder: Path) -> None:
    """Writes LoRA and head under the names that they have in `AutoModelForTokenClassification`: there, the
    encoder is one of its modules (`bert.encoder…`), and the head is in peft's `modules_to_save`."""
    import peft

    tuned = peft.get_peft_model_state_dict(model.encoder)
    encoder = model.encoder.unload()
    targets = model.encoder.peft_config["default"].target_modules
    classifier = export.to_token_classifier(
        adapters.Tagger(encoder, len(tags), pe=None).to(model.head.weight.device), tags)
    classifier.name_or_path = str(base)
    config = peft.LoraConfig("TOKEN_CLS", r=rank, lora_alpha=2 * rank, target_modules=targets)
    with_lora = peft.get_peft_model(classifier, config)
    prefix = f"base_model.model.{classifier.base_model_prefix}."
    state = {name.replace("base_model.model.", prefix, 1): p for name, p in tuned.items()}
    state |= {f"base_model.model.classifier.{name}": p for name, p in model.head.state_dict().items()}
    result = peft.set_peft_model_state_dict(with_lora, state)
    if result.unexpected_keys:
        raise RuntimeError(f"LoRA has other names: {result.unexpected_keys}")
    with_lora.save_pretrained(folder)
    classifier.config.save_pretrained(folder)  # the names of the tags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    positive = adapters.positive
    formatter = argparse.ArgumentDefaultsHelpFormatter
    for name, function in (("prime", prime_lora), ("tune", tune_lora)):
        summary = function.__doc__.partition(".")[0]
        command = commands.add_parser(name, help=summary, formatter_class=formatter)
        command.set_defaults(function=function)
        add = command.add_argument
        add("--model", default=adapters.MODEL_DEFAULTS["model"], help="encoder: hub name or folder")
        add("--data", default="unimelb-nlp/wikiann", help="labelled sentences: hub name or folder")
        add("--types", nargs="+", default=adapters.MODEL_DEFAULTS["types"], help="entity types")
        add("--rank", type=positive(int), default=8, help="rank of LoRA; its scale is 2")
        add("--max-length", type=positive(int), default=128, help="word pieces per sentence")
        add("--limit-train", type=positive(int), help="only the first N training sentences")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
        add("--bf16", action="store_true", help="run the encoder in bfloat16")
        add("--seed", type=positive(int, zero=True), default=0, help="for weights and sampling")
    add = commands.choices["prime"].add_argument
    add("--src", nargs="+", default=["en", "es"], metavar="LANG", help="source languages")
    add("--method", choices=["meta", "maml", "ft"], default="meta",
        help="Algorithm 1, its MAML loop, or plain fine-tuning")
    add("--inner-steps", type=positive(int), default=5, help="S")
    add("--inner-lr", type=positive(float), default=0.03, help="α")
    add("--outer-lr", type=positive(float), default=5e-5, help="β")
    add("--steps", type=positive(int), default=1000, help="number of meta steps")
    add("--tasks", type=positive(int), default=2, help="tasks per meta step")
    add("--support", type=positive(int), default=16, help="support sentences per task")
    add("--query", type=positive(int), default=16, help="query sentences per task")
    add("--save-every", type=positive(int), default=100, help="meta steps between checkpoints")
    add("--output", type=Path, default=Path("primed-lora"), help="folder for θp* and θa*")
    add = commands.choices["tune"].add_argument
    add("--tgt", default="hi", metavar="LANG", help="target language")
    add("--init", default="primed-lora", help="folder of `lora.py prime`, or none to start from --model")
    add("--epochs", type=positive(int), default=10, help="passes over the training sentences")
    add("--min-steps", type=positive(int, zero=True), default=0, help="least number of steps")
    add("--lr", type=positive(float), default=1e-3, help="AdamW's rate, which falls to 0")
    add("--batch-size", type=positive(int), default=16, help="sentences per step")
    add("--split", choices=["test", "validation"], default="test", help="split to score")
    add("--limit-test", type=positive(int), help="score its first N sentences only")
    add("--save", type=Path, help="new folder for the tuned LoRA and head")
    add("--results", type=Path, help="file to which the score is appended, as a line of JSON")
    args = parser.parse_args()
    save = vars(args).get("save")
    if save and save.exists():
        raise adapters.UserError(f"{save} already exists: choose another folder")
    run = vars(args).pop("function")
    run(args)


if __name__ == "__main__":
    adapters.cli(main)
