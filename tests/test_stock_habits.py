"""What users of TRL rely on beside the numbers: a policy leaves it as it is."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows
from parity import EXACT, fresh
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer

KINDS = {
    "dpo": (AnatomyDPOTrainer, DPOTrainer, DPOConfig),
    "reward": (AnatomyRewardTrainer, RewardTrainer, RewardConfig),
}
BOLD = {"version": 1, "concepts": {"bold": {"scorer": "text", "pattern": "\\*\\*"}}}
POLICIES: dict[str, dict[str, Any]] = {
    "rows": {**BOLD, "rules": [{"explain_away": "bold", "with": "filter_pairs", "fraction": 0.2}]},
    "margin": {**BOLD, "rules": [{"explain_away": "bold", "with": "shape_reward", "strength": 1.0}]},
}


def trained(kind: str, policy: str, model_dir: Path, out: Path, **config: Any) -> Any:
    ours, _, settings = KINDS[kind]
    args = settings(output_dir=str(out), **{**EXACT, **config})
    rows = fresh(preference_rows(12))
    trainer: Any = ours(model=str(model_dir), args=args, train_dataset=rows, concept_policy=POLICIES[policy])
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_takes_what_stock_takes(kind: str) -> None:
    ours, stock, _ = KINDS[kind]
    assert (
        inspect.signature(ours.training_step).parameters.keys()
        == inspect.signature(stock.training_step).parameters.keys()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{}, {"train_dataset": None}, {"concept_policy": POLICIES["margin"]}], ids=str)
def test_a_missing_dataset_gets_stocks_own_sentence(
    kind: str, given: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    ours, stock, settings = KINDS[kind]
    said = []
    for cls, more in ((stock, {}), (ours, given)):
        with pytest.raises(ValueError, match="train_dataset") as error:
            cls(model=str(tiny_model_dir), args=settings(output_dir=str(tmp_path), **EXACT), **more)
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(("kind", "policy"), [("dpo", "rows"), ("dpo", "margin"), ("reward", "margin")])
def test_the_history_begins_and_ends_with_the_trainings_own_entries(
    kind: str, policy: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    history = trained(kind, policy, tiny_model_dir, tmp_path).state.log_history
    assert "loss" in history[0]
    assert any(key.startswith("policy/") for key in history[1])
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert sum(any(key.startswith("policy/") for key in entry) for entry in history) == 1
    assert "train_loss" in history[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_of_a_summary_alone_holds_nothing_else(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    history = trained(kind, "rows", tiny_model_dir, tmp_path, logging_strategy="no").state.log_history
    assert len(history) == 1
    assert "train_loss" in history[0]
