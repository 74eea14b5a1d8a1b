"""Without a rule, AnatomySFTTrainer is trl.SFTTrainer: the same numbers to the last bit, for every kind and option."""

from pathlib import Path
from typing import Any

import pytest
from explicit_dpo import lora
from parity import assert_parity, assert_same_tensors, files, fresh, state
from sft_world import CONCEPTS, rows, sft

NOTHING: dict[str, Any] = {"version": 1, "concepts": CONCEPTS}
OPTIONS: dict[str, dict[str, Any]] = {
    "text": {},
    "chat": {},
    "messages": {},
    "plain": {},
    "messages, truncated": {"max_length": 8},
    "text, dft": {"loss_type": "dft"},
    "text, whole rows": {"completion_only_loss": False},
    "text, padding free": {"padding_free": True, "max_length": None},
    "text, packed": {"packing": True, "max_length": 24},
    "plain, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "text, shuffled": {"shuffle_dataset": True},
    "text, accumulated": {"gradient_accumulation_steps": 2},
    "chat, checkpointed": {"gradient_checkpointing": True},
    "chat, bf16": {"bf16": True},
    "text, lora": {"peft_config": lora},
    "text, evaluated": {
        "eval_dataset": lambda: {"a": fresh(rows("text", 4, 1)), "b": fresh(rows("text", 3, 2))},
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "text, label smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor.:FutureWarning")
@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_kind_and_option(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for whose, policy in (("ours", NOTHING), ("theirs", None)):
        options = {key: value() if callable(value) else value for key, value in OPTIONS[name].items()}
        trainer = sft(tiny_model_dir, tmp_path / whose, rows(name.split(",")[0]), policy, **options)
        trainer.train()
        pair.append(trainer)
    assert_parity(*pair)


def test_resume_and_saved_files(tiny_model_dir: Path, tmp_path: Path) -> None:
    pair = []
    for whose, policy in (("ours", NOTHING), ("theirs", None)):
        out = tmp_path / whose
        config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        first = sft(tiny_model_dir, out, rows(), policy, **config)
        first.train()
        resumed = sft(tiny_model_dir, out, rows(), policy, **config)
        resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
        assert_same_tensors(state(first.model), state(resumed.model))
        resumed.save_model(str(out / "final"))
        pair.append(resumed)
    assert_parity(*pair)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
