"""Texts of pairs by their row, for the page and for a look in Python."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from ..reading.spans import Pairs


class RowTexts:
    """Prompt, chosen and rejected text of rows of the audited dataset.

    Args:
        data: the audited pairs, whose texts are those that are trained on; of a dataset alone, the texts as it has
            them.
    """

    def __init__(self, data: Dataset | Pairs) -> None:
        self._data = data

    @property
    def raw(self) -> Dataset:
        """The audited dataset."""
        return getattr(self._data, "raw", self._data)

    def of(self, row: int) -> tuple[str, str, str]:
        """Prompt, chosen and rejected; of SFT data, prompt, response and nothing."""
        if (place := self._places.get(row)) is not None:
            return self._data.texts(place)
        from ..reading.sft import sft_texts
        from ..reading.spans import flatten_text, split_row

        given: dict[str, Any] = self.raw[row]
        if "chosen" not in given:
            return (*sft_texts(given), "")
        split = split_row(given)
        return flatten_text(split["prompt"]), flatten_text(split["chosen"]), flatten_text(split["rejected"])

    @cached_property
    def _places(self) -> dict[int, int]:
        rows = getattr(self._data, "rows", None)
        return {} if rows is None else {int(row): i for i, row in enumerate(rows)}
