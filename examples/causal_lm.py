"""Primes a causal language model for peft's LoRA (Hu et al. 2022): prime, save, load and tune.

    python examples/causal_lm.py --output primed-causal-lm

A task is a substitution cipher: after two symbols, the model continues with the same two in the task's
cipher. θa is LoRA, θp the rest of the model, and there is no θh. The model is tiny and starts from random
weights, unless --model names another. Prints the share of symbols that are right on new ciphers after ten
steps of LoRA tuning, with and without priming (guessing gives 10 %). Takes half a minute on one core.
"""

import argparse
import copy
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, logging

sys.path.insert(0, str(Path(__file__).parent.parent))  # or copy prime.py to your project
from prime import adamw_with_linear_decay, prime

SYMBOLS, LENGTH, SEQUENCES = 10, 2, 16  # of a cipher, of a plain text, in a support or query set
TASKS, INNER_STEPS, INNER_LR = 2, 3, 0.3


def load_base(name: str | None):
    """A causal language model without dropout, which `prime` does not allow."""
    if name:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=2 * LENGTH))


def add_lora(base):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(base, config)


def sample_task(vocabulary: int):
    """Support and query set of a random cipher, as the model's inputs: [sequences, 2 * LENGTH]."""
    cipher = torch.randperm(SYMBOLS)

    def sample_set():
        plain = torch.stack([torch.randperm(SYMBOLS)[:LENGTH] for _ in range(SEQUENCES)])
        input_ids = torch.cat([plain, cipher[plain]], dim=1) + vocabulary // 2
        labels = input_ids.clone()
        labels[:, :LENGTH] = -100  # the plain text is given, not predicted
        return {"input_ids": input_ids, "labels": labels}

    return sample_set(), sample_set()


def loss(model, batch):
    return model(**batch).loss


def prime_lora(model, steps: int, outer_lr: float) -> list[float]:
    """Primes a model of peft in place. Returns the mean query loss of each meta step."""
    model.requires_grad_()  # peft freezes θp, but line 9 updates it
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # less memory
    model.train()  # transformers checkpoints in this mode only
    named = dict(model.named_parameters())
    theta_a = {n: p for n, p in named.items() if ".lora_" in n}
    theta_p = {n: p for n, p in named.items() if n not in theta_a}
    optimizer, scheduler = adamw_with_linear_decay([*theta_p.values(), *theta_a.values()], outer_lr, steps)
    vocabulary = model.config.vocab_size
    batches = ([sample_task(vocabulary) for _ in range(TASKS)] for _ in range(steps))
    meta_training = prime(
        model, theta_p=theta_p, theta_a=theta_a, theta_h={}, batches=batches, loss=loss, optimizer=optimizer,
        scheduler=scheduler, inner_lr=INNER_LR, inner_steps=INNER_STEPS)
    return [sum(query_losses) / TASKS for query_losses in meta_training]


def save(model, folder: Path) -> None:
    """peft saves LoRA only, so the primed base is saved too."""
    model.save_pretrained(folder / "lora")
    model.unload().save_pretrained(folder / "base")


def load(folder: Path):
    """The primed base, frozen, with the primed LoRA, ready to be tuned."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "lora", is_trainable=True)


def accuracy_after_tuning(model, tasks, optimizer_class, lr: float, steps: int = 10) -> float:
    """Mean share of right symbols in the query sets, after tuning a copy of LoRA on each support set."""
    shares = []
    for support, query in tasks:
        tuned = copy.deepcopy(model)
        optimizer = optimizer_class([p for p in tuned.parameters() if p.requires_grad], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(tuned, support).backward()
            optimizer.step()
        with torch.no_grad():
            logits = tuned(input_ids=query["input_ids"]).logits  # [sequences, 2 * LENGTH, vocabulary]
        right = logits[:, LENGTH - 1 : -1].argmax(-1) == query["input_ids"][:, LENGTH:]
        shares.append(right.float().mean().item())
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", help="hub name or folder of a causal language model (default: a tiny one)")
    parser.add_argument("--steps", type=int, default=150, help="number of meta steps (default: 150)")
    parser.add_argument("--outer-lr", type=float, default=2e-3, help="β, AdamW's rate (default: 2e-3)")
    parser.add_argument("--output", type=Path, default=Path("primed-causal-lm"),
                        help="folder for base and LoRA (default: primed-causal-lm)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    base = load_base(args.model)
    not_primed, model = add_lora(copy.deepcopy(base)), add_lora(base)
    losses = prime_lora(model, args.steps, args.outer_lr)
    print(f"query loss {losses[0]:.2f} → {losses[-1]:.2f} in {args.steps} meta steps")
    save(model, args.output)
    primed = load(args.output)
    tasks = [sample_task(base.config.vocab_size) for _ in range(10)]
    for optimizer_class, lr in ((torch.optim.SGD, INNER_LR), (torch.optim.AdamW, 1e-2)):
        shares = [accuracy_after_tuning(start, tasks, optimizer_class, lr) for start in (not_primed, primed)]
        print(f"ten steps of {optimizer_class.__name__} at {lr:g}: "
              f"not primed {shares[0]:.1%}, primed {shares[1]:.1%}")


if __name__ == "__main__":
    main()
