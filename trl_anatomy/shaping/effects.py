"""What a policy does to its own concepts, as far as the pairs tell: score gaps before and after, and warnings.

A pair of weight w whose margin the policy shifts by m pulls at the start model with w·σ(−m) instead of 1/2. The mean
score gap of the kept pairs, each counted 2w·σ(−m) times, says where the first steps move a concept: above 0 they raise
it, below 0 they lower it. What masks, instructions and edits of hidden states do is not known before training.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from .bind import BoundRule
from .gaps import NEAR, Gaps, fault, gaps_of
from .interventions import Intervention
from .policy import ConceptPolicy, ConceptSpec
from .stages import STAGES, Effect

if TYPE_CHECKING:
    from ..reading.score import Scores

Effects = Mapping[int, Effect]


def own_concepts(
    policy: ConceptPolicy,
    bound: Sequence[BoundRule],
    scores: "Scores",
    effects: Effects,
    kept: np.ndarray,
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Predict the shift of the policy's own concepts, and warn of rules that do the opposite.

    Args:
        policy: the policy.
        bound: its rules, bound to the pairs.
        scores: as the rules act on them.
        effects: rule -> what it does.
        kept: (n_pairs,) bool.

    Returns:
        `PolicyPlan.concepts`, and rule number -> warning of the rules that get one.
    """
    pull = _pull(effects, range(len(bound)), kept)
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
            text = _warning(i, bound, gaps, effects, pull) if STAGES[bound[i].verb.stage].on_scores else None
            if text is not None:
                warnings[i] = text
    return rows, warnings


def _pull(effects: Effects, rules: Sequence[int], kept: np.ndarray) -> np.ndarray:
    """(n_pairs,) how often a pair counts under some of the rules, plain training being once; NaN where it is gone."""
    margin, weight = np.zeros(len(kept)), np.ones(len(kept))
    for i in rules:
        if effects[i].offsets is not None:
            margin = margin + effects[i].margin
        if (factor := effects[i].factor) is not None:  # of rules that were solved together, one holds it, others 1
            weight = weight * factor
    return np.where(kept, 2 * weight * expit(-margin), np.nan)


def _alone(i: int, effects: Effects, n_pairs: int) -> np.ndarray:
    """`_pull` under one rule by itself."""
    return _pull(effects, [i], _stays(i, effects, n_pairs))


def _stays(i: int, effects: Effects, n_pairs: int) -> np.ndarray:
    """(n_pairs,) bool: the pairs that a rule leaves, or finds where it acts after the rows are chosen."""
    own = effects[i].dropped
    if own is not None:
        return ~own
    every = [effect.dropped for effect in effects.values() if effect.dropped is not None]
    return ~np.logical_or.reduce([np.zeros(n_pairs, bool), *([] if effects[i].offsets is None else every)])


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
    unknown = ", ".join(dict.fromkeys(rule.verb for rule in rules if not STAGES[rule.stage].on_scores))
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
    of_rows = any(rule.reads == "rows" for rule in rules)  # nothing pulls: it is there or not
    return row | {"effect": _effect(plain, after, signs.pop() if len(signs) == 1 and not of_rows else None)}


def _effect(plain: float, after: float, sign: str | None) -> str:
    """The effect on a gap, in a few words; `sign` None for a concept without a rule, or with rules of both signs."""
    if abs(after - plain) <= NEAR:
        return "unchanged"
    if sign is None:
        return "raised" if after > plain else "lowered"
    if sign == "amplify":
        return "lowered: the wrong way" if after < plain else "raised" if after > -NEAR else "punished less"
    if abs(after) <= NEAR:
        return "no pull left"
    if abs(after) > abs(plain) + NEAR:
        return "moved away"
    gone = 1 - after / plain
    return "overshoots" if gone > 1 else f"{'less than 1%' if gone < 0.01 else f'{gone:.0%}'} of the pull gone"


def _warning(i: int, bound: Sequence[BoundRule], gaps: Gaps, effects: Effects, pull: np.ndarray) -> str | None:
    """What is wrong with a rule's own concept, or None."""
    rule, gate = bound[i].verb, bound[i].gate
    plain, after, alone = gaps.mean(gate), gaps.mean(gate, pull), gaps.mean(gate, _alone(i, effects, len(gate)))
    before = plain if effects[i].dropped is not None else gaps.mean(gate & _stays(i, effects, len(gate)))
    named = f"rule {i + 1} ({rule.verb})"
    where = "" if rule.where is None else f" where {rule.where}"
    if not effects[i].together and (wrong := fault(rule.sign, before, alone)) is not None:
        told = f"{named} {_of(wrong, rule.concept)}{where}: from {gaps.shown(before)} to {gaps.shown(alone)}."
        rest = "" if np.isnan(after) or fault(rule.sign, plain, after) else " Other rules make up for it."
        return f"{told} {STAGES[rule.stage].why(rule, before, alone)}{rest} {_remedy(rule, gaps, gate, plain)}"
    if (wrong := fault(rule.sign, plain, after)) is not None:
        by = _culprits(bound, gaps, effects, gate, rule.sign)
        return (
            f"{named} acts on {rule.concept!r}, and the policy {_of(wrong, 'it')}{where}: "
            f"from {gaps.shown(plain)} to {gaps.shown(after)}. {by}"
        )
    every = np.ones(len(gate), bool)
    plain, after = gaps.mean(every), gaps.mean(every, pull)
    if rule.where is not None and (wrong := fault(rule.sign, plain, after)) not in (None, "overshoots"):
        return (
            f"{named} acts on {rule.concept!r}{where}, and over all pairs the policy {_of(str(wrong), 'it')}: from "
            f"{gaps.shown(plain)} to {gaps.shown(after)}. {_culprits(bound, gaps, effects, every, rule.sign)} Pairs "
            "outside its gate count as before; act on them too if that is not meant."
        )
    return None


def _of(wrong: str, concept: str | None) -> str:
    """The fault as a predicate: ``moves 'bold' away from the start model``."""
    name = concept if concept == "it" else repr(concept)
    verb, _, rest = wrong.partition(" ")
    return " ".join(filter(None, [verb, name, rest]))


def _culprits(bound: Sequence[BoundRule], gaps: Gaps, effects: Effects, pairs: np.ndarray, sign: str | None) -> str:
    """The rules that by themselves move a concept the wrong way, as a sentence."""
    plain = gaps.mean(pairs)
    found = [
        f"rule {j + 1} ({rule.verb.verb})"
        for j, rule in enumerate(bound)
        if fault(sign, plain, gaps.mean(pairs, _alone(j, effects, len(pairs)))) is not None
    ]
    if not found:
        return "No rule does so by itself: they do together."
    return f"By {'itself' if len(found) == 1 else 'themselves'} {' and '.join(found)} would."


def _remedy(rule: Intervention, gaps: Gaps, gate: np.ndarray, plain: float) -> str:
    """Verbs and settings that would not, each with the gap that it leaves."""
    gap, stage = gaps.gap[gate], STAGES[rule.stage]
    found = stage.settings(rule, gaps, gate, plain)
    if rule.sign == "amplify":
        found += ["shape_reward with a strength"] if gap.any() else []
    elif gap.min() < 0 < gap.max():
        found.append(f"shape_reward with strength: auto ({stage.fitted(rule, gaps, gap)}leaves {gaps.shown(0)})")
        found.append(f"reweight_pairs (leaves {gaps.shown(0)})")
    elif gap.min() < plain / 2 < gap.max():
        found.append(f"reweight_pairs with strength: 0.5 (leaves {gaps.shown(plain / 2)})")
    return f"Instead: {' or '.join(filter(None, [', '.join(found[:-1]), *found[-1:]]))}." if found else "Drop the rule."
