"""The whole job beside what is on the shelf: transformers' Trainer, with peft or a frozen encoder.

    python benchmarks/shelf.py --model ENCODER --data WIKIANN --tgt nl

Each job is a process of its own, one after the other: seconds of training and of scoring, F1, and the most
memory that the process held. Loading libraries, encoder and data is not counted. Trainer takes the same
sentences, model, loss, batch size, rate and schedule, and pads each batch to its longest sentence; peft's
model has its own head, and dropout, as people run it. `priming` is Algorithm 1, S = 5, against fine-tuning
everything in Trainer on as many sentences a step. Needs peft and accelerate (benchmarks/requirements.txt).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import finetune
import prime

TYPES = ["PER", "ORG", "LOC"]
TAGS = prime.tag_names(TYPES)


class OnTop(nn.Module):
    """The parts of a `Tagger` as Trainer calls them, on padded batches."""

    def __init__(self, tagger: adapters.Tagger):
        super().__init__()
        self.encoder, self.adapter, self.head = tagger.encoder, tagger.adapter, tagger.head

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        scores = self.head(self.adapter(hidden))
        return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


def for_trainer(sentences):
    rows = []
    for sentence in sentences:
        labels = [-100] * len(sentence.pieces)
        for first, tag in zip(sentence.first, sentence.tags):
            if first >= 0:
                labels[first] = tag
        mask = [1] * len(sentence.pieces)
        rows.append({"input_ids": sentence.pieces, "attention_mask": mask, "labels": labels})
    return rows


def trainer_of(model, tokenizer, train, args, folder, **more):
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    settings = {
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.batch_size,
        "learning_rate": args.lr, "num_train_epochs": args.epochs, "lr_scheduler_type": "linear",
        "weight_decay": 0.01, "max_grad_norm": 0, "seed": args.seed, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "label_names": ["labels"],
        "remove_unused_columns": False, "use_cpu": args.device == "cpu", **more,
    }
    collator = DataCollatorForTokenClassification(tokenizer)
    return Trainer(model, TrainingArguments(folder, **settings), collator, for_trainer(train))


def score_of_trainer(trainer, test):
    from seqeval.metrics import f1_score

    best = trainer.predict(for_trainer(test)).predictions.argmax(-1)
    found = [[TAGS[row[first]] if first >= 0 else "O" for first in s.first] for s, row in zip(test, best)]
    return 100 * f1_score([[TAGS[tag] for tag in s.tags] for s in test], found)


def lora_of(encoder, kind):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(kind, r=8, lora_alpha=16))


def do(job, args):
    """Trains, scores, and prints what it took."""
    torch.manual_seed(args.seed)
    encoder, tokenizer = adapters.load_encoder(args.model, 128)
    if job.startswith("priming"):
        result = prime_or_train(job, encoder, tokenizer, args)
    else:
        train = prime.load(args, tokenizer, args.tgt, "train")
        test = prime.load(args, tokenizer, args.tgt, "test")
        result = tune(job, encoder, tokenizer, train, test, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({**result, "peak": peak}))


def tune(job, encoder, tokenizer, train, test, args):
    began = time.perf_counter()
    if job == "adapter":
        model, tuned = finetune.start(args, encoder, {}, args.seed, train)
        with torch.no_grad():
            train = model.encode(train)
    elif job == "lora":
        model = adapters.Tagger(lora_of(encoder, "FEATURE_EXTRACTION"), 7, None).to(args.device).eval()
        tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.choose_packing(train)
    elif job == "adapter, Trainer":
        tagger, _ = finetune.start(args, encoder, {}, args.seed, train)
        model = OnTop(tagger)
        model.encoder.train = lambda mode=True: model.encoder  # what is frozen has no dropout
    else:
        from transformers import AutoModelForTokenClassification

        model = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=7, dtype=torch.float32)
        model = lora_of(model, "TOKEN_CLS")
    with tempfile.TemporaryDirectory() as folder:
        if "Trainer" in job:
            trainer = trainer_of(model, tokenizer, train, args, folder)
            trainer.train()
        else:
            finetune.tune(args, model, tuned, train, args.seed)
        trained = time.perf_counter()
        with torch.no_grad():
            ours = "Trainer" not in job and finetune.evaluate(model, test, TAGS)["f1"]
        f1 = ours or score_of_trainer(trainer, test)
    return {"training": trained - began, "scoring": time.perf_counter() - trained, "f1": f1}


def prime_or_train(job, encoder, tokenizer, args):
    corpora = [prime.load(args, tokenizer, language, "train", 32) for language in ("en", "es")]
    model = adapters.Tagger(encoder, 7).to(args.device).eval()
    model.choose_packing(sum(corpora, []))
    settings = argparse.Namespace(**vars(args), method="meta", tasks=2, support=16, query=16)
    batches = [*prime.sample_batches(corpora, settings)]
    began = time.perf_counter()
    if "Trainer" in job:
        sentences = [s for tasks in batches for task in tasks for part in task for s in part]
        with tempfile.TemporaryDirectory() as folder:
            more = {"per_device_train_batch_size": 64, "learning_rate": 5e-5, "num_train_epochs": 1}
            trainer_of(OnTop(model), tokenizer, sentences, args, folder, **more).train()
    else:
        theta_p, theta_a, theta_h = model.sets()
        outer = [*theta_p.values(), *theta_a.values()]
        optimizer, scheduler = prime.adamw_with_linear_decay(outer, 5e-5, args.steps)
        for _ in prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches, loss=prime.tag_loss,
            optimizer=optimizer, scheduler=scheduler, encode=model.encode_sets,
        ):
            pass
    return {"training": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    jobs = [f"{name}{way}" for name in ("adapter", "lora", "priming") for way in ("", ", Trainer")]
    flag("--model", default=str(ROOT / "demo/encoder"))
    flag("--data", default=str(ROOT / "demo/wikiann"))
    flag("--tgt", default="nl")
    flag("--jobs", nargs="+", choices=jobs, default=jobs)
    flag("--limit-train", type=int, default=5000)
    flag("--limit-test", type=int, default=10_000)
    flag("--epochs", type=int, default=10)
    flag("--lr", type=float, default=3e-3)
    flag("--steps", type=int, default=100, help="of priming")
    flag("--seed", type=int, default=0)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--job", choices=jobs, help=argparse.SUPPRESS)
    parser.set_defaults(tune="adapter", pe="adapter", bottleneck=64, batch_size=16, min_steps=0, types=TYPES,
                        max_length=128, bf16=False, init="none", load=None)
    args = parser.parse_args()
    if args.job:
        return do(args.job, args)
    print("| job | training, s | scoring, s | both, s | F1 | peak, MB |\n|---|---|---|---|---|---|")
    for job in args.jobs:
        again = [sys.executable, __file__, *sys.argv[1:], "--job", job]
        done = subprocess.run(again, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{job} failed")
        took = json.loads(done.stdout.splitlines()[-1])
        scoring, f1 = took.get("scoring", 0), f"{took['f1']:.2f}" if "f1" in took else "–"
        times = " | ".join(f"{x:.1f}" for x in (took["training"], scoring, took["training"] + scoring))
        print(f"| {job} | {times} | {f1} | {took['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
