"""SFT rows, trainers on them, and TRL's SFT losses written out in float64: for the tests of the verbs on rows."""

from pathlib import Path
from typing import Any

import torch
from conftest import preference_rows
from parity import EXACT, fresh
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_anatomy import AnatomySFTTrainer

CONCEPTS = {"bold": {"scorer": "text", "pattern": r"\*\*bold\*\*"}, "low": {"scorer": "text", "pattern": r"\bw1\d\b"}}


def rows(kind: str = "text", n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows of prompt and completion ("text" or "chat"), "messages", or language-modelling text ("plain")."""
    made = []
    for row in preference_rows(n, seed, conversational=kind in ("chat", "messages")):
        prompt, answer = row["prompt"], row["chosen"]
        if kind == "messages":
            made.append({"messages": prompt + answer})
        elif kind == "plain":
            made.append({"text": f"{prompt} {answer}".strip()})
        else:
            made.append({"prompt": prompt, "completion": answer})
    return made


def policy(*rules: dict[str, Any], **concepts: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "concepts": {**CONCEPTS, **concepts}, "rules": list(rules)}


def sft(model_dir: Path, out: Path, data: list[dict[str, Any]], policy: Any = None, **options: Any) -> Any:
    """Our trainer with a policy, or TRL's (policy None)."""
    named = ("eval_dataset", "peft_config", "data_collator", "formatting_func", "compute_loss_func", "audit")
    extra = {name: options.pop(name) for name in named if name in options}
    cls: Any = SFTTrainer
    if policy is not None:
        cls, extra = AnatomySFTTrainer, {**extra, "concept_policy": policy}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=options.pop("dtype", torch.float32))
    args = SFTConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, **options})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return cls(model, args, train_dataset=fresh(data), processing_class=tokenizer, **extra)


def batch_of(trainer: Any) -> dict[str, Any]:
    """The first batch of training, as the loss sees it."""
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


def token_losses(logits: Tensor, labels: Tensor, loss_type: str = "nll") -> Tensor:
    """(batch, length - 1) float64 losses of the tokens, 0 outside the loss, straight from the logits."""
    every = logits[:, :-1].double().log_softmax(-1)
    picked = every.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    loss = -picked * (picked.exp().detach() if loss_type == "dft" else 1.0)
    return torch.where(labels[:, 1:] == -100, 0.0, loss)
