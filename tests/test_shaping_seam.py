"""The margin seam against explicit formulas in float64, and what must not change when it acts."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TWO_PROCESSES, preference_rows
from datasets import IterableDataset
from explicit_dpo import (
    BETA,
    BOLD,
    CONCEPTS,
    EPSILON,
    SHAPE,
    SHAPEABLE,
    TAU,
    assert_same_step,
    dpo,
    expected_offsets,
    formula,
    gradients,
    log_probability,
    lora,
    reference_of,
    reward,
    wpo_weight,
)
from parity import EXACT, assert_same_tensors, columns, fresh, history, state
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaModel, default_data_collator
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_anatomy import AnatomyDPOTrainer, AnatomyError, AnatomyRewardTrainer
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.trainers.loss_support import LOSSES, support_table

FILTER = {
    "version": 1,
    "concepts": CONCEPTS,
    "rules": [{"explain_away": "bold", "with": "filter_pairs", "fraction": 0.2}],
}


def check_against_formula(trainer: Any, weights: dict[str, float], offsets: np.ndarray | None = None) -> None:
    """Loss, gradient of every parameter and logged rewards of the first batch, which must hold offsets."""
    model = trainer.model
    model.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    offset = torch.stack([batch["anatomy_chosen_offset"], batch["anatomy_rejected_offset"]]).double()
    assert (offset[0] - offset[1]).abs().max() > 0.5, "the batch holds no offset: the case tests nothing"
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    got = gradients(model)

    model.gradient_checkpointing_disable()
    reference = reference_of(trainer, batch)
    logps = log_probability(model, batch, trainer.ld_alpha)
    length = batch["completion_mask"].sum(1).view(2, -1).double()
    pair_weight = wpo_weight(model, batch) if trainer.use_weighting else 1.0
    expected = sum(
        weight * (pair_weight * formula(name, logps - reference, offset, length, logps)).mean()
        for name, weight in weights.items()
    )
    expected.backward()
    wanted = gradients(model)
    assert_same_step(loss, got, expected, wanted)

    logged = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    rewards = BETA * (logps - reference).detach()
    assert logged["rewards/chosen"] == pytest.approx(rewards[0].mean().item(), abs=1e-5)
    assert logged["rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), abs=1e-5)
    assert logged["rewards/accuracies"] == pytest.approx((rewards[0] > rewards[1]).double().mean().item())
    scale = length if trainer.loss_types[0] in ("ipo", "sigmoid_norm") else 1.0
    assert logged["rewards_shaped/rejected"] == pytest.approx((rewards + scale * offset)[1].mean().item(), abs=1e-5)


@pytest.mark.parametrize("loss_type", SHAPEABLE)
def test_loss_and_gradient_of_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    smoothing = EPSILON if loss_type in ("exo_pair", "robust") else 0.0
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(12),
        dtype=torch.float64,
        other_reference=True,
        loss_type=loss_type,
        label_smoothing=smoothing,
        discopop_tau=TAU,
        per_device_train_batch_size=6,
    )
    check_against_formula(trainer, {loss_type: 1.0})


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": lora()},
    "precomputed": {"other_reference": True, "precompute_ref_log_probs": True},
    "lora, precomputed": {"peft_config": lora(), "precompute_ref_log_probs": True},
    "per token, lora, precomputed": {
        "peft_config": lora(),
        "precompute_ref_log_probs": True,
        "loss_type": "ipo",
        "max_length": 9,
    },
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "checkpointing, not reentrant": {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "other_reference": True,
    },
    "lora, checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "peft_config": lora()},
    "length desensitised": {"ld_alpha": 0.4, "other_reference": True},
    "weighted": {"use_weighting": True, "other_reference": True},
    "truncated": {"max_length": 8, "other_reference": True},
    "mixture": {"loss_type": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.7, 0.3, 0.5], "other_reference": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_loss_and_gradient_under_options(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 6, "gradient_checkpointing": "checkpointing" in name, **OPTIONS[name]}
    # DPO's float64: LoRA keeps its adapters in the dtype of the base
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(12), dtype=torch.float64, **options)
    types = trainer.loss_types
    check_against_formula(trainer, dict(zip(types, trainer.loss_weights, strict=True)))


def test_a_constant_offset_on_the_pairs_of_a_gate(tiny_model_dir: Path, tmp_path: Path) -> None:
    rule = {"explain_away": "bold", "with": "shape_reward", "constant": 2.0, "where": {"prompt": BOLD + "|w3"}}
    rows = preference_rows(12)
    policy = {"version": 1, "concepts": CONCEPTS, "rules": [rule]}
    options: dict[str, Any] = {"dtype": torch.float64, "other_reference": True, "per_device_train_batch_size": 6}
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=policy, **options)
    inside = np.array(["w3" in row["prompt"] for row in rows])
    assert 0 < inside.sum() < 12
    np.testing.assert_array_equal(trainer.train_dataset["anatomy_chosen_offset"], inside * 1.0)
    np.testing.assert_array_equal(trainer.train_dataset["anatomy_rejected_offset"], inside * -1.0)
    check_against_formula(trainer, {"sigmoid": 1.0})


def test_the_offsets_are_z_scores_times_strength(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(12)
    trainer = dpo(tiny_model_dir, tmp_path, rows)
    got = np.stack(
        [trainer.train_dataset["anatomy_chosen_offset"], trainer.train_dataset["anatomy_rejected_offset"]], 1
    )
    np.testing.assert_allclose(got, expected_offsets(rows), atol=1e-12)
    assert trainer._logged_concepts == ("bold", "low")
    gaps = np.array(trainer.train_dataset["anatomy_concept_gaps"])
    bold = [float("bold" in row["chosen"]) - float("bold" in row["rejected"]) for row in rows]
    np.testing.assert_array_equal(gaps[:, 0], bold)
    assert "trl_anatomy" in trainer._tag_names
    assert "trl_anatomy" not in DPOTrainer._tag_names


@pytest.mark.parametrize("mode", ["full", "lora", "precomputed"])
def test_one_policy_and_one_reference_forward_a_step(mode: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": True} if mode == "precomputed" else {}
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(8),
        peft_config=lora() if mode == "lora" else None,
        max_steps=3,
        **options,
    )
    calls = {"policy": 0, "reference": 0}

    def count(model: torch.nn.Module, key: str) -> None:
        def hook(*_: Any) -> None:
            calls[key] += 1

        model.get_input_embeddings().register_forward_hook(hook)

    count(trainer.model, "policy")
    if trainer.ref_model is not None:
        count(trainer.ref_model, "reference")
    trainer.train()
    expected = {
        "full": {"policy": 3, "reference": 3},
        "lora": {"policy": 6, "reference": 0},  # one module serves as both
        "precomputed": {"policy": 3, "reference": 0},
    }
    assert calls == expected[mode]


@pytest.mark.parametrize("cls", [AnatomyDPOTrainer, AnatomyRewardTrainer])
def test_no_model_ever_sees_our_columns(
    cls: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama swallows unknown keywords silently; another model would fail on them, in precompute, training or eval."""
    seen: set[str] = set()
    forward = LlamaModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    if cls is AnatomyDPOTrainer:
        trainer = dpo(tiny_model_dir, tmp_path, preference_rows(8), precompute_ref_log_probs=True)
    else:
        trainer = reward(tiny_model_dir, tmp_path, preference_rows(8))
    trainer.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    assert any("anatomy" in key for key in batch)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    assert "attention_mask" in seen
    assert not [key for key in seen if "anatomy" in key]


def test_explaining_away_weakens_the_pair_and_amplifying_strengthens_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(12)
    only_chosen = [i for i, row in enumerate(rows) if "bold" in row["chosen"] and "bold" not in row["rejected"]]
    sizes = {}
    for verb in ("explain_away", "amplify", None):
        rules = [{verb: "bold", "with": "shape_reward", "strength": 2.0}] if verb else []
        trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"version": 1, "concepts": CONCEPTS, "rules": rules})
        names = [name for name in trainer.train_dataset.column_names if name.endswith("_ids") or "anatomy" in name]
        example = trainer.train_dataset.select_columns(names)[only_chosen[0]]
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator([example])).backward()
        sizes[verb] = torch.cat([g.flatten() for g in gradients(trainer.model).values()]).norm().item()
    assert sizes["explain_away"] < 0.5 * sizes[None] < sizes[None] < 1.5 * sizes["amplify"]
    assert sizes[None] < sizes["amplify"]


@pytest.mark.parametrize("precompute", [False, True])
def test_reference_is_untouched_at_the_start_under_lora(precompute: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Fresh adapters are zero, so policy and reference agree: unshaped rewards are 0, shaped ones the offsets."""
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(12),
        peft_config=lora(init=True),
        precompute_ref_log_probs=precompute,
        per_device_train_batch_size=12,
        max_steps=1,
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first["rewards/margins"]) < 1e-5
    assert first["rewards/accuracies"] < 1.0
    offsets = expected_offsets(preference_rows(12))
    gap = (offsets[:, 0] - offsets[:, 1]).mean()
    assert first["rewards_shaped/margins"] == pytest.approx(gap, abs=1e-5)
    assert first["rewards_shaped/offset_margin"] == pytest.approx(gap, abs=1e-5)
    assert first["concepts/bold/gap"] == pytest.approx(np.mean(trainer.train_dataset["anatomy_concept_gaps"], 0)[0])


def test_correlation_metrics(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(
        tiny_model_dir, tmp_path, preference_rows(12), other_reference=True, per_device_train_batch_size=12, max_steps=1
    )
    model = trainer.model.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    trainer.compute_loss(model, batch)
    with torch.no_grad():
        rewards = log_probability(model, batch) - log_probability(trainer.ref_model, batch)
    for k, name in enumerate(("bold", "low")):
        expected = np.corrcoef(rewards[0] - rewards[1], batch["anatomy_concept_gaps"][:, k])[0, 1]
        assert trainer._metrics["train"][f"concepts/{name}/reward_correlation"] == [pytest.approx(expected, abs=1e-4)]
        assert trainer._metrics["train"][f"concepts/{name}/margin_explained"] == [pytest.approx(expected**2, abs=1e-4)]


UNSHAPED: dict[str, list[dict[str, Any]]] = {
    "reweight_pairs": [{"explain_away": "bold", "with": "reweight_pairs", "strength": 0.5}],
    "mask_tokens": [{"explain_away": "bold", "with": "mask_tokens"}],
    "beside a rule on rows": [
        {"explain_away": "low", "with": "filter_pairs", "fraction": 0.2},
        {"explain_away": "bold", "with": "reweight_pairs", "strength": 0.5},
    ],
}


def check_live_metrics(trainer: Any, margins: Tensor, gaps: Tensor) -> None:
    """What was logged of one batch, against margins (batch,) and gaps (batch, concepts) found in another way."""
    logged = trainer._metrics["train"]
    assert not any(key.startswith("rewards_shaped/") for key in logged)
    assert trainer._logged_concepts
    for name, gap in zip(trainer._logged_concepts, gaps.unbind(dim=1), strict=True):
        assert gap.std() > 0
        expected = np.corrcoef(margins, gap)[0, 1]
        assert logged[f"concepts/{name}/gap"] == [pytest.approx(gap.mean().item(), abs=1e-6)]
        assert logged[f"concepts/{name}/reward_correlation"] == [pytest.approx(expected, abs=1e-4)]
        assert logged[f"concepts/{name}/margin_explained"] == [pytest.approx(expected**2, abs=1e-4)]


@pytest.mark.parametrize("name", list(UNSHAPED))
def test_rules_without_a_margin_log_their_concepts(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = {"version": 1, "concepts": CONCEPTS, "rules": UNSHAPED[name]}
    options: dict[str, Any] = {"other_reference": True, "per_device_train_batch_size": 12}
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(12), policy=policy, **options)
    assert trainer._logged_concepts == tuple(dict.fromkeys(rule["explain_away"] for rule in UNSHAPED[name]))
    model = trainer.model.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    trainer.compute_loss(model, batch)
    with torch.no_grad():
        rewards = BETA * (log_probability(model, batch) - log_probability(trainer.ref_model, batch))
    check_live_metrics(trainer, rewards[0] - rewards[1], batch["anatomy_concept_gaps"])
    assert trainer._metrics["train"]["rewards/margins"] == [
        pytest.approx((rewards[0] - rewards[1]).mean().item(), abs=1e-4)
    ]


def test_reward_rules_without_a_margin_log_their_concepts(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = {"version": 1, "concepts": CONCEPTS, "rules": UNSHAPED["beside a rule on rows"]}
    args = RewardConfig(
        output_dir=str(tmp_path), **{**EXACT, "gradient_checkpointing": False, "per_device_train_batch_size": 12}
    )
    trainer = AnatomyRewardTrainer(
        model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(12)), concept_policy=policy
    )
    model = trainer.model.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    trainer.compute_loss(model, batch)
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        rewards = model(**inputs, use_cache=False).logits.view(2, -1)
    check_live_metrics(trainer, rewards[0] - rewards[1], batch["anatomy_concept_gaps"])


def test_rules_on_rows_alone_carry_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = {"version": 1, "concepts": CONCEPTS, "rules": UNSHAPED["beside a rule on rows"][:1]}
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(12), policy=policy)
    assert not trainer._acts
    assert not any("anatomy" in name for name in trainer.train_dataset.column_names)


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_is_unshaped(precompute: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Same weights, same evaluation as stock, on eval sets, on a fresh dataset and after a shaped step."""
    held_out = preference_rows(5, seed=1)
    results = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        trainer = dpo(
            tiny_model_dir,
            tmp_path / cls.__name__,
            preference_rows(8),
            cls,
            other_reference=True,
            eval_dataset={"a": fresh(held_out), "b": fresh(held_out[:3])},
            precompute_ref_log_probs=precompute,
        )
        if cls is AnatomyDPOTrainer:
            trainer.train()
            trained = state(trainer.model)
        else:
            trainer.model.load_state_dict(trained)
        found = {**trainer.evaluate(), **trainer.evaluate(fresh(held_out), metric_key_prefix="fresh")}
        results.append({k: v for k, v in found.items() if not k.endswith(("runtime", "per_second", "num_tokens"))})
    assert results[0].pop("epoch") > 0
    assert {k: v for k, v in results[1].items() if k != "epoch"} == results[0]
    assert not any("shaped" in key for key in results[0])


def test_evaluating_batches_with_offsets_ignores_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(8), other_reference=True)
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    plain = {key: value for key, value in batch.items() if "anatomy" not in key}
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, plain)


def test_resume_in_mid_epoch(tiny_model_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    through = dpo(tiny_model_dir, tmp_path, preference_rows(12), **common)
    through.train()
    resumed = dpo(tiny_model_dir, tmp_path, preference_rows(12), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(state(through.model), state(resumed.model))
    assert "trl_anatomy" in (tmp_path / "README.md").read_text()


ZERO: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "lora, checkpointing": {"peft_config": lora(), "gradient_checkpointing": True},
    "bf16, lora": {"peft_config": lora(), "bf16": True},
    "synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("name", list(ZERO))
def test_zero_offsets_equal_no_policy(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    shaped = dpo(tiny_model_dir, tmp_path / "a", preference_rows(8), max_steps=3, **ZERO[name])
    nothing = {"anatomy_chosen_offset": 0.0, "anatomy_rejected_offset": 0.0}
    shaped.train_dataset = shaped.train_dataset.map(lambda _: nothing)
    stock = dpo(tiny_model_dir, tmp_path / "b", preference_rows(8), DPOTrainer, max_steps=3, **ZERO[name])
    shaped.train()
    stock.train()
    tolerance = 2e-3 if "bf16" in name else 1e-6
    ours, theirs = ([e for e in history(t) if "loss" in e] for t in (shaped, stock))
    for mine, entry in zip(ours, theirs, strict=True):
        for key, value in entry.items():
            assert mine[key] == pytest.approx(value, abs=tolerance), key
    for name_, tensor in state(stock.model).items():
        torch.testing.assert_close(state(shaped.model)[name_], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("cls", "stock"), [(AnatomyDPOTrainer, DPOTrainer), (AnatomyRewardTrainer, RewardTrainer)])
def test_filtering_is_selecting(cls: Any, stock: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Bit for bit, from the model's path: what the policy computes before the constructor leaves no trace."""
    rows = preference_rows(12)
    config = {AnatomyDPOTrainer: DPOConfig, AnatomyRewardTrainer: RewardConfig}[cls]
    ours = cls(
        model=str(tiny_model_dir),
        args=config(output_dir=str(tmp_path / "ours"), **EXACT),
        train_dataset=fresh(rows),
        concept_policy=FILTER,
    )
    kept = np.flatnonzero(ours.plan.keep)
    assert 0 < len(kept) < len(rows)
    gone = [rows[i] for i in range(len(rows)) if i not in kept]
    assert all("bold" in row["chosen"] and "bold" not in row["rejected"] for row in gone)
    theirs = stock(
        model=str(tiny_model_dir),
        args=config(output_dir=str(tmp_path / "theirs"), **EXACT),
        train_dataset=fresh(rows).select(kept),
    )
    ours.train()
    theirs.train()
    assert columns(ours.train_dataset) == columns(theirs.train_dataset)
    policy_entries = [entry for entry in history(ours) if any(key.startswith("policy/") for key in entry)]
    assert [entry for entry in history(ours) if entry not in policy_entries] == history(theirs)
    assert_same_tensors(state(ours.model), state(theirs.model))


def test_hidden_state_scorers_read_the_start_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A direction is scored alike from a path and from an instance, whose modes and gradients stay as they were."""
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    DirectionScorer(vector, layer=0).save(tmp_path / "concept")
    policy = {
        "version": 1,
        "concepts": {"d": {"scorer": "direction", "path": str(tmp_path / "concept"), "layer": 0, "reduce": "max"}},
        "rules": [{"explain_away": "d", "with": "shape_reward", "strength": 1.0}],
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.train()
    model.model.layers[0].eval()
    found = []
    for given in (str(tiny_model_dir), model):
        args = DPOConfig(output_dir=str(tmp_path), **EXACT)
        trainer = AnatomyDPOTrainer(
            model=given, args=args, train_dataset=fresh(preference_rows(8)), concept_policy=policy
        )
        found.append(trainer.train_dataset["anatomy_chosen_offset"][:])
    assert found[0] == found[1]
    assert len(set(found[0])) == 8
    assert model.training
    assert not model.model.layers[0].training


# --- reward trainer ---


@pytest.mark.parametrize("user_margin", [False, True])
def test_reward_margin_formula(user_margin: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(12)
    offsets = expected_offsets(rows)
    if user_margin:
        rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(rows)]
    trainer = reward(
        tiny_model_dir,
        tmp_path,
        rows,
        model_init_kwargs={"dtype": torch.float64},
        per_device_train_batch_size=12,
        center_rewards_coefficient=0.1,
    )
    trainer.model.train()
    examples = [trainer.train_dataset[i] for i in range(12)]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    trainer.compute_loss(trainer.model, batch).backward()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(examples)))
    got = gradients(trainer.model)
    r = trainer.model(**inputs, use_cache=False).logits.view(2, -1)
    margin = torch.tensor([row.get("margin", 0.0) for row in rows]) - torch.tensor(offsets[:, 0] - offsets[:, 1])
    expected = -F.logsigmoid(r[0] - r[1] - margin).mean() + 0.1 * ((r[0] + r[1]) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
    logged = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    assert logged["margin"] == pytest.approx((r[0] - r[1]).mean().item(), abs=1e-5)
    assert logged["accuracy"] == pytest.approx((r[0] > r[1]).double().mean().item())
    assert logged["rewards_shaped/margin"] == pytest.approx((r[0] - r[1] - margin).mean().item(), abs=1e-5)


def test_reward_evaluation_is_unshaped_and_lora_resumes(tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = preference_rows(5, seed=1)
    common: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    through = reward(tiny_model_dir, tmp_path, preference_rows(12), peft_config=peft_config, **common)
    through.train()
    resumed = reward(tiny_model_dir, tmp_path, preference_rows(12), peft_config=peft_config, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_tensors(state(through.model), state(resumed.model))
    stock = reward(tiny_model_dir, tmp_path / "stock", preference_rows(12), RewardTrainer, peft_config=peft_config)
    stock.model.load_state_dict(state(resumed.model))
    ours, theirs = (trainer.evaluate(fresh(held_out)) for trainer in (resumed, stock))
    assert {k: ours[k] for k in ("eval_loss", "eval_margin")} == {k: theirs[k] for k in ("eval_loss", "eval_margin")}


# --- refusals ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aot": ({"loss_type": "aot"}, "'aot' cannot be shaped"),
    "aot_unpaired": ({"loss_type": "aot_unpaired"}, "'aot_unpaired' cannot be shaped"),
    "sft alone": ({"loss_type": "sft"}, "'sft' alone cannot be shaped"),
    "two scales": ({"loss_type": ["sigmoid", "ipo"]}, "mixes losses that divide by completion length"),
    "divergence": ({"f_divergence_type": "js_divergence"}, "f_divergence_type 'js_divergence' cannot be shaped"),
    "beta": ({"beta": 0.0}, "divides its offset by beta"),
    "collator": ({"data_collator": default_data_collator}, "data_collator was given together with shape_reward"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_at_construction(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(AnatomyError, match=re.escape(sentence)):
        dpo(tiny_model_dir, tmp_path, preference_rows(6), **options)


def test_filters_are_allowed_where_shaping_is_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(12), policy=FILTER, loss_type="aot")
    assert len(trainer.train_dataset) < 12
    assert trainer._signature_columns is None or "anatomy_chosen_offset" not in trainer._signature_columns


@pytest.mark.parametrize("cls", [AnatomyDPOTrainer, AnatomyRewardTrainer])
def test_refused_datasets(cls: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = {AnatomyDPOTrainer: DPOConfig, AnatomyRewardTrainer: RewardConfig}[cls]
    args = config(output_dir=str(tmp_path), **EXACT)
    rows = preference_rows(6)
    streaming = IterableDataset.from_generator(lambda: iter(rows))
    for dataset, sentence in (
        (streaming, "train_dataset is a IterableDataset"),
        (fresh([{**row, "image": "a.png"} for row in rows]), "train_dataset has a column 'image'"),
        (
            fresh([{**row, "anatomy_chosen_offset": 1.0} for row in rows]),
            "already has a column 'anatomy_chosen_offset'",
        ),
        (fresh([{"chosen": row["chosen"]} for row in rows]), "rejected"),
    ):
        with pytest.raises(AnatomyError, match=re.escape(sentence)):
            cls(model=str(tiny_model_dir), args=args, train_dataset=dataset, concept_policy=SHAPE)


def test_support_table_has_a_row_for_every_loss() -> None:
    table = support_table()
    assert len(table.splitlines()) == 2 + len(LOSSES)
    assert all(f"| `{name}` |" in table for name in LOSSES)


# --- two ranks ---

TWO_RANKS = """
import sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from conftest import preference_rows
from explicit_dpo import dpo
model, out = Path(sys.argv[2]), Path(sys.argv[3])
ranks = int(sys.argv[4])
trainer = dpo(model, out, preference_rows(12), per_device_train_batch_size=6 // ranks, max_steps=3, optim="sgd")
assert trainer.accelerator.num_processes == ranks, trainer.accelerator.num_processes
trainer.train()
if trainer.is_world_process_zero():
    logs = [e for e in trainer.state.log_history if "loss" in e]
    torch.save({"weights": trainer.model.state_dict(), "logs": logs}, out / f"{ranks}.pt")
"""


def test_two_ranks_train_as_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    arguments = [str(script), str(Path(__file__).parent), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [*TWO_PROCESSES, *arguments, "2"]
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-3000:]
    single = dpo(
        tiny_model_dir, tmp_path / "one", preference_rows(12), per_device_train_batch_size=6, max_steps=3, optim="sgd"
    )
    single.train()
    two = torch.load(tmp_path / "2.pt", weights_only=True)
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    logs = [entry for entry in single.state.log_history if "loss" in entry]
    for key in ("rewards/margins", "rewards_shaped/margins", "concepts/bold/gap", "concepts/bold/reward_correlation"):
        assert [e.get(key) for e in two["logs"]] == pytest.approx([e.get(key) for e in logs], abs=1e-4), key
