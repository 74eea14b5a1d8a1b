"""steer: loss and gradient of both trainers against an explicit forward, and where it must not act."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from hidden_world import (
    assert_step,
    conversations,
    decoded,
    dpo_loss,
    policy,
    reward_loss,
    rule,
    stepped,
    vector,
    whole_batch,
)
from test_shaping_seam import BETA, EPSILON, TAU, dpo, lora
from torch import Tensor
from trl import DPOTrainer

from trl_anatomy.shaping.interventions import Steer
from trl_anatomy.trainers.loss_support import LOSSES

USER = 4  # <user> in the tokenizer of conftest


def from_last_user_turn(ids: Tensor) -> Tensor:
    """(rows, tokens) bool: positions after the last <user>."""
    position = torch.arange(ids.shape[1])
    last = torch.where(ids == USER, position, -1).max(1).values
    return position > last[:, None]


def steered(ids: Tensor, alpha: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """layer -> (vector (d,), signed α (rows,)), from the last user turn on."""

    def edit(layer: int, h: Tensor) -> Tensor:
        if layer not in alpha:
            return h
        v, a = alpha[layer]
        return h + (a[:, None] * from_last_user_turn(ids))[:, :, None] * v

    return edit


def sides(chosen: float, rejected: float, n: int) -> Tensor:
    return torch.tensor([chosen] * n + [rejected] * n, dtype=torch.float64)


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSSES.items() if not name.startswith("aot")])
def test_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rules = [rule("v", "steer", strength=2.5), rule("w", "steer", "amplify", strength=1.5, side="both")]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        conversations(6),
        policy=policy(tmp_path, *rules),
        dtype=torch.float64,
        other_reference=True,
        loss_type=loss_type,
        label_smoothing=EPSILON if loss_type in ("exo_pair", "robust") else 0.0,
        discopop_tau=TAU,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        alpha = {0: (vector(1), sides(0, 2.5, 6)), 1: (vector(2), sides(-1.5, -1.5, 6))}
        edit = steered(batch["input_ids"], alpha)
        assert not torch.allclose(dpo_loss(trainer, batch, edit, loss_type), dpo_loss(trainer, batch, None, loss_type))
        return dpo_loss(trainer, batch, edit, loss_type)

    assert_step(trainer, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": lora()},
    "precomputed": {"precompute_ref_log_probs": True, "other_reference": True},
    "lora, precomputed": {"peft_config": lora(), "precompute_ref_log_probs": True},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "checkpointing, not reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "other_reference": True,
    },
    "lora, checkpointing, reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "peft_config": lora(),
    },
    "lora, checkpointing, not reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "peft_config": lora(),
    },
    "keep_end": {"max_length": 9, "truncation_mode": "keep_end", "other_reference": True},
    "keep_start": {"max_length": 12, "other_reference": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        conversations(6),
        policy=policy(tmp_path, rule("v", "steer", strength=2.5, side="chosen")),
        dtype=torch.float64,
        gradient_checkpointing="checkpointing" in name,
        **OPTIONS[name],
    )
    n = len(trainer.train_dataset)

    def expected(batch: dict[str, Any]) -> Tensor:
        return dpo_loss(trainer, batch, steered(batch["input_ids"], {0: (vector(1), sides(2.5, 0, n))}))

    assert_step(trainer, expected)


def test_gate_and_fraction(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = conversations(8)
    rules = [
        rule("v", "steer", strength=2.0, side="both", where={"column": "topic", "equals": "x"}),
        rule("w", "steer", strength=1.0, fraction=0.5),
    ]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=policy(tmp_path, *rules),
        dtype=torch.float64,
        other_reference=True,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        gated = torch.tensor([row["topic"] == "x" for row in rows] * 2)
        with torch.no_grad():  # the fraction goes by the score gap: largest projection over the response
            h: dict[int, Tensor] = {}
            decoded(trainer.ref_model, batch["input_ids"], batch["attention_mask"], lambda i, x: h.setdefault(i, x))
            projected = (h[1] @ vector(2)).masked_fill(batch["completion_mask"] == 0, -torch.inf).max(1).values
        gap = projected[:8] - projected[8:]
        top = gap.topk(4).indices
        alpha = torch.zeros(16, dtype=torch.float64)
        alpha[8 + top[gap[top] > 0]] = 1.0
        assert 0 < (alpha != 0).sum() < 8
        edit = steered(batch["input_ids"], {0: (vector(1), 2.0 * gated), 1: (vector(2), alpha)})
        return dpo_loss(trainer, batch, edit)

    assert_step(trainer, expected)
    first, second = trainer.plan.rules
    assert (first["rows"], first["strength"], first["pairs"]) == (4, 2.0, 4)
    assert first["gradient_touched"] == pytest.approx(0.5)
    assert 0 < second["rows"] <= 4
