"""All that a policy needs to know of the pairs, read with the frozen start model, and the plan that follows from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .given import residualised
from .hidden import acted_on_unscored, resolve_hidden
from .interventions import Inoculate, Intervention, MaskTokens, Residualize
from .plan import PolicyPlan, plan_policy, rule_gates
from .policy import ConceptPolicy
from .residual import likelihood_ratios
from .tokens import prompts_of_rules, tokens_to_mask

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
        start_model: gives the frozen start model; called only when a rule asks for scores that it reads: text rules do
            not, nor rules on hidden states without a `fraction`; an edit (reft) is checked against it.
        audit: the audit in use.
        cache_dir: folder for cached scores; None keeps none.

    Raises:
        PolicyError, AnatomyError: as `ConceptPolicy.scorers`, `score_pairs` and `plan_policy`.
    """
    from ..reading.score import score_pairs
    from ..reading.scorers import shown_above

    gates = rule_gates(policy, pairs, audit)
    unscored = acted_on_unscored(policy)
    scored = {name: spec for name, spec in policy.used.items() if name not in unscored}
    reads = any(spec.scorer != "text" for spec in scored.values()) or any(map(_reads_text, policy.rules))
    # An edit was fitted to one model's weights, and with others it would be no more than noise.
    reads = reads or any(spec.scorer == "reft" for spec in policy.used.values())
    model = start_model() if reads else None
    scorers = policy.scorers(audit=audit, model=model)
    by_token = {rule.concept for rule in policy.rules if isinstance(rule, MaskTokens)}
    wanted = {name: scorers[name] for name in scored}
    scores = score_pairs(pairs, wanted, model, tokens=by_token, cache_dir=cache_dir)
    scores = residualised(policy, scores)
    flagged: dict[int, np.ndarray] = {}
    read: dict[int, Any] = {}
    for i, rule in enumerate(policy.rules):
        if isinstance(rule, MaskTokens):
            read[i] = tokens_to_mask(policy, i, pairs, gates[i], scores, scorers[rule.concept], model, cache_dir)
        elif isinstance(rule, Inoculate):
            above = shown_above(scorers[rule.concept]) if rule.above is None else rule.above
            flagged[i] = rule.flagged(scores.chosen[rule.concept], above or 0.0, gates[i])
        elif isinstance(rule, Residualize):
            read[i] = likelihood_ratios(rule, pairs, gates[i], scorers[rule.concept], model, cache_dir)
    read |= prompts_of_rules(policy, pairs, flagged)
    plan = plan_policy(policy, pairs, scores, audit=audit, read=read)
    return replace(plan, hidden=resolve_hidden(policy, scorers))


def _reads_text(rule: Intervention) -> bool:
    """Whether the rule asks the start model how likely tokens are."""
    return isinstance(rule, Residualize) or (isinstance(rule, MaskTokens) and rule.positions == "decided")
