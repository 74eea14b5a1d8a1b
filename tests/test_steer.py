"""steer: loss and gradient of both trainers against an explicit forward; where user turns begin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from explicit_dpo import EPSILON, TAU, dpo, lora
from hidden_world import (
    FEATURES,
    D,
    assert_step,
    conversations,
    decoded,
    dpo_loss,
    policy,
    reward,
    reward_loss,
    rule,
    vector,
)
from reading_world import build_tokenizer, rows, tiny_sae
from torch import Tensor

from trl_anatomy.reading.spans import read_pairs, turn_starts
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

    # TRL's log-probabilities are float32, and discopop divides their sum by its temperature
    assert_step(trainer, expected, atol=1e-5 if loss_type == "discopop" else 1e-6)


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
    data = conversations(8)
    rules = [
        rule("v", "steer", strength=2.0, side="both", where={"column": "topic", "equals": "x"}),
        rule("w", "steer", strength=1.0, fraction=0.5),
    ]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        data,
        policy=policy(tmp_path, *rules),
        dtype=torch.float64,
        other_reference=True,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        gated = torch.tensor([row["topic"] == "x" for row in data] * 2)
        with torch.no_grad():  # the fraction goes by the score gap: largest projection over the response
            h: dict[int, Tensor] = {}
            decoded(trainer.ref_model, batch["input_ids"], batch["attention_mask"], lambda i, x: h.setdefault(i, x))
            read = (batch["completion_mask"] != 0) & (batch["input_ids"] != trainer.processing_class.eos_token_id)
            projected = (h[1] @ vector(2)).masked_fill(~read, -torch.inf).max(1).values  # an end token is not scored
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


def test_plain_prompts_are_steered_from_their_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(6),
        policy=policy(tmp_path, rule("v", "steer", strength=2.5)),
        dtype=torch.float64,
        other_reference=True,
    )
    alpha = sides(0, 2.5, 6)[:, None, None]

    def expected(batch: dict[str, Any]) -> Tensor:
        return dpo_loss(trainer, batch, lambda layer, h: h + alpha * vector(1) if layer == 0 else h)

    assert_step(trainer, expected)


def test_features_steer_along_the_sum_of_their_decoder_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        conversations(6),
        policy=policy(tmp_path, rule("f", "steer", strength=2.5)),
        dtype=torch.float64,
        other_reference=True,
    )
    rows = tiny_sae("jumprelu", d_in=D, d_sae=48).W_dec.detach()[FEATURES["f"]].double()
    v = (rows.sum(0) / rows.sum(0).norm()).float().double()

    def expected(batch: dict[str, Any]) -> Tensor:
        return dpo_loss(trainer, batch, steered(batch["input_ids"], {0: (v, sides(0, 2.5, 6))}))

    assert_step(trainer, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward_trainer(checkpointing: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = reward(
        tiny_model_dir,
        tmp_path,
        conversations(6),
        policy(tmp_path, rule("v", "steer", strength=2.5, side="both"), rule("w", "steer", strength=1.0)),
        gradient_checkpointing=checkpointing,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        alpha = {0: (vector(1), sides(2.5, 2.5, 6)), 1: (vector(2), sides(0, 1.0, 6))}
        return reward_loss(trainer, batch, steered(batch["input_ids"], alpha))

    assert_step(trainer, expected)


def test_strengths() -> None:
    gap, rows, acts = np.array([3.0, -1.0, 2.0, 1.0, 5.0]), np.arange(5), np.array([1, 1, 1, 1, 0], bool)
    away = Steer("c", "explain_away", 2.0, fraction=0.5).strengths(gap, rows, acts)
    assert away.tolist() == [[0, 2], [0, 0], [0, 2], [0, 0], [0, 0]]
    more = Steer("c", "amplify", 2, side="both", fraction=0.5).strengths(gap, rows, acts)
    assert more.tolist() == [[0, 0], [-2, -2], [0, 0], [0, 0], [0, 0]]
    chosen = Steer("c", "explain_away", 2.0, side="chosen").strengths(gap, rows, acts)
    assert chosen.tolist() == [[2, 0]] * 4 + [[0, 0]]


@pytest.mark.parametrize("bos", [False, True])
def test_turns_begin_where_the_last_user_text_does(bos: bool) -> None:
    """Byte-level tokens, system prompts, tools, several turns, texts that begin like the ones put in their place."""
    tokenizer = build_tokenizer(bos)
    made = rows("tools", 10)
    made[0]["prompt"][-1]["content"] = "0 is a number"
    made[1]["prompt"][-1]["content"] = "Zero"
    made[2]["prompt"] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    made[3]["prompt"] = [{"role": "system", "content": "Tell me a story"}]
    data = Dataset.from_list(made)
    pairs = read_pairs(data, tokenizer)
    starts = turn_starts(pairs, tokenizer)
    for i, row in enumerate(made):
        before = tokenizer.decode(pairs.ids(i, "prompt")[: starts[i]])
        after = tokenizer.decode(pairs.ids(i, "prompt")[starts[i] :])
        if i == 3:
            assert starts[i] == 0
        else:
            assert before.endswith("<user>")
            assert after.startswith(row["prompt"][-1]["content"] + "</s>")
    assert turn_starts(read_pairs(Dataset.from_list(rows("explicit")), tokenizer), tokenizer).tolist() == [0] * 10
