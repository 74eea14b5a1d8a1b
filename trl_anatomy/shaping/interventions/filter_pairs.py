"""filter_pairs: the pairs that show a concept most do not enter training (method.md section 8, example filter)."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import Field, number, one_of
from ..where import Where
from .verb import Verb


@dataclass(frozen=True)
class FilterPairs(Verb):
    """Drop pairs that show the concept, in one of several ways: `fraction`, `above`, or `side` (with `above`).

    By the score gap, "explain_away" drops pairs whose chosen response scores above the rejected one, "amplify" those
    whose rejected response scores above the chosen one. A pair without such a gap is never dropped, so fewer than
    `fraction` may go.

    Args:
        concept: name of the concept.
        sign: "explain_away" or "amplify".
        fraction: share of the pairs in the gate, those with the largest gap, rounded down to whole pairs; above 0,
            below 1. Or "all": every pair in the gate, whatever it scores; needs `where`.
        where: the gate; None for all pairs.
        above: drop the pairs whose gap exceeds this (at least 0); with `side`, whose score on that side does (default
            0; any number).
        side: "chosen", "rejected" or "either": look at the score of that response instead of the gap.

    Raises:
        AnatomyError: a value out of range, or no way or several ways at once.

    Source: method.md section 8 (example filter).
    """

    verb: ClassVar[str] = "filter_pairs"
    stage: ClassVar[str] = "rows"
    reads: ClassVar[str] = "pairs"
    keys: ClassVar[Mapping[str, Field]] = {
        "fraction": number(above=0, below=1, word="all"),
        "above": number(),
        "side": one_of("chosen", "rejected", "either"),
    }

    concept: str
    sign: str
    fraction: float | str | None = None
    where: Where | None = None
    above: float | None = None
    side: str | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        self.check_given_keys()
        given = [key for key in self.keys if getattr(self, key) is not None]
        if given not in (["fraction"], ["above"], ["side"], ["above", "side"]):
            raise AnatomyError(
                f"found {' and '.join(given) or 'no way to choose pairs'}, allowed: fraction ({_FRACTION}), above, "
                "side, or side and above."
            )
        if self.fraction == "all" and self.where is None:
            raise AnatomyError("found all without where, which drops every pair, allowed: all with a where gate.")
        if given == ["above"] and self.above is not None and self.above < 0:
            raise AnatomyError(
                f"found above: {self.above:g}, allowed: at least 0; a pair without a gap of the rule's sign is never "
                "dropped. To look at one response, add side."
            )

    def dropped(self, chosen: np.ndarray, rejected: np.ndarray, rows: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """Which pairs go.

        Args:
            chosen, rejected: (n_pairs,) scores.
            rows: (n_pairs,) raw row of each pair; among equal gaps a hash of it and of the concept decides, so that
                the order of the rows does not.
            gate: (n_pairs,) bool.

        Returns:
            (n_pairs,) bool.
        """
        if self.fraction == "all":
            return gate
        if self.side is not None:
            sides = {"chosen": chosen, "rejected": rejected, "either": np.maximum(chosen, rejected)}
            return gate & (sides[self.side] > (self.above or 0.0))
        shown = chosen - rejected if self.sign == "explain_away" else rejected - chosen
        if self.above is not None:
            return gate & (shown > self.above)
        return self.highest(shown, rows, gate) & (shown > 0)

    def highest(self, shown: np.ndarray, rows: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """(n,) bool: the fraction of a gate that shows the most; ties are broken by a hash of row and concept."""
        n_drop = int(np.floor(float(self.fraction or 0) * gate.sum() + 1e-9))
        order = np.lexsort((_hash(rows, zlib.crc32(self.concept.encode())), -np.where(gate, shown, -np.inf)))[:n_drop]
        dropped = np.zeros(len(gate), dtype=bool)
        dropped[order] = True
        return dropped & gate

    def why_none(self, n_gate: int) -> str:
        """Why no pair of a gate of n_gate pairs is dropped."""
        if self.side is not None:
            which = {"either": "neither response scores", "chosen": "no chosen response scores"}
            return f"{which.get(self.side, 'no rejected response scores')} above {self.above or 0:g}"
        if isinstance(self.fraction, float) and self.fraction * n_gate < 1:
            return "the fraction is less than one pair"
        side = "chosen" if self.sign == "explain_away" else "rejected"
        return f"the {side} response scores higher{f' by more than {self.above:g}' if self.above else ''} in no pair"


_FRACTION = FilterPairs.keys["fraction"].allowed


def _hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64: the splitmix64 finaliser, a fixed random-looking order of row numbers."""
    x = rows.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
