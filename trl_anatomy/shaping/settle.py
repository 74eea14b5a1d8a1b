"""All that a policy needs to know of the pairs, read with the frozen start model, and the plan that follows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .interventions import MaskTokens
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
    read: dict[int, Any] = {}
    for i, rule in enumerate(policy.rules):
        if isinstance(rule, MaskTokens):
            threshold = shown_above(scorers[rule.concept], token=True) if rule.threshold is None else rule.threshold
            pattern = policy.concepts[rule.concept].pattern
            shown = rule.shown(pairs, gates[i], pattern=pattern, scores=scores, threshold=threshold or 0.0)
            read[i] = {pair: (chosen.tokens, rejected.tokens) for pair, (chosen, rejected) in shown.items()}
    return plan_policy(policy, pairs, scores, audit=audit, read=read)
