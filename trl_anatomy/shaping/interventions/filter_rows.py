"""filter_rows: rows of SFT data that show a concept do not enter training (method.md section 8, example filter)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import NUMBER, Field, number
from .filter_pairs import FilterPairs


@dataclass(frozen=True)
class FilterRows(FilterPairs):
    """Drop rows whose response shows the concept: all that score above a threshold, or the share that scores highest.

    Args:
        concept: name of the concept.
        sign: "explain_away".
        fraction: share of the rows in the gate, those with the highest score, rounded down to whole rows; above 0,
            below 1. Or "all": every row in the gate, whatever it scores; needs `where`.
        where: the gate; None for all rows.
        above: without `fraction`, drop the rows that score above; None for 0 (text rules, SAE latents) or the best-F1
            threshold of a fitted scorer's card.

    Raises:
        AnatomyError: a value out of range, amplify, or both ways at once.

    Source: method.md section 8 (example filter).
    """

    verb: ClassVar[str] = "filter_rows"
    reads: ClassVar[str] = "rows"
    keys: ClassVar[Mapping[str, Field]] = {"fraction": number(above=0, below=1, word="all"), "above": NUMBER}

    def __post_init__(self) -> None:
        self.check_sign()
        self.check_given_keys()
        if self.sign == "amplify":
            raise AnatomyError(
                "found amplify, allowed: explain_away. Dropping rows takes away what they would teach; to amplify, "
                "use reweight_rows."
            )
        if self.side is not None:
            raise AnatomyError("found side, allowed: without it; a row has one response.")
        if self.fraction is not None and self.above is not None:
            raise AnatomyError("found fraction and above, allowed: one of the two.")
        if self.fraction == "all" and self.where is None:
            raise AnatomyError("found all without where, which drops every row, allowed: all with a where gate.")

    @property
    def asks_above(self) -> bool:
        """Whether the threshold is the scorer's own."""
        return self.above is None and self.fraction is None

    def dropped(self, chosen: np.ndarray, rejected: np.ndarray, rows: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """(n_rows,) bool: which rows go; arguments as those of `FilterPairs.dropped`, the rejected side unused."""
        if self.fraction == "all":
            return gate
        if self.fraction is None:
            return gate & (chosen > (self.above or 0.0))
        return self.highest(chosen, rows, gate)

    def why_none(self, n_gate: int) -> str:
        """Why no row of a gate of n_gate rows is dropped."""
        if isinstance(self.fraction, float):
            return "the fraction is less than one row"
        return f"no row scores above {self.above or 0:g}"
