"""All that a policy needs to know of the pairs, read with the frozen start model, and the plan that follows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .interventions import Inoculate, MaskTokens
from .plan import PolicyPlan, plan_policy, rule_gates
from .policy import ConceptPolicy

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.spans import Pairs


def settle_policy(
    policy: ConceptPolicy,
    pairs: "Pairs",
    start_model: Callable[[], Any],
    *,
    audit: "Audit | None" = None,
    cache_dir: Path | None = None,
) -> PolicyPlan:
    """Score the pairs and settle what the policy does to them.

    Args:
        policy: a policy that `check_policy` has passed.
        pairs: the pairs of the raw dataset.
        start_model: gives the frozen start model; called only when something reads it (text rules do not).
        audit: the audit in use.
        cache_dir: folder for cached scores; None keeps none.

    Raises:
        PolicyError, AnatomyError: as `ConceptPolicy.scorers`, `score_pairs` and `plan_policy`.
    """
    from ..reading.score import score_pairs
    from ..reading.scorers import shown_above

    gates = rule_gates(policy, pairs, audit)
    reads_hidden = any(spec.scorer != "text" for spec in policy.used.values())
    model = start_model() if reads_hidden else None
    scorers = policy.scorers(audit=audit, model=model)
    by_token = {rule.concept for rule in policy.rules if isinstance(rule, MaskTokens)}
    scores = score_pairs(pairs, scorers, model, tokens=by_token, cache_dir=cache_dir)
    flagged: dict[int, np.ndarray] = {}
    read: dict[int, Any] = {}
    for i, rule in enumerate(policy.rules):
        if isinstance(rule, MaskTokens):
            threshold = shown_above(scorers[rule.concept], token=True) if rule.threshold is None else rule.threshold
            pattern = policy.concepts[rule.concept].pattern
            shown = rule.shown(pairs, gates[i], pattern=pattern, scores=scores, threshold=threshold or 0.0)
            read[i] = {pair: (chosen.tokens, rejected.tokens) for pair, (chosen, rejected) in shown.items()}
        if isinstance(rule, Inoculate):
            above = shown_above(scorers[rule.concept]) if rule.above is None else rule.above
            flagged[i] = rule.flagged(scores.chosen[rule.concept], above or 0.0, gates[i])
    read |= _instructed(policy, pairs, flagged)
    return plan_policy(policy, pairs, scores, audit=audit, read=read)


def _instructed(
    policy: ConceptPolicy, pairs: "Pairs", flagged: dict[int, np.ndarray]
) -> dict[int, dict[int, tuple[list[int], list[int]]]]:
    """Rule -> the pairs that it flags -> the prompt of their chosen and rejected response, [] for the pair's own.

    A pair that several rules flag has all their instructions, in the order of the policy.
    """
    from ..reading.instruct import instructed_prompts

    asked: dict[tuple[int, int], list[str]] = {}  # (pair, side) -> instructions
    for i, pairs_of_rule in flagged.items():
        rule: Any = policy.rules[i]
        for pair in np.flatnonzero(pairs_of_rule).tolist():
            for side in (0,) if rule.side == "chosen" else (0, 1):
                asked.setdefault((pair, side), []).append(rule.instruction)
    together: dict[str, dict[int, list[int]]] = {}
    for (pair, side), instructions in asked.items():
        together.setdefault("\n\n".join(instructions), {}).setdefault(pair, []).append(side)
    prompts: dict[int, tuple[list[int], list[int]]] = {}
    for instruction, sides in together.items():
        for pair, made in instructed_prompts(pairs, list(sides), instruction).items():
            before = prompts.get(pair, ([], []))
            prompts[pair] = tuple(made[s] if s in sides[pair] else before[s] for s in (0, 1))  # type: ignore[assignment]
    return {
        i: {pair: prompts[pair] for pair in np.flatnonzero(pairs_of_rule).tolist()}
        for i, pairs_of_rule in flagged.items()
    }
