"""How a concept offset travels from a dataset column to the batch, and what of it is logged: shared by both trainers.

TRL drops unknown columns three times over: by signature columns, in its collator, and (worse) passes unknown batch keys
into the model, where Llama swallows them silently. The mixin answers all three. The collator is a property because
TRL's constructor already collates, when it precomputes the reference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHOSEN_OFFSET = "anatomy_chosen_offset"
REJECTED_OFFSET = "anatomy_rejected_offset"
CONCEPT_GAPS = "anatomy_concept_gaps"
COLUMNS = (CHOSEN_OFFSET, REJECTED_OFFSET, CONCEPT_GAPS)
TAG = "trl-anatomy"


@dataclass
class CarryColumns:
    """Wraps TRL's collator so that `COLUMNS` reach the batch as float32 tensors, where the rows have them.

    `anatomy_*_offset` come out as (batch,), `anatomy_concept_gaps` as (batch, n_concepts).
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch


def without_columns(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as TRL knows it: extra keys would travel on into the model's forward."""
    return {key: value for key, value in inputs.items() if key not in COLUMNS}


class ShapedSeams:
    """Mixin in front of a TRL trainer: two seams that let columns through, both inert unless `_shaped_concepts` is set.

    `_shaped_concepts` holds the names of the concepts whose offsets are in the dataset, in the order of
    `anatomy_concept_gaps`; None means that nothing is shaped and the trainer is TRL's own.
    """

    _tag_names: list[str]  # TRL's
    _signature_columns: list[str]  # the Trainer's
    _shaped_concepts: tuple[str, ...] | None = None
    _collator: Any = None

    @property
    def data_collator(self) -> Any:
        return self._collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if self._shaped_concepts is not None and not isinstance(collator, CarryColumns):
            collator = CarryColumns(collator)
        self._collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self._shaped_concepts is not None:
            missing = [name for name in COLUMNS if name not in self._signature_columns]
            self._signature_columns = self._signature_columns + missing

    def _log_shaping(self, rewards: Tensor, offsets: Tensor, gaps: Tensor) -> None:
        """Add the live concept metrics of one training batch to TRL's `_metrics`.

        Args:
            rewards: (batch, 2) unshaped rewards of chosen and rejected, detached.
            offsets: (batch, 2) what was added to them.
            gaps: (batch, n_concepts) raw score gaps, chosen minus rejected.
        """
        gathered = self.accelerator.gather(torch.cat([rewards, offsets, gaps], dim=1).float())  # type: ignore[attr-defined]
        reward, offset = gathered[:, :2], gathered[:, 2:4]
        margin, pull = reward[:, 0] - reward[:, 1], offset[:, 0] - offset[:, 1]
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        size = pull.abs().mean()
        metrics["rewards_shaped/offset_margin"].append(pull.mean().item())
        metrics["rewards_shaped/offset_share"].append((size / (size + margin.abs().mean()).clamp(min=1e-12)).item())
        for name, gap in zip(self._shaped_concepts or (), gathered[:, 4:].unbind(dim=1), strict=True):
            metrics[f"concepts/{name}/gap"].append(gap.mean().item())
            correlation = _correlation(margin, gap)
            if correlation is not None:
                metrics[f"concepts/{name}/reward_correlation"].append(correlation)
                metrics[f"concepts/{name}/margin_explained"].append(correlation**2)


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson correlation of two (n,) tensors; None where n < 3 or a side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return None if len(x) < 3 or scale < 1e-12 else float(torch.dot(x, y) / scale)
