"""steer: the policy's hidden states are moved along a concept while it trains, so that its weights need not be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..fields import Field, check, number, one_of
from ..where import Where
from .filter_pairs import FilterPairs
from .verb import Needs, Verb


@dataclass(frozen=True)
class Steer(Verb):
    """Add α·v to the policy's hidden states at the concept's layer, from the last user turn on.

    v is the concept's unit vector. `explain_away` adds α·v: the edit supplies the concept, so the weights need not
    learn it; `amplify` subtracts it. The reference, evaluation and the saved model are not steered. A concept of the
    scorer reft adds α times its edit instead, at its layers, on the first and last tokens of the response.

    Args:
        concept: name of the concept: a direction, probe, SAE features or reft.
        sign: "explain_away" or "amplify".
        strength: α, above 0, in the units of the hidden states; of reft: 1 is the edit as it was fitted.
        side: responses whose rows are steered: "chosen", "rejected" or "both"; None for the rejected, and for the
            response of SFT data.
        fraction: only this share of the pairs in the gate, those that `filter_pairs` would drop; None for all. Not
            with reft, which gives no score.
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range.

    Source: method.md section 8 (activations: steering).
    """

    verb: ClassVar[str] = "steer"
    stage: ClassVar[str] = "hidden"
    scorers: ClassVar[tuple[str, ...] | None] = ("features", "direction", "probe", "reft")
    keys: ClassVar[Mapping[str, Field]] = {
        "strength": number(above=0),
        "side": one_of("chosen", "rejected", "both"),
        "fraction": number(above=0, below=1),
    }

    concept: str
    sign: str
    strength: float
    side: str | None = None
    fraction: float | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        if self.side is not None:
            check(self.verb, "side", self.keys["side"], self.side)
        object.__setattr__(self, "strength", check(self.verb, "strength", self.keys["strength"], self.strength))
        if self.fraction is not None:
            object.__setattr__(self, "fraction", check(self.verb, "fraction", self.keys["fraction"], self.fraction))

    @property
    def needs(self) -> Needs:
        return Needs(scores=self.fraction is not None, turns=True)

    def strengths(self, gap: np.ndarray | None, rows: np.ndarray, acts: np.ndarray) -> np.ndarray:
        """Signed α of both sides of every pair, 0 where the rule does not act.

        Args:
            gap: (n_pairs,) score of chosen minus rejected; None without `fraction`.
            rows: (n_pairs,) raw row of each pair.
            acts: (n_pairs,) bool: pairs that are kept and in the gate.

        Returns:
            (n_pairs, 2) for chosen and rejected.
        """
        if self.fraction is not None:
            assert gap is not None
            acts = FilterPairs(self.concept, self.sign, self.fraction).dropped(gap, np.zeros_like(gap), rows, acts)
        alpha = self.strength if self.sign == "explain_away" else -self.strength
        sides = np.array([self.side in ("chosen", "both"), self.side != "chosen"])
        return np.where(acts[:, None] & sides, alpha, 0.0)
