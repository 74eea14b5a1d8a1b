"""Strengths and offsets of the rules on the margin: shape_reward and residualize."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AnatomyError
from .bradley_terry import fit_strengths
from .interventions import Residualize, ShapeReward
from .located import PolicyError
from .policy import ConceptPolicy

if TYPE_CHECKING:
    from ..reading.score import Scores


@dataclass(frozen=True)
class Shaped:
    """One margin rule at work: `offsets` (2, n_pairs) for chosen and rejected."""

    strength: float
    interval: tuple[float, float] | None
    scale: float | None
    offsets: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        return self.offsets[0] - self.offsets[1]


def settle_margins(
    policy: ConceptPolicy,
    scores: "Scores",
    ratios: Mapping[int, np.ndarray],
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
    weight: np.ndarray,
    copies: np.ndarray | None = None,
) -> dict[int, Shaped]:
    """Strength and offsets of every margin rule; `weight` (n_pairs,) counts in the fit, `copies` as `fit_strengths`."""
    rules = {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, ShapeReward | Residualize)}
    standard: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    scales: dict[int, float] = {}
    problems = []
    for i, rule in rules.items():
        if not (gates[i] & kept).any():
            problems.append(f"{policy.place(f'rules[{i}]')}: the filter_pairs rules leave no pair in this gate.")
            continue
        residual = isinstance(rule, Residualize)
        chosen, rejected = ratios[i] if residual else (scores.chosen[rule.concept], scores.rejected[rule.concept])
        pooled = np.concatenate([chosen[kept], rejected[kept]])
        if isinstance(rule, ShapeReward) and rule.constant is not None:
            standard[i] = np.full(len(chosen), 0.5), np.full(len(chosen), -0.5)
        elif pooled.std() <= 1e-12 * max(1.0, float(np.abs(pooled).max())):
            what = "what is asked for changes log pi0(y) by" if residual else f"the concept {rule.concept!r} scores"
            problems.append(
                f"{policy.place(f'rules[{i}]')}: {what} {pooled[0]:g} on every response; there is nothing to shape. "
                "Correct its scorer or drop the rule."
            )
        elif residual:  # log-probabilities have a unit of their own
            standard[i] = (chosen, rejected)
        else:
            scales[i] = float(pooled.std())
            standard[i] = ((chosen - pooled.mean()) / scales[i], (rejected - pooled.mean()) / scales[i])
    if problems:
        raise PolicyError(problems)

    def offsets(i: int, strength: float) -> np.ndarray:
        return np.stack(ShapeReward.offsets(strength, *standard[i], gates[i] & kept))

    strengths = {i: rule.fixed for i, rule in rules.items() if rule.fixed is not None}
    intervals: dict[int, tuple[float, float]] = {}
    fitted = [i for i in rules if i not in strengths]
    if fitted:
        gaps = np.stack([np.where(gates[i], standard[i][0] - standard[i][1], 0.0)[kept] for i in fitted], axis=1)
        # What rules with a given strength already say is part of the margin that the fit starts from.
        given = sum((offsets(i, value) for i, value in strengths.items()), np.zeros((2, len(kept))))
        copies = None if copies is None else copies[kept]
        try:
            names = [f"{rules[i].concept!r}" for i in fitted]
            fit = fit_strengths(gaps, names, (given[0] - given[1])[kept], weight[kept], copies)
        except AnatomyError as error:
            raise PolicyError([f"{policy.place(f'rules[{fitted[0]}]')}: {error}"]) from None
        for column, i in enumerate(fitted):
            strengths[i] = float(fit.strength[column])
            intervals[i] = (float(fit.ci_low[column]), float(fit.ci_high[column]))
    return {
        i: Shaped(strengths[i], intervals.get(i), scales.get(i), offsets(i, strengths[i])) for i, rule in rules.items()
    }
