"""filter_pairs: the pairs that show a concept most do not enter training (method.md section 8, example filter)."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..fields import Field, check, number, one_of
from ..where import Where


@dataclass(frozen=True)
class FilterPairs:
    """Drop the pairs whose score gap is largest.

    `explain_away` drops pairs whose chosen response scores above the rejected one, `amplify` those whose rejected
    response scores above the chosen one. A pair without such a gap is never dropped, so fewer than `fraction` may go.

    Args:
        concept: name of the concept.
        sign: "explain_away" or "amplify".
        fraction: share of the pairs in the gate, rounded down to whole pairs; above 0, below 1.
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range.
    """

    verb: ClassVar[str] = "filter_pairs"
    stage: ClassVar[str] = "rows"
    keys: ClassVar[Mapping[str, Field]] = {"fraction": number(above=0, below=1)}

    concept: str
    sign: str
    fraction: float
    where: Where | None = None

    def __post_init__(self) -> None:
        check(self.verb, "sign", one_of("explain_away", "amplify"), self.sign)
        object.__setattr__(self, "fraction", check(self.verb, "fraction", self.keys["fraction"], self.fraction))

    def dropped(self, gap: np.ndarray, rows: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """Which pairs go.

        Args:
            gap: (n_pairs,) score of chosen minus rejected.
            rows: (n_pairs,) raw row of each pair; among equal gaps a hash of it and of the concept decides, so that
                the order of the rows does not.
            gate: (n_pairs,) bool.

        Returns:
            (n_pairs,) bool.
        """
        shown = gap if self.sign == "explain_away" else -gap
        n_drop = int(np.floor(self.fraction * gate.sum() + 1e-9))
        order = np.lexsort((_hash(rows, zlib.crc32(self.concept.encode())), -np.where(gate, shown, -np.inf)))[:n_drop]
        dropped = np.zeros(len(gap), dtype=bool)
        dropped[order] = True
        return dropped & gate & (shown > 0)


def _hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64: the splitmix64 finaliser, a fixed random-looking order of row numbers."""
    x = rows.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
