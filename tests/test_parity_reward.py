"""Without a rule, AnatomyRewardTrainer is trl.RewardTrainer: the same numbers to the last bit."""

from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows
from parity import EXACT, assert_parity, assert_same_tensors, files, fresh, history, state
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

from trl_anatomy import AnatomyRewardTrainer


def lora() -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score"],
        task_type="SEQ_CLS",
        init_lora_weights=False,
    )


def with_margin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "margin": 0.25 * i - 0.5} for i, row in enumerate(rows)]


def make(cls: type, model_dir: Path, out: Path, rows: list[Any], extra: dict[str, Any], **config: Any) -> Any:
    extra = {name: value() if callable(value) else value for name, value in extra.items()}
    args = RewardConfig(output_dir=str(out), **{**EXACT, **config})
    return cls(model=str(model_dir), args=args, train_dataset=fresh(rows), **extra)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "margin column": {"rows": with_margin(preference_rows(8))},
    "centring": {"center_rewards_coefficient": 0.1},
    "lora": {"extra": {"peft_config": lora}},
    "lora and checkpointing, reentrant": {
        "extra": {"peft_config": lora},
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "eval set": {
        "extra": {"eval_dataset": lambda: fresh(preference_rows(4, seed=1))},
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "eval dict": {
        "extra": {"eval_dataset": lambda: {"a": fresh(preference_rows(4, 1)), "b": fresh(preference_rows(3, 2))}},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "long rows dropped": {"max_length": 12},
    "conversational": {"rows": preference_rows(8, conversational=True)},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_option(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    case = {"gradient_checkpointing": False, **CASES[name]}
    rows, extra = case.pop("rows", preference_rows(8)), case.pop("extra", {})
    pair = []
    for cls in (AnatomyRewardTrainer, RewardTrainer):
        pair.append(make(cls, tiny_model_dir, tmp_path / cls.__name__, rows, extra, **case))
        pair[-1].train()
    assert_parity(*pair)
    if name == "long rows dropped":
        assert 0 < len(pair[1].train_dataset) < len(rows)


def test_resume_and_saved_files(tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for cls in (AnatomyRewardTrainer, RewardTrainer):
        out = tmp_path / cls.__name__
        first = make(cls, tiny_model_dir, out, preference_rows(8), {}, save_strategy="steps", save_steps=1)
        first.train()
        resumed = make(cls, tiny_model_dir, out, preference_rows(8), {}, save_strategy="steps", save_steps=1)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
        assert_same_tensors(state(first.model), state(resumed.model))
        resumed.save_model(str(out / "final"))
        pair.append(resumed)
    assert_parity(*pair)
    assert files(tmp_path / "AnatomyRewardTrainer") == files(tmp_path / "RewardTrainer")


def test_positional_arguments_and_an_instance(tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for cls in (AnatomyRewardTrainer, RewardTrainer):
        set_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
        args = RewardConfig(output_dir=str(tmp_path / cls.__name__), **EXACT)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        pair.append(cls(model, args, None, fresh(preference_rows(8)), None, tokenizer))
        pair[-1].train()
    assert_parity(*pair)


ONLY_CONCEPTS = {"version": 1, "concepts": {"bold": {"scorer": "text", "pattern": "bold"}}}


@pytest.mark.parametrize("policy", [{}, ONLY_CONCEPTS])
def test_a_policy_without_rules_touches_nothing(policy: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = make(AnatomyRewardTrainer, tiny_model_dir, tmp_path / "ours", preference_rows(8), {"concept_policy": policy})
    theirs = make(RewardTrainer, tiny_model_dir, tmp_path / "theirs", preference_rows(8), {})
    ours.train()
    theirs.train()
    assert_parity(ours, theirs)


def test_the_comparison_can_fail(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Negated(RewardTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return -super().compute_loss(*args, **kwargs)

    ours = make(Negated, tiny_model_dir, tmp_path / "ours", preference_rows(8), {})
    theirs = make(RewardTrainer, tiny_model_dir, tmp_path / "theirs", preference_rows(8), {})
    ours.train()
    theirs.train()
    assert history(ours) != history(theirs)
    with pytest.raises(AssertionError):
        assert_parity(ours, theirs)
