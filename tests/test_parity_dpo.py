"""Without a rule, AnatomyDPOTrainer is trl.DPOTrainer: the same numbers to the last bit, for every loss and option."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from parity import EXACT, assert_parity, assert_same_tensors, files, fresh, history, state
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.trainers.loss_support import LOSSES

SMOOTHED = {"exo_pair", "robust"}


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def make(
    cls: type, model_dir: Path, out: Path, rows: list[dict[str, Any]], extra: dict[str, Any], **config: Any
) -> Any:
    extra = {name: value() if callable(value) else value for name, value in extra.items()}
    args = DPOConfig(output_dir=str(out), **{**EXACT, **config})
    return cls(model=str(model_dir), args=args, train_dataset=fresh(rows), **extra)


def run_both(model_dir: Path, tmp_path: Path, extra: dict[str, Any] | None = None, **config: Any) -> tuple[Any, Any]:
    rows = preference_rows(8)
    pair = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        trainer = make(cls, model_dir, tmp_path / cls.__name__, rows, extra or {}, **config)
        trainer.train()
        pair.append(trainer)
    assert_parity(*pair)
    return pair[0], pair[1]


def test_the_table_knows_every_loss_of_this_trl() -> None:
    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert len(LOSSES) == 15
    for name in LOSSES:
        assert f"'{name}'" in documented


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    run_both(tiny_model_dir, tmp_path, loss_type=loss_type, label_smoothing=smoothing, gradient_checkpointing=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"extra": {"peft_config": lora}},
    "precompute": {"precompute_ref_log_probs": True},
    "lora and precompute": {"extra": {"peft_config": lora}, "precompute_ref_log_probs": True},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing, not reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "lora and reentrant checkpointing": {
        "extra": {"peft_config": lora},
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "eval set": {
        "extra": {"eval_dataset": lambda: fresh(preference_rows(4, seed=1))},
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "eval dict, precomputed": {
        "extra": {
            "eval_dataset": lambda: {
                "a": fresh(preference_rows(4, seed=1)),
                "b": fresh(preference_rows(3, seed=2, conversational=True)),
            }
        },
        "eval_strategy": "steps",
        "eval_steps": 2,
        "precompute_ref_log_probs": True,
    },
    "loss mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.5},
    "weighting": {"use_weighting": True},
    "js divergence": {"f_divergence_type": "js_divergence"},
    "synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "truncation, keep_end": {"max_length": 8, "truncation_mode": "keep_end"},
    "truncation, keep_start": {"max_length": 8},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    run_both(tiny_model_dir, tmp_path, **{"gradient_checkpointing": "checkpointing" in name, **OPTIONS[name]})


def test_explicit_reference_and_instance(tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            reference.lm_head.weight.mul_(0.9)
        args = DPOConfig(output_dir=str(tmp_path / cls.__name__), **EXACT)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        # positional, in TRL's order
        trainer = cls(model, reference, args, None, fresh(preference_rows(8)), None, tokenizer)
        trainer.train()
        pair.append(trainer)
    assert_parity(*pair)


def test_conversational(tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        rows = preference_rows(8, conversational=True)
        pair.append(make(cls, tiny_model_dir, tmp_path / cls.__name__, rows, {}))
        pair[-1].train()
    assert_parity(*pair)


def test_resume_and_saved_files(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Both resume from step 1; the files of checkpoint and final save carry the same names, and the model card."""
    pair = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        out = tmp_path / cls.__name__
        config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        first = make(cls, tiny_model_dir, out, preference_rows(8), {}, **config)
        first.train()
        resumed = make(cls, tiny_model_dir, out, preference_rows(8), {}, **config)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
        assert_same_tensors(state(first.model), state(resumed.model))
        resumed.save_model(str(out / "final"))
        pair.append(resumed)
    assert_parity(*pair)
    ours, theirs = (tmp_path / cls.__name__ for cls in (AnatomyDPOTrainer, DPOTrainer))
    assert files(ours) == files(theirs)
    cards = [(folder / "README.md").read_text() for folder in (ours, theirs)]
    assert cards[0].replace("AnatomyDPOTrainer", "DPOTrainer") == cards[1]


def test_evaluate_on_a_new_dataset(tiny_model_dir: Path, tmp_path: Path) -> None:
    metrics = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        trainer = make(cls, tiny_model_dir, tmp_path / cls.__name__, preference_rows(8), {})
        trainer.train()
        result = trainer.evaluate(fresh(preference_rows(5, seed=3)))
        metrics.append({k: v for k, v in result.items() if not k.endswith(("runtime", "per_second"))})
    assert metrics[0] == metrics[1]
    assert "eval_loss" in metrics[0]


ONLY_CONCEPTS = {"version": 1, "concepts": {"bold": {"scorer": "text", "pattern": "bold"}}}


@pytest.mark.parametrize("policy", [{}, {"version": 1}, ONLY_CONCEPTS])
def test_a_policy_without_rules_touches_nothing(policy: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = make(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "ours", preference_rows(8), {"concept_policy": policy})
    theirs = make(DPOTrainer, tiny_model_dir, tmp_path / "theirs", preference_rows(8), {})
    ours.train()
    theirs.train()
    assert_parity(ours, theirs)


def test_the_comparison_can_fail(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A trainer whose loss is negated must not pass for TRL's."""

    class Negated(DPOTrainer):
        def _compute_loss(self, *args: Any) -> Any:
            return -super()._compute_loss(*args)

    ours = make(Negated, tiny_model_dir, tmp_path / "ours", preference_rows(8), {})
    theirs = make(DPOTrainer, tiny_model_dir, tmp_path / "theirs", preference_rows(8), {})
    ours.train()
    theirs.train()
    assert history(ours) != history(theirs)
    with pytest.raises(AssertionError):
        assert_parity(ours, theirs)
