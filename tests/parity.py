"""How the parity tests compare two trainers: everything that was computed, not only that a loss was logged."""

import uuid
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

TIMES = ("runtime", "per_second")  # the only entries of a log that may differ between two runs

EXACT = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "learning_rate": 1e-2,
    "seed": 7,
}


def fresh(rows: list[dict[str, Any]]) -> Dataset:
    """A dataset with a fingerprint of its own, so that no run finds another's cached reference or tokens."""
    dataset = Dataset.from_list(rows)
    dataset._fingerprint = uuid.uuid4().hex[:16]
    return dataset


def history(trainer: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in trainer.state.log_history
    ]


def without_policy(entries: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without the entry that records a policy."""
    return [entry for entry in entries if not any(key.startswith("policy/") for key in entry)]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"tensors differ: {different}"


def columns(dataset: Any) -> dict[str, list[Any]]:
    return {name: list(dataset[name]) for name in dataset.column_names}


def assert_parity(ours: Any, theirs: Any, *, trained: bool = True) -> None:
    """Log history, weights of policy and reference, prepared columns, signature columns, collator, tags, callbacks."""
    assert columns(ours.train_dataset) == columns(theirs.train_dataset)
    ours._set_signature_columns_if_needed()
    theirs._set_signature_columns_if_needed()
    assert ours._signature_columns == theirs._signature_columns
    assert ours.data_collator == theirs.data_collator
    assert ours._tag_names == theirs._tag_names
    assert [type(c) for c in ours.callback_handler.callbacks] == [type(c) for c in theirs.callback_handler.callbacks]
    if trained:
        assert any("loss" in entry for entry in history(theirs)), "the stock run logged no loss: the case tests nothing"
        assert history(ours) == history(theirs)
    assert_same_tensors(state(ours.model), state(theirs.model))
    if getattr(theirs, "ref_model", None) is not None:
        assert_same_tensors(state(ours.ref_model), state(theirs.ref_model))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
