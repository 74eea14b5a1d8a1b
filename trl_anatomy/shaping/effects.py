"""What a policy does to its own concepts, as far as the pairs tell: score gaps before and after, and warnings.

A pair of weight w whose margin the policy shifts by m pulls at the start model with w·σ(−m) instead of 1/2. The mean
score gap of the kept pairs, each counted 2w·σ(−m) times, says where the first steps move a concept: above 0 they raise
it, below 0 they lower it. What masks, instructions and edits of hidden states do is not known before training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from ..audit.predict import predicted_shift
from ..errors import AnatomyError
from ..reading.habits import find_habit
from .bind import BoundRule
from .bradley_terry import fit_strengths
from .interventions import FilterPairs, Intervention, ReweightPairs, ShapeReward
from .policy import TEXTUAL, ConceptPolicy, ConceptSpec
from .records import Acting

if TYPE_CHECKING:
    from ..reading.score import Scores

KNOWN_STAGES = ("rows", "weight", "margin")  # the others change what a pair teaches, not how much it counts
_NEAR = 1e-6  # of a share or of a standard deviation: no difference
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


def own_concepts(
    policy: ConceptPolicy, bound: Sequence[BoundRule], scores: "Scores", acting: Acting, kept: np.ndarray
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Predict the shift of the policy's own concepts, and warn of rules that do the opposite.

    Args:
        policy: the policy.
        bound: its rules, bound to the pairs.
        scores: as the rules act on them.
        acting: what each rule does.
        kept: (n_pairs,) bool.

    Returns:
        `PolicyPlan.concepts`, and rule number -> warning of the rules that get one.
    """
    pull = _pull(acting, range(len(bound)), kept)
    rows: list[dict[str, Any]] = []
    warnings: dict[int, str] = {}
    for name, spec in policy.used.items():
        own = [i for i, rule in enumerate(bound) if rule.concept is spec]
        gaps = gaps_of(spec, scores) if name in scores.names else None
        rows.append(_row(spec, None, np.ones(len(kept), bool), gaps, pull, [bound[i].verb for i in own]))
        for where in dict.fromkeys(bound[i].verb.where for i in own):
            here = [bound[i] for i in own if bound[i].verb.where == where]
            if where is not None:
                rows.append(_row(spec, str(where), here[0].gate, gaps, pull, [rule.verb for rule in here]))
        if gaps is None or scores.one_sided:  # only what two sides compare can be moved the wrong way
            continue
        for i in own:
            text = _warning(i, bound, gaps, acting, pull) if bound[i].verb.stage in KNOWN_STAGES else None
            if text is not None:
                warnings[i] = text
    return rows, warnings


def _pull(acting: Acting, rules: Sequence[int], kept: np.ndarray) -> np.ndarray:
    """(n_pairs,) how often a pair counts under some of the rules, plain training being once; NaN where it is gone."""
    margin, weight = np.zeros(len(kept)), np.ones(len(kept))
    for i in rules:
        if i in acting.shaped:
            margin = margin + acting.shaped[i].margin
        elif i in acting.weighed:  # of rules that were solved together, one holds the factor and the others hold 1
            weight = weight * acting.weighed[i].factor
    return np.where(kept, 2 * weight * expit(-margin), np.nan)


def _alone(i: int, acting: Acting, n_pairs: int) -> np.ndarray:
    """`_pull` under one rule by itself."""
    return _pull(acting, [i], _stays(i, acting, n_pairs))


def _stays(i: int, acting: Acting, n_pairs: int) -> np.ndarray:
    """(n_pairs,) bool: the pairs that a rule leaves, or finds where it acts after the rows are chosen."""
    if i in acting.dropped:
        return ~acting.dropped[i]
    dropped = acting.dropped.values() if i in acting.shaped else ()
    return ~np.logical_or.reduce([np.zeros(n_pairs, bool), *dropped])


def _row(
    spec: ConceptSpec,
    where: str | None,
    gate: np.ndarray,
    gaps: Gaps | None,
    pull: np.ndarray,
    rules: Sequence[Intervention],
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "concept": spec.name,
        "scorer": spec.scorer,
        "where": where,
        "pairs": int(gate.sum()),
        "unit": None if gaps is None else gaps.unit,
        **dict.fromkeys(("chosen", "rejected", "predicted", "predicted_under_policy")),
    }
    unknown = ", ".join(dict.fromkeys(rule.verb for rule in rules if rule.stage not in KNOWN_STAGES))
    if gaps is None:
        return row | {"effect": f"not known before training ({unknown})"}
    if gaps.unit == "share":
        row["chosen"], row["rejected"] = float(gaps.chosen[gate].mean()), float(gaps.rejected[gate].mean())
    plain, after = gaps.mean(gate), gaps.mean(gate, pull)
    row["predicted"] = plain
    if unknown:
        return row | {"effect": f"not known before training ({unknown})"}
    if np.isnan(after):
        return row | {"effect": "no pair left"}
    signs = {rule.sign for rule in rules}
    row["predicted_under_policy"] = after
    of_rows = any(getattr(rule, "reads", "") == "rows" for rule in rules)  # nothing pulls: it is there or not
    return row | {"effect": _effect(plain, after, signs.pop() if len(signs) == 1 and not of_rows else None)}


def _effect(plain: float, after: float, sign: str | None) -> str:
    """The effect on a gap, in a few words; `sign` None for a concept without a rule, or with rules of both signs."""
    if abs(after - plain) <= _NEAR:
        return "unchanged"
    if sign is None:
        return "raised" if after > plain else "lowered"
    if sign == "amplify":
        return "lowered: the wrong way" if after < plain else "raised" if after > -_NEAR else "punished less"
    if abs(after) <= _NEAR:
        return "no pull left"
    if abs(after) > abs(plain) + _NEAR:
        return "moved away"
    gone = 1 - after / plain
    return "overshoots" if gone > 1 else f"{'less than 1%' if gone < 0.01 else f'{gone:.0%}'} of the pull gone"


def _fault(sign: str | None, plain: float, after: float) -> str | None:
    """What is wrong with a gap under rules of a sign, as a verb; None where nothing is."""
    if np.isnan(after):
        return None
    if sign == "amplify":
        return "lowers" if after < plain - _NEAR else None
    if abs(after) > abs(plain) + _NEAR:
        return "moves away from the start model"
    return "overshoots" if plain * after < 0 and abs(after) > _OVERSHOT * abs(plain) else None


def _warning(i: int, bound: Sequence[BoundRule], gaps: Gaps, acting: Acting, pull: np.ndarray) -> str | None:
    """What is wrong with a rule's own concept, or None."""
    rule, gate = bound[i].verb, bound[i].gate
    plain, after, alone = gaps.mean(gate), gaps.mean(gate, pull), gaps.mean(gate, _alone(i, acting, len(gate)))
    before = plain if i in acting.dropped else gaps.mean(gate & _stays(i, acting, len(gate)))
    # Strengths and weights that were solved for together mean something together only
    solved = isinstance(rule, ReweightPairs) or (i in acting.shaped and acting.shaped[i].interval is not None)
    named = f"rule {i + 1} ({rule.verb})"
    where = "" if rule.where is None else f" where {rule.where}"
    if not solved and (fault := _fault(rule.sign, before, alone)) is not None:
        told = f"{named} {_of(fault, rule.concept)}{where}: from {gaps.shown(before)} to {gaps.shown(alone)}."
        rest = "" if np.isnan(after) or _fault(rule.sign, plain, after) else " Other rules make up for it."
        return f"{told} {_why(rule, before, alone)}{rest} {_remedy(rule, gaps, gate, plain)}"
    if (fault := _fault(rule.sign, plain, after)) is not None:
        by = _culprits(bound, gaps, acting, gate, rule.sign)
        return (
            f"{named} acts on {rule.concept!r}, and the policy {_of(fault, 'it')}{where}: "
            f"from {gaps.shown(plain)} to {gaps.shown(after)}. {by}"
        )
    every = np.ones(len(gate), bool)
    plain, after = gaps.mean(every), gaps.mean(every, pull)
    if rule.where is not None and (fault := _fault(rule.sign, plain, after)) not in (None, "overshoots"):
        return (
            f"{named} acts on {rule.concept!r}{where}, and over all pairs the policy {_of(str(fault), 'it')}: from "
            f"{gaps.shown(plain)} to {gaps.shown(after)}. {_culprits(bound, gaps, acting, every, rule.sign)} Pairs "
            "outside its gate count as before; act on them too if that is not meant."
        )
    return None


def _of(fault: str, concept: str | None) -> str:
    """The fault as a predicate: ``moves 'bold' away from the start model``."""
    name = concept if concept == "it" else repr(concept)
    verb, _, rest = fault.partition(" ")
    return " ".join(filter(None, [verb, name, rest]))


def _culprits(bound: Sequence[BoundRule], gaps: Gaps, acting: Acting, pairs: np.ndarray, sign: str | None) -> str:
    """The rules that by themselves move a concept the wrong way, as a sentence."""
    plain = gaps.mean(pairs)
    found = [
        f"rule {j + 1} ({rule.verb.verb})"
        for j, rule in enumerate(bound)
        if _fault(sign, plain, gaps.mean(pairs, _alone(j, acting, len(pairs)))) is not None
    ]
    if not found:
        return "No rule does so by itself: they do together."
    return f"By {'itself' if len(found) == 1 else 'themselves'} {' and '.join(found)} would."


def _why(rule: Intervention, plain: float, after: float) -> str:
    if isinstance(rule, FilterPairs):
        if rule.sign == "amplify":
            return "It drops pairs that reward it."
        if plain * after < 0:
            return "It drops too many pairs."
        drops = "reward" if after < plain else "punish"
        pairs = "are even on" if abs(plain) <= _NEAR else "reward" if plain > 0 else "punish"
        return f"The pairs {pairs} it, and the rule drops those that {drops} it."
    if plain * after < 0:
        return "Its strength is more than the pairs say."
    if isinstance(rule, ShapeReward) and rule.constant is not None:
        return "The pairs punish it, and the margin makes them count more."
    return "The pairs punish it, and its offsets make them count more." if plain < 0 else "Its offsets point that way."


def _remedy(rule: Intervention, gaps: Gaps, gate: np.ndarray, plain: float) -> str:
    """Verbs and settings that would not, each with the gap that it leaves."""
    gap = gaps.gap[gate]
    found = _filters(rule, gaps, gate, plain) if isinstance(rule, FilterPairs) else []
    if rule.sign == "amplify":
        found += ["shape_reward with a strength"] if gap.any() else []
    elif gap.min() < 0 < gap.max():
        found.append(f"shape_reward with strength: auto ({_fitted(rule, gaps, gap)}leaves {gaps.shown(0)})")
        found.append(f"reweight_pairs (leaves {gaps.shown(0)})")
    elif gap.min() < plain / 2 < gap.max():
        found.append(f"reweight_pairs with strength: 0.5 (leaves {gaps.shown(plain / 2)})")
    return f"Instead: {' or '.join(filter(None, [', '.join(found[:-1]), *found[-1:]]))}." if found else "Drop the rule."


def _fitted(rule: Intervention, gaps: Gaps, gap: np.ndarray) -> str:
    """The strength that `auto` fits on these gaps, for a rule that gives one of its own."""
    if not isinstance(rule, ShapeReward):
        return ""
    try:
        scale = float(np.concatenate([gaps.chosen, gaps.rejected]).std())
        return f"fits {fit_strengths(gap[:, None] / scale, [rule.concept]).strength[0]:.3g}, "
    except AnatomyError:
        return ""


def _filters(rule: FilterPairs, gaps: Gaps, gate: np.ndarray, plain: float) -> list[str]:
    """Other settings of filter_pairs that keep at least half of the pairs, and move the gap the right way."""
    found, n = [], int(gate.sum())
    for side, score in (("chosen", gaps.chosen), ("rejected", gaps.rejected)):
        stays = gate & ~(score > 0)
        left = gaps.mean(stays)
        if side == rule.side or gaps.unit != "share" or 2 * stays.sum() < n or abs(left - plain) <= _NEAR:
            continue
        if _fault(rule.sign, plain, left) is None:
            found.append(f"filter_pairs with side: {side} (leaves {gaps.shown(left)})")
    if rule.sign == "amplify":
        return found + (["filter_pairs with a fraction"] if rule.side and (gaps.gap[gate] < 0).any() else [])
    largest = np.sort(gaps.gap[gate])[::-1]
    left = largest.sum() - np.cumsum(largest)  # of the sum of gaps, once so many pairs are dropped
    most = min(int(((largest > 0) & (left >= -_NEAR)).sum()), n // 2)
    fraction = np.floor(1000 * most / n) / 1000
    drops = int(fraction * n + 1e-9)
    if drops:
        found.append(f"filter_pairs with fraction: {fraction:g} (leaves {gaps.shown(left[drops - 1] / (n - drops))})")
    return found
