"""Score gaps of a concept between chosen and rejected responses, and what is wrong with one under a rule."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..audit.predict import predicted_shift
from ..reading.habits import find_habit
from .concepts import TEXTUAL, ConceptSpec

if TYPE_CHECKING:
    from ..reading.score import Scores

NEAR = 1e-6  # of a share or of a standard deviation: no difference
_OVERSHOT = 0.1  # of the plain gap, on the other side of 0: what is worth a warning


@dataclass(frozen=True)
class Gaps:
    """Scores of one concept: (n_pairs,) shares of hits (`unit` "share"), or in standard deviations ("sd")."""

    unit: str
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """(n_pairs,) chosen minus rejected."""
        return self.chosen - self.rejected

    def mean(self, pairs: np.ndarray, pull: np.ndarray | None = None) -> float:
        """Mean gap of some pairs.

        Args:
            pairs: (n_pairs,) bool.
            pull: (n_pairs,) how often each counts, NaN for pairs that are gone; None for once.

        Returns:
            NaN without a pair.
        """
        pull = np.ones(len(pairs)) if pull is None else pull
        there = pairs & np.isfinite(pull)
        return float(predicted_shift(self.gap[there][:, None], pull[there])[0])

    def shown(self, value: float) -> str:
        """A gap as text."""
        return gap_text(value, self.unit)


def gap_text(value: float, unit: str) -> str:
    """A gap in percentage points ("share") or standard deviations ("sd").

    >>> gap_text(0.25, "share"), gap_text(-1e-9, "sd")
    ('+25.0 pp', '+0.000 sd')
    """
    digits = 1 if unit == "share" else 3
    rounded = round(100 * value if unit == "share" else value, digits) + 0.0  # -0.0 is 0
    return f"{rounded:+.{digits}f} {'pp' if unit == 'share' else 'sd'}"


def gaps_of(spec: ConceptSpec, scores: "Scores") -> Gaps:
    """Score gaps of a concept: hits of a text rule or habit, of others the scores over their standard deviation."""
    chosen, rejected = scores.chosen[spec.name], scores.rejected[spec.name]
    if _is_share(spec):
        return Gaps("share", chosen, rejected)
    scale = float(scores.both(spec.name).std()) or 1.0
    return Gaps("sd", chosen / scale, rejected / scale)


def _is_share(spec: ConceptSpec) -> bool:
    """Whether the mean score of a concept is a share of responses: of text rules, and of habits that are rates."""
    if spec.given or spec.scorer not in TEXTUAL:
        return False
    return spec.habit is None or find_habit(spec.habit).kind == "rate"


def fault(sign: str | None, plain: float, after: float) -> str | None:
    """What is wrong with a gap under rules of a sign, as a verb; None where nothing is."""
    if np.isnan(after):
        return None
    if sign == "amplify":
        return "lowers" if after < plain - NEAR else None
    if abs(after) > abs(plain) + NEAR:
        return "moves away from the start model"
    return "overshoots" if plain * after < 0 and abs(after) > _OVERSHOT * abs(plain) else None
