"""shape_reward: an offset on the margin says what the concept would teach, so that the model need not learn it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import Field, check, number
from ..where import Where
from .verb import Verb

_STRENGTH = number(above=0, word="auto")


@dataclass(frozen=True)
class ShapeReward(Verb):
    """Add λ · s̃(y) to the score of every response in the gate: the loss becomes −log σ(β·D + λ·(s̃+ − s̃−)).

    s̃ is the concept's score in standard deviations. λ > 0 explains the concept away, λ < 0 amplifies it; `strength` is
    its size. With "auto" λ is fitted on the pairs so that they have nothing left to say about the concept; it comes out
    negative where the pairs punish the concept, and then cancels the punishment.

    With `constant` W every pair in the gate gets the margin W (−W where it amplifies), whatever the concept scores: the
    variant for a hypothesis about a cluster of pairs.

    Args:
        concept: name of the concept.
        sign: "explain_away" or "amplify".
        strength: a number above 0, or "auto" (explain_away only), the default.
        constant: W above 0, instead of a strength; needs `where`.
        where: the gate; None for all pairs. Outside it the offset is 0 on both responses.

    Raises:
        AnatomyError: a value out of range, amplify with strength "auto", or a constant that comes with a strength or
            without a gate.

    Source: method.md section 8 (loss: reward shaping), section 12 (calibrated strength).
    """

    verb: ClassVar[str] = "shape_reward"
    stage: ClassVar[str] = "margin"
    reads: ClassVar[str] = "pairs"
    on_text: ClassVar[bool] = True
    keys: ClassVar[Mapping[str, Field]] = {"strength": _STRENGTH, "constant": number(above=0)}

    concept: str
    sign: str
    strength: float | str | None = None
    where: Where | None = None
    constant: float | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        if self.constant is not None:
            object.__setattr__(self, "constant", check(self.verb, "constant", self.keys["constant"], self.constant))
            if self.strength is not None:
                raise AnatomyError("found strength beside constant, allowed: one of the two.")
            if self.where is None:
                raise AnatomyError(
                    "found constant without where, allowed: a gate (where). The same margin on every pair says nothing "
                    "about a concept."
                )
            return
        strength = "auto" if self.strength is None else self.strength
        object.__setattr__(self, "strength", read_strength(self.verb, self.sign, strength))

    @property
    def fixed(self) -> float | None:
        """λ (or W) when the policy gives it, None when it is to be fitted."""
        size = self.strength if self.constant is None else self.constant
        return signed_strength(self.sign, "auto" if size is None else size)

    @staticmethod
    def offsets(
        strength: float, chosen: np.ndarray, rejected: np.ndarray, acts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """λ · s̃ of both responses, centred over the responses it acts on so that pointwise losses do not drift.

        Args:
            strength: λ.
            chosen, rejected: (n_pairs,) scores in standard deviations.
            acts: (n_pairs,) bool: pairs that are kept and in the gate.

        Returns:
            Two (n_pairs,) arrays, 0 where the rule does not act.
        """
        if not acts.any():
            return np.zeros(len(chosen)), np.zeros(len(chosen))
        centre = (chosen[acts].mean() + rejected[acts].mean()) / 2
        return tuple(np.where(acts, strength * (score - centre), 0.0) for score in (chosen, rejected))  # type: ignore[return-value]


def read_strength(verb: str, sign: str, strength: float | str) -> float | str:
    """The strength of a margin rule; AnatomyError where it is out of range, or "auto" with amplify."""
    strength = check(verb, "strength", _STRENGTH, strength)
    if sign == "amplify" and strength == "auto":
        raise AnatomyError(
            "found auto, the default, with amplify, allowed: a number above 0. The fitted strength says how much "
            "to take away; how much to add is yours to say."
        )
    return strength


def signed_strength(sign: str, strength: float | str) -> float | None:
    """λ, negative where it amplifies; None when it is to be fitted."""
    if isinstance(strength, str):
        return None
    return strength if sign == "explain_away" else -strength
