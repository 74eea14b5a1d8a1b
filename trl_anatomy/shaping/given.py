"""Structured concepts: a concept's scores less what the scores of its parents and siblings say already."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .located import PolicyError
from .policy import ConceptPolicy
from .stages import STAGES

if TYPE_CHECKING:
    from ..reading.score import Scores

_NOTHING_LEFT = 1e-6  # of a concept's standard deviation: what rounding leaves of a linear function


def check_given(policy: ConceptPolicy) -> None:
    """Raise PolicyError for a rule on a concept with `given` whose verb does not act on scores."""
    problems = [
        f"{policy.place(f'rules[{i}].with')}: found {rule.verb}, but {rule.concept!r} has given, which changes "
        "scores only, allowed: a verb that acts on scores of responses."
        for i, rule in enumerate(policy.rules)
        if rule.concept in _structured(policy) and not STAGES[rule.stage].on_scores
    ]
    if problems:
        raise PolicyError(problems)


def residualised(policy: ConceptPolicy, scores: "Scores") -> "Scores":
    """The scores that the rules act on.

    A concept with ``given: [parents, siblings]`` keeps what a least-squares fit (with intercept, over both responses of
    all pairs) on the scores of those concepts leaves. Its residual is uncorrelated with each of them, so a rule that
    acts on it leaves them where they were, as far as their relation is linear. The others enter as they were scored,
    whether they have a `given` of their own or not: two siblings may name each other.

    Args:
        policy: names the concepts.
        scores: of `policy.used`.

    Returns:
        Scores of the same names; those without `given` are untouched.

    Raises:
        PolicyError: a concept that is a linear function of those it is given.

    Source: method.md section 12.
    """
    chosen, rejected, problems = dict(scores.chosen), dict(scores.rejected), []
    for name, others in _structured(policy).items():
        both = scores.both(name)
        design = np.stack([scores.both(other) for other in others], axis=1)
        centred = design - design.mean(axis=0)
        scale = centred.std(axis=0)
        # A constant says nothing about the child; on one scale, the cut for collinear parents means the same for all.
        unit = centred / np.where(scale > 0, scale, 1.0)
        fitted = unit @ np.linalg.lstsq(unit, both - both.mean(), rcond=1e-10)[0]
        residual = both - fitted
        if both.std() > 0 and residual.std() <= _NOTHING_LEFT * both.std():
            problems.append(
                f"{policy.place(f'concepts.{name}.given')}: the scores of {name!r} are a linear function of those of "
                f"{', '.join(map(repr, others))}, so nothing is left of it, allowed: concepts that leave something."
            )
        chosen[name] = residual[: len(chosen[name])]
        rejected[name] = scores.rejected[name] if scores.one_sided else residual[len(chosen[name]) :]
    if problems:
        raise PolicyError(problems)
    return replace(scores, chosen=chosen, rejected=rejected)


def _structured(policy: ConceptPolicy) -> dict[str, tuple[str, ...]]:
    return {name: spec.given for name, spec in policy.used.items() if spec.given}
