"""Compares whole jobs with transformers' Trainer, with peft or a frozen encoder.

    python benchmarks/compare_trainer.py --model ENCODER --data WIKIANN --tgt nl

Each job runs in a process of its own, one after the other. The table gives seconds of training and of
scoring, F1, and the most memory that the process used. Loading libraries, encoder and data is not counted.
Trainer gets the same sentences, model, loss, batch size, rate and schedule, and pads each batch to its
longest sentence; peft's model has its own head, and dropout, as people run it. `priming` is Algorithm 1 with
S = 5; in Trainer it is fine-tuning of all parameters on as many sentences per step. Needs peft and accelerate
(benchmarks/requirements.txt).
"""

import functools
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import finetune
import prime
import report

TYPES = ["PER", "ORG", "LOC"]
TAGS = adapters.tag_names(TYPES)
MAX_LENGTH = 128
JOBS = ["adapter", "adapter, Trainer", "lora", "lora, Trainer", "priming", "priming, Trainer"]


class PaddedTagger(nn.Module):
    """The parts of a `Tagger` as Trainer calls them, on padded batches. A frozen encoder has no dropout."""

    def __init__(self, tagger: adapters.Tagger, frozen: bool):
        super().__init__()
        self.encoder, self.adapter, self.head = tagger.encoder, tagger.adapter, tagger.head
        self.frozen = frozen

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(self.adapter(hidden))  # [batch, length, tags]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def to_features(sentences):
    """Sentences as Trainer's collator takes them. Only the first piece of a word has a label."""
    features = []
    for sentence in sentences:
        labels = [-100] * len(sentence.input_ids)
        for start, tag in zip(sentence.word_starts, sentence.tags):
            if start >= 0:
                labels[start] = tag
        mask = [1] * len(sentence.input_ids)
        features.append({"input_ids": sentence.input_ids, "attention_mask": mask, "labels": labels})
    return features


def make_trainer(model, tokenizer, sentences, folder, *, batch_size, lr, epochs, seed, device):
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        learning_rate=lr, num_train_epochs=epochs, lr_scheduler_type="linear", weight_decay=0.01,
        max_grad_norm=0, seed=seed, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, label_names=["labels"], remove_unused_columns=False, use_cpu=device == "cpu")
    collator = DataCollatorForTokenClassification(tokenizer)
    return Trainer(model, arguments, collator, to_features(sentences))


def score_by_trainer(trainer, test):
    from seqeval.metrics import f1_score

    predicted = trainer.predict(to_features(test)).predictions.argmax(-1)
    tags = [[TAGS[row[start]] if start >= 0 else "O" for start in sentence.word_starts]
            for sentence, row in zip(test, predicted)]
    return 100 * f1_score([[TAGS[tag] for tag in sentence.tags] for sentence in test], tags)


def add_lora(model, task_type):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type, r=8, lora_alpha=16))


def tune_with_trainer(job, encoder, tokenizer, train, test, *, model_name, epochs, lr, seed, device):
    """Seconds of training and of scoring, and F1."""
    began = time.perf_counter()
    if job == "adapter, Trainer":
        tagger = adapters.build_tagger(
            encoder, types=TYPES, pe="adapter", bottleneck=64, device=device, bf16=False)
        encoder.requires_grad_(False)
        model = PaddedTagger(tagger, frozen=True)
    else:
        from transformers import AutoModelForTokenClassification

        model = AutoModelForTokenClassification.from_pretrained(
            model_name, num_labels=len(TAGS), dtype=torch.float32)
        model = add_lora(model, "TOKEN_CLS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, tokenizer, train, folder, batch_size=16, lr=lr, epochs=epochs, seed=seed, device=device)
        trainer.train()
        trained = time.perf_counter()
        f1 = score_by_trainer(trainer, test)
    return {"training": trained - began, "scoring": time.perf_counter() - trained, "f1": f1}


def tune(job, encoder, train, test, *, epochs, lr, seed, device):
    """The same in finetune.py's loop, with the adapter on encoded sentences."""
    began = time.perf_counter()
    build = functools.partial(
        adapters.build_tagger, types=TYPES, bottleneck=64, device=device, bf16=False)
    if job == "adapter":
        model = build(encoder, pe="adapter")
        _, theta_a, theta_h = model.split_parameters()
        tuned = {**theta_a, **theta_h}
        with torch.no_grad():
            (train,) = model.encode_sets([train])
    else:
        model = build(add_lora(encoder, "FEATURE_EXTRACTION"), pe=None)
        tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    finetune.fine_tune(
        model, tuned, train, epochs=epochs, min_steps=0, batch_size=16, lr=lr, seed=seed, dropout=False)
    trained = time.perf_counter()
    f1 = finetune.evaluate(model, test, TAGS)["f1"]
    return {"training": trained - began, "scoring": time.perf_counter() - trained, "f1": f1}


def prime_or_train(job, encoder, tokenizer, corpora, *, steps, seed, device):
    """Seconds of Algorithm 1, or of Trainer on the sentences of its tasks."""
    model = adapters.build_tagger(
        encoder, types=TYPES, pe="adapter", bottleneck=64, device=device, bf16=False)
    batches = [*prime.sample_batches(corpora, steps=steps, tasks=2, support=16, query=16, seed=seed)]
    began = time.perf_counter()
    if "Trainer" in job:
        sentences = [s for tasks in batches for task in tasks for part in task for s in part]
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(
                PaddedTagger(model, frozen=False), tokenizer, sentences, folder, batch_size=64, lr=5e-5,
                epochs=1, seed=seed, device=device).train()
    else:
        theta_p, theta_a, theta_h = model.split_parameters()
        outer_params = [*theta_p.values(), *theta_a.values()]
        optimizer, scheduler = prime.adamw_with_linear_decay(outer_params, 5e-5, steps)
        for _query_losses in prime.prime(
            model, theta_p=theta_p, theta_a=theta_a, theta_h=theta_h, batches=batches,
            loss=adapters.tag_loss, optimizer=optimizer, scheduler=scheduler, encode=model.encode_sets,
        ):
            pass
    return {"training": time.perf_counter() - began}


def run_job(job, *, model, data, target, limit_train, limit_test, epochs, lr, steps, seed, device):
    """Seconds of training and of scoring, F1, and the process's peak memory in MB."""
    torch.manual_seed(seed)
    encoder, tokenizer = adapters.load_encoder(model, MAX_LENGTH)

    def load(language, split, limit):
        return adapters.load_sentences(
            data, language, split, tokenizer, types=TYPES, max_length=MAX_LENGTH, limit=limit)

    if job.startswith("priming"):
        corpora = [load(language, "train", limit_train) for language in ("en", "es")]
        result = prime_or_train(job, encoder, tokenizer, corpora, steps=steps, seed=seed, device=device)
    else:
        train, test = load(target, "train", limit_train), load(target, "test", limit_test)
        options = {"epochs": epochs, "lr": lr, "seed": seed, "device": device}
        if "Trainer" in job:
            result = tune_with_trainer(job, encoder, tokenizer, train, test, model_name=model, **options)
        else:
            result = tune(job, encoder, train, test, **options)
    return {**result, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    parser = report.make_parser(__doc__, report.DEMO)
    add = parser.add_argument
    add("--tgt", default="nl", metavar="LANG", help="target language")
    add("--jobs", nargs="+", choices=JOBS, default=JOBS, metavar="JOB", help="jobs to run")
    add("--limit-train", type=int, default=5000, help="only the first N training sentences of a language")
    add("--limit-test", type=int, default=10_000, help="score only the first N sentences")
    add("--epochs", type=int, default=10, help="passes over the target's training sentences")
    add("--lr", type=float, default=3e-3, help="AdamW's rate in fine-tuning")
    add("--steps", type=int, default=100, help="meta steps of priming")
    add("--seed", type=int, default=0, help="seed of initialisation and sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args()
    options = {
        "model": args.model, "data": args.data, "target": args.tgt, "limit_train": args.limit_train,
        "limit_test": args.limit_test, "epochs": args.epochs, "lr": args.lr, "steps": args.steps,
        "seed": args.seed, "device": args.device}
    rows, spawn = [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:  # a process per job
        for job in args.jobs:
            result = pool.submit(run_job, job, **options).result()
            scoring, f1 = result.get("scoring", 0), f"{result['f1']:.2f}" if "f1" in result else "–"
            times = [f"{x:.1f}" for x in (result["training"], scoring, result["training"] + scoring)]
            rows.append([job, *times, f1, f"{result['peak']:.0f}"])
    print(report.markdown(["job", "training, s", "scoring, s", "both, s", "F1", "peak, MB"], rows))


if __name__ == "__main__":
    adapters.cli(main)
