"""The tokens that a policy was planned on against those that TRL prepares, before anything is trained on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from ..errors import AnatomyError
from .seams import ROW

if TYPE_CHECKING:
    from ..reading.spans import Pairs

_SPANS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Planned:
    """Pairs that a policy was planned on.

    Attributes:
        pairs: as they were read for the plan.
        keep: (n_raw_rows,) bool: rows that the policy leaves; None where that is not known yet.
    """

    pairs: "Pairs"
    keep: np.ndarray | None = None

    def check(self, prepared: Dataset) -> None:
        """Compare the training rows that TRL has prepared with the plan's, token by token and row by row.

        Raises:
            AnatomyError: another number of rows, or a row of other tokens; names the first.
        """
        pairs = self.pairs
        expected = np.arange(len(pairs)) if self.keep is None else np.flatnonzero(self.keep[pairs.rows])
        if len(prepared) != len(expected):
            raise AnatomyError(
                f"TRL prepared {len(prepared)} rows of train_dataset, the policy was planned on {len(expected)}: "
                "it leaves out other rows than expected. Report this with the version of trl."
            )
        whole = pairs.truncation == "drop"  # the reward trainer's rows: prompt and response in one
        spans = _SPANS[1:] if whole else _SPANS
        columns = [f"{span}_ids" for span in spans]
        batches = prepared.select_columns(columns).with_format("arrow").iter(batch_size=4096)
        for start, table in zip(range(0, len(prepared), 4096), batches, strict=True):
            batch = expected[start : start + 4096].tolist()
            for span, column in zip(spans, columns, strict=True):
                array = table[column].combine_chunks()
                values = array.flatten().to_numpy(zero_copy_only=False)
                lengths = array.value_lengths().to_numpy(zero_copy_only=False)
                planned = [list(self._parts(i, span, whole)) for i in batch]
                counts = np.array([sum(map(len, parts)) for parts in planned])
                ids = np.concatenate([part for parts in planned for part in parts])
                if np.array_equal(counts, lengths) and np.array_equal(ids, values):
                    continue
                self._refuse(batch, span, planned, np.split(values, np.cumsum(lengths)[:-1]))

    def _parts(self, i: int, span: str, whole: bool) -> Iterator[np.ndarray]:
        if whole:
            yield self.pairs.ids(i, "prompt")
        yield self.pairs.ids(i, span)

    def _refuse(self, batch: list[int], span: str, planned: list[list[np.ndarray]], prepared: list[np.ndarray]) -> None:
        for i, parts, theirs in zip(batch, planned, prepared, strict=True):
            ours = np.concatenate(parts)
            if np.array_equal(ours, theirs):
                continue
            how = f"{len(theirs)} tokens" if len(theirs) != len(ours) else f"{len(theirs)} tokens, but others"
            raise AnatomyError(
                f"Dataset row {self.pairs.rows[i]}: TRL prepared {how} of the {span} side, the policy was planned on "
                f"{len(ours)}. Likely causes: a chat template that writes the time, a tokenizer or template that was "
                "changed in between, or a column beside the pairs that TRL reads."
            )


@dataclass(frozen=True, eq=False)
class PlannedRows(Planned):
    """Rows of SFT data that a policy was planned on; TRL may train on more of them, which no rule has read."""

    def check(self, prepared: Dataset) -> None:
        """Compare the training rows that TRL has prepared with the plan's, by the column `ROW` of raw rows.

        Raises:
            AnatomyError: a row is missing, has other tokens, or has a token of its response outside the loss.
        """
        pairs = self.pairs
        index = {int(row): i for i, row in enumerate(pairs.rows)}
        missing = set(pairs.rows.tolist() if self.keep is None else pairs.rows[self.keep[pairs.rows]].tolist())
        for row in prepared.select_columns([ROW, "input_ids", "labels"]):
            i = index.get(row[ROW])
            if i is None:
                continue
            missing.discard(row[ROW])
            prompt, response, *_ = pairs.tokens(i)
            if prompt + response != row["input_ids"]:
                self._refuse([i], "response", [[np.array(prompt + response)]], [np.array(row["input_ids"])])
            if response != row["labels"][len(prompt) :]:
                raise AnatomyError(
                    f"Dataset row {row[ROW]}: TRL keeps a token of its response out of the loss, and the policy was "
                    "planned on all of them. Report this with the version of trl."
                )
        if missing:
            raise AnatomyError(
                f"TRL leaves out row {min(missing)} of train_dataset and {len(missing) - 1} more, on which the policy "
                "was planned. Report this with the version of trl."
            )
