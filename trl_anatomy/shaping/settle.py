"""All that a policy needs to know of the pairs, read with the frozen start model, and the plan that follows from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AnatomyError
from ..reading.storage import url_of
from .bind import BoundRule, bind
from .concepts import TEXTUAL
from .given import check_given, residualised
from .plan import PolicyPlan, plan_policy
from .policy import ConceptPolicy
from .resolve import Resolved
from .stages import STAGES

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.score import Scores
    from ..reading.scorers import Scorer
    from ..reading.spans import Pairs
    from ..reading.token_codes import TokenCodes


@dataclass(frozen=True, eq=False)
class Begun:
    """A policy whose rules are bound and whose scorers are there; what it still needs are the scores of the pairs.

    Attributes:
        policy, pairs, audit, cache_dir: as given to `settle_policy`.
        rules: its rules, bound to the pairs.
        scorers: concept -> scorer.
        model: the frozen start model, or None where nothing reads it.
    """

    policy: ConceptPolicy
    pairs: "Pairs"
    audit: "Audit | None"
    cache_dir: Path | None
    rules: tuple[BoundRule, ...]
    scorers: "dict[str, Scorer]"
    model: Any

    @property
    def wanted(self) -> "dict[str, Scorer]":
        """Concept -> scorer, of the concepts whose scores rules act on."""
        return {name: self.scorers[name] for name in _scored(self.policy)}

    def score(self) -> "Scores":
        """Scores in a pass of their own. Raises AnatomyError as `score_pairs`."""
        from ..reading.score import score_pairs

        by_token = {rule.concept for rule in self.policy.rules if rule.needs.tokens}
        how: dict[str, Any] = {"tokens": by_token, "cache_dir": self.cache_dir, "codes": self._codes()}
        return score_pairs(self.pairs, self.wanted, self.model, **how)

    def _codes(self) -> "TokenCodes | None":
        """What the audit's harvest has kept of the tokens, where a concept of SAE latents may need it.

        A harvest that is gone or damaged costs a pass, nothing else; one at a URL would be fetched as a whole for it.
        """
        from ..reading.scorers import HiddenScorer

        if self.audit is None or not self.audit.has_concepts or url_of(self.audit.path) is not None:
            return None
        if all(scorer.kind != "features" for scorer in self.wanted.values() if isinstance(scorer, HiddenScorer)):
            return None
        try:
            return self.audit.harvest.codes
        except AnatomyError:
            return None

    def settle(self, scores: "Scores") -> PolicyPlan:
        """The plan, from scores of all `wanted` concepts. Raises PolicyError, AnatomyError as `plan_policy`."""
        scores = residualised(self.policy, scores)
        rules = [_with_defaults(rule, self.scorers, rows=self.pairs.one_sided) for rule in self.rules]
        read: dict[int, Any] = {}
        for stage in STAGES.values():
            own = [rule for rule in rules if rule.verb.stage == stage.name]
            read |= stage.read(own, self, scores) if own else {}
        return plan_policy(self.policy, self.pairs, scores, audit=self.audit, read=read, bound=rules)


def _with_defaults(rule: BoundRule, scorers: "Mapping[str, Scorer]", *, rows: bool) -> BoundRule:
    """The rule with what the policy leaves open: `above` to its scorer, `side` to data that have one."""
    from ..reading.scorers import shown_above

    verb: Any = rule.verb
    if verb.asks_above:
        verb = replace(verb, above=shown_above(scorers[verb.concept]))
    if rows and "side" in verb.keys:
        verb = replace(verb, side="chosen")
    return replace(rule, verb=verb)


def begin_policy(
    policy: ConceptPolicy,
    pairs: "Pairs",
    start_model: Callable[[], Any],
    *,
    audit: "Audit | None" = None,
    cache_dir: Path | None = None,
    trains: bool = False,
    resolved: Resolved | None = None,
) -> Begun:
    """Resolve what a policy names; arguments and errors as `settle_policy`.

    Args:
        trains: the start model is about to be trained, so that concepts that are of one model are checked against it
            even where no score of them is read.
    """
    check_given(policy)
    rules = bind(policy, pairs, audit)
    # An edit was fitted to one model's weights, and with others it would be no more than noise.
    fitted = any(spec.scorer == "reft" for spec in policy.used.values())
    model = (
        start_model() if fitted or reads_hidden(policy) or any(rule.needs.likelihood for rule in policy.rules) else None
    )
    checked = model
    if model is None and trains and any(spec.path or spec.cluster for spec in policy.used.values()):
        checked = comparable(start_model())
    if resolved is None:
        scorers = policy.scorers(audit=audit, model=checked)
    else:
        scorers = resolved.scorers if checked is None else resolved.to(checked)
    return Begun(policy, pairs, audit, cache_dir, rules, scorers, model)


def comparable(model: Any) -> Any:
    """The model, or None where its weights do not tell which model it is (`layer_weights`)."""
    from ..reading.fingerprint import layer_weights

    return None if layer_weights(model, 0) is None else model


def settle_policy(
    policy: ConceptPolicy,
    pairs: "Pairs",
    start_model: Callable[[], Any],
    *,
    audit: "Audit | None" = None,
    cache_dir: Path | None = None,
    resolved: Resolved | None = None,
) -> PolicyPlan:
    """Score the pairs and settle what the policy does to them.

    Args:
        policy: a policy that `check_policy` has passed.
        pairs: the pairs of the raw dataset.
        start_model: gives the frozen start model; called only when a rule asks for scores that it reads: text rules do
            not, nor rules on hidden states without a `fraction`; an edit (reft) is checked against it.
        audit: the audit in use.
        cache_dir: folder for cached scores; None keeps none.
        resolved: what `check_policy` built for the policy; None builds it again.

    Raises:
        PolicyError, AnatomyError: as `ConceptPolicy.scorers`, `score_pairs` and `plan_policy`.
    """
    begun = begin_policy(policy, pairs, start_model, audit=audit, cache_dir=cache_dir, resolved=resolved)
    return begun.settle(begun.score())


def reads_hidden(policy: ConceptPolicy) -> bool:
    """Whether some score that a rule acts on is read from hidden states."""
    return any(policy.concepts[name].scorer not in TEXTUAL for name in _scored(policy))


def _scored(policy: ConceptPolicy) -> list[str]:
    """Concepts whose scores are needed: all used, but for those that rules act on without a score."""
    asked = {rule.concept for rule in policy.rules if rule.needs.scores}
    asked |= {name for rule in policy.rules for name in policy.held(rule)}
    acted_on = {rule.concept for rule in policy.rules}
    return [name for name in policy.used if name in asked or name not in acted_on]
