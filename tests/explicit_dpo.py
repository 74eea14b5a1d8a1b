"""TRL's DPO losses written out in float64, and a trainer to hold against them: for the tests of every verb."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from parity import EXACT, fresh
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer
from trl_anatomy.trainers.loss_support import LOSSES

BOLD, LOW = r"\*\*bold\*\*", r"\bw1\d\b"
CONCEPTS = {"bold": {"scorer": "text", "pattern": BOLD}, "low": {"scorer": "text", "pattern": LOW}}
SHAPE = {
    "version": 1,
    "concepts": CONCEPTS,
    "rules": [
        {"explain_away": "bold", "with": "shape_reward", "strength": 1.5},
        {"amplify": "low", "with": "shape_reward", "strength": 0.7},
    ],
}
SHAPEABLE = [name for name, support in LOSSES.items() if support.verdict not in ("refused", "untouched")]
BETA, EPSILON, TAU = 0.3, 0.1, 0.05


def lora(init: bool = False) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)


def dpo(
    model_dir: Path,
    out: Path,
    rows: list[dict[str, Any]],
    cls: Any = AnatomyDPOTrainer,
    policy: Any = SHAPE,
    **options: Any,
) -> Any:
    peft_config, reference = options.pop("peft_config", None), options.pop("other_reference", False)
    dtype = options.pop("dtype", torch.float32)
    extra = {"concept_policy": policy} if cls is AnatomyDPOTrainer else {}
    extra |= {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    ref_model = None
    if reference:  # so that the implicit rewards are not all zero
        ref_model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        with torch.no_grad():
            ref_model.lm_head.weight.mul_(0.8)
    torch.manual_seed(7)  # before trl 1.16 adapters are drawn before the constructor's seed
    args = DPOConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, "beta": BETA, **options})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return cls(
        model, ref_model, args, train_dataset=fresh(rows), processing_class=tokenizer, peft_config=peft_config, **extra
    )


def reward(
    model_dir: Path, out: Path, rows: list[dict[str, Any]], cls: Any = AnatomyRewardTrainer, **options: Any
) -> Any:
    extra: dict[str, Any] = {"concept_policy": SHAPE} if cls is AnatomyRewardTrainer else {}
    extra |= {name: options.pop(name) for name in ("eval_dataset", "peft_config") if name in options}
    args = RewardConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, **options})
    return cls(model=str(model_dir), args=args, train_dataset=fresh(rows), **extra)


def expected_offsets(rows: list[dict[str, Any]]) -> np.ndarray:
    """(n, 2) offsets of chosen and rejected: strength times the z-scored text score, summed over the two rules."""
    offsets = np.zeros((len(rows), 2))
    for pattern, strength in ((BOLD, 1.5), (LOW, -0.7)):
        found = [[float(bool(re.search(pattern, row[side]))) for side in ("chosen", "rejected")] for row in rows]
        scores = np.array(found)
        offsets += strength * (scores - scores.mean()) / scores.std()
    return offsets


def log_probability(model: torch.nn.Module, batch: dict[str, Tensor], ld_alpha: float | None = None) -> Tensor:
    """(2, batch) summed log-probability of the completions, straight from the logits.

    With `ld_alpha`, tokens past the length of the shorter completion count `ld_alpha` each.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    picked = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["completion_mask"][:, 1:].double()
    if ld_alpha is not None:
        shared = mask.sum(1).view(2, -1).min(0).values.repeat(2)[:, None]
        mask = mask * torch.where(mask.cumsum(1) <= shared, 1.0, ld_alpha)
    return (picked * mask).sum(1).view(2, -1)


def wpo_weight(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(batch,) weight of each pair by eq. (2) of the WPO paper."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        every = logits[:, :-1].log_softmax(-1)
        picked = every.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) - (2 * every).logsumexp(-1)
        mask = batch["completion_mask"][:, 1:]
        return ((picked * mask).sum(1) / mask.sum(1)).exp().view(2, -1).prod(0)


def formula(name: str, logratio: Tensor, offset: Tensor, length: Tensor, logps: Tensor) -> Tensor:  # noqa: C901, PLR0912
    """The shaped loss of method.md section 8, per pair, from (2, batch) tensors (chosen, rejected)."""
    r = BETA * logratio + offset
    d = r[0] - r[1]
    if name == "sigmoid":
        return -F.logsigmoid(d)
    if name == "hinge":
        return torch.relu(1 - d)
    if name == "robust":
        return (-(1 - EPSILON) * F.logsigmoid(d) + EPSILON * F.logsigmoid(-d)) / (1 - 2 * EPSILON)
    if name == "exo_pair":
        p = torch.sigmoid(d)
        return p * (F.logsigmoid(d) - np.log1p(-EPSILON)) + (1 - p) * (F.logsigmoid(-d) - np.log(EPSILON))
    if name == "discopop":
        mix = torch.sigmoid(d / TAU)
        return -F.logsigmoid(d) * (1 - mix) + torch.exp(-d) * mix
    if name == "ipo":
        per_token = (logratio[0] / length[0] - logratio[1] / length[1]) + (offset[0] - offset[1]) / BETA
        return (per_token - 1 / (2 * BETA)) ** 2
    if name == "sigmoid_norm":
        per_token = logratio[0] / length[0] - logratio[1] / length[1]
        return -F.logsigmoid(BETA * per_token + offset[0] - offset[1])
    if name == "nca_pair":
        return -F.logsigmoid(r[0]) - 0.5 * F.logsigmoid(-r[0]) - 0.5 * F.logsigmoid(-r[1])
    if name == "bco_pair":
        return -F.logsigmoid(r[0]) - F.logsigmoid(-r[1])
    if name == "sppo_hard":
        return ((r[0] - 0.5) / BETA) ** 2 + ((r[1] + 0.5) / BETA) ** 2
    if name == "apo_zero":
        return 1 - torch.sigmoid(r[0]) + torch.sigmoid(r[1])
    if name == "apo_down":
        return torch.sigmoid(r[0]) + 1 - torch.sigmoid(d)
    if name == "sft":
        return -(logps[0].sum() / length[0].sum()).expand(len(d))
    raise KeyError(name)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def reference_of(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """(2, batch) log-probabilities of the reference: a model of its own, or the policy without its adapter."""
    with torch.no_grad():
        if trainer.ref_model is not None:
            return log_probability(trainer.ref_model, batch, trainer.ld_alpha)
        with trainer.model.disable_adapter():
            return log_probability(trainer.model, batch, trainer.ld_alpha)


def assert_same_step(
    loss: Tensor, got: dict[str, Tensor], expected: Tensor, wanted: dict[str, Tensor], atol: float = 1e-6
) -> None:
    """A loss and the gradient of every parameter against those of the explicit formula."""
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert got.keys() == wanted.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    assert largest > 1e-4
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-5, atol=atol * max(1.0, largest), msg=lambda m, name=name: f"{name}: {m}"
        )
