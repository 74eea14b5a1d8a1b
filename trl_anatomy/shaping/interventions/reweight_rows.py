"""reweight_rows: rows of SFT data count more or less, so that together they show less (or more) of a concept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import NAMES_OR_NONE, NUMBER, TEXT, Field, number
from .reweight_pairs import ReweightPairs


@dataclass(frozen=True)
class ReweightRows(ReweightPairs):
    """Weigh the loss of each row in the gate: by balanced weights, or by a column of the dataset.

    Balanced weights are those closest to uniform (Kullback-Leibler divergence, mean 1) under which the share of rows
    that show the concept is (1 − strength) times what it was for "explain_away", (1 + strength) times for "amplify",
    while the mean scores of the held concepts stay (`trl_anatomy.shaping.weights`).

    Args:
        concept: name of the concept; None with `column`.
        sign: "explain_away" or "amplify"; None with `column`.
        strength: share of what the rows show of it that is taken away, above 0, below 1, or added.
        above: a row shows the concept if it scores above; None for 0 (text rules, SAE latents) or the best-F1
            threshold of a fitted scorer's card.
        hold: concepts whose mean score stays as it is; None for all of the policy that no such rule acts on.
        column: instead of all that: a column of the dataset with weights, used as they are.
        where: the gate; None for all rows. Outside it a row weighs 1.

    Raises:
        AnatomyError: a value out of range, keys that do not go together, or no strength.

    Source: method.md section 8 (reweight), section 12 (balanced weights).
    """

    verb: ClassVar[str] = "reweight_rows"
    reads: ClassVar[str] = "rows"
    keys: ClassVar[Mapping[str, Field]] = {
        "strength": number(above=0),
        "above": NUMBER,
        "hold": NAMES_OR_NONE,
        "column": TEXT,
    }

    above: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column is not None:
            if self.above is not None:
                raise AnatomyError("found above beside column, allowed: column alone; its weights are used as given.")
        elif self.strength is None or (self.sign == "explain_away" and self.strength >= 1):
            what = "no strength" if self.strength is None else f"{self.strength:g} with explain_away"
            raise AnatomyError(
                f"found {what}, allowed: a number above 0, below 1; rows that are to count nothing go with filter_rows."
            )

    @property
    def asks_above(self) -> bool:
        """Whether the threshold is the scorer's own."""
        return self.column is None and self.above is None

    def balanced(self, gap: np.ndarray) -> np.ndarray:
        """(n_rows,) 1 where a row shows the concept, else 0, from its scores."""
        return (gap > (self.above or 0.0)).astype(float)
