"""All that a policy needs to know of the pairs, read with the frozen start model, and the plan that follows from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hidden import acted_on_unscored, resolve_hidden
from .plan import PolicyPlan, plan_policy
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
        start_model: gives the frozen start model; called only when a rule asks for scores that it reads: text rules do
            not, nor rules on hidden states without a `fraction`.
        audit: the audit in use.
        cache_dir: folder for cached scores; None keeps none.

    Raises:
        PolicyError, AnatomyError: as `ConceptPolicy.scorers`, `score_pairs` and `plan_policy`.
    """
    from ..reading.score import score_pairs

    unscored = acted_on_unscored(policy)
    scored = {name: spec for name, spec in policy.used.items() if name not in unscored}
    model = start_model() if any(spec.scorer != "text" for spec in scored.values()) else None
    scorers = policy.scorers(audit=audit, model=model)
    hidden = resolve_hidden(policy, scorers)
    scores = score_pairs(pairs, {name: scorers[name] for name in scored}, model, cache_dir=cache_dir)
    return replace(plan_policy(policy, pairs, scores, audit=audit), hidden=hidden)
