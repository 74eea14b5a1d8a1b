"""Rules bound to the pairs: what each does, the concept it acts on, and where its gate is open. Made once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AnatomyError
from .interventions import VERBS, Intervention
from .located import PolicyError

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.spans import Pairs
    from .concepts import ConceptSpec
    from .policy import ConceptPolicy


@dataclass(frozen=True, eq=False)
class BoundRule:
    """A rule of a policy that has met the pairs.

    Attributes:
        verb: the rule as the policy says it.
        concept: the concept it acts on; None for weights that a column gives.
        gate: (n_pairs,) bool: the pairs on which it may act.
        place: where it stands, as errors begin: ``policy.yaml:12: rules[3]``.
        number: its place among the rules of the policy, from 0.
        held: the concepts that it keeps as they are.
        at: a key of the rule -> where that stands.
    """

    verb: Intervention
    concept: "ConceptSpec | None"
    gate: np.ndarray
    place: str
    number: int
    held: tuple[str, ...]
    at: Callable[[str], str] = field(repr=False)


# Verb of pairs -> its sibling for rows
_SIBLINGS = {"filter_pairs": "filter_rows", "reweight_pairs": "reweight_rows"}


def wrong_kinds(policy: "ConceptPolicy", *, rows: bool) -> list[str]:
    """What is wrong with the verbs of a policy for pairs, or for rows, which have one response.

    Verbs say what they read (`reads`) where it is one of the two.
    """
    problems, kind = [], "rows" if rows else "pairs"
    siblings = _SIBLINGS if rows else {rows: pairs for pairs, rows in _SIBLINGS.items()}
    for i, rule in enumerate(policy.rules):
        path, verb = f"rules[{i}]", rule.verb
        if rule.reads not in ("", kind):
            found = "compares two responses, and SFT data have one" if rows else "reads rows of SFT data, not pairs"
            allowed = siblings.get(verb) or ", ".join(name for name, cls in VERBS.items() if cls.reads in ("", "rows"))
            problems.append(f"{policy.place(f'{path}.with')}: found {verb}, which {found}, allowed: {allowed}.")
        elif rows and getattr(rule, "side", None) not in (None, "both", "chosen"):
            problems.append(f"{policy.place(f'{path}.side')}: found rejected, allowed: none; SFT data have one side.")
    return problems


def bind(policy: "ConceptPolicy", pairs: "Pairs", audit: "Audit | None" = None) -> tuple[BoundRule, ...]:
    """Bind the rules of a policy to pairs, in the order of the policy.

    Args:
        policy: the policy.
        pairs: the pairs of the raw dataset.
        audit: the audit in use, for gates on its contexts.

    Raises:
        PolicyError: all gates that cannot be applied, and rules that pull one concept both ways for some pair.
    """
    bound: list[BoundRule] = []
    problems = wrong_kinds(policy, rows=pairs.one_sided)
    for i, rule in enumerate(policy.rules):
        place, gate = policy.place(f"rules[{i}]"), np.ones(len(pairs), bool)
        try:
            gate = gate if rule.where is None else rule.where.mask(pairs, audit)
        except AnatomyError as error:
            gate = ~gate
            problems.append(f"{place}: {error}")
        concept = policy.concepts.get(rule.concept or "")
        bound.append(BoundRule(rule, concept, gate, place, i, policy.held(rule), policy.rule_place(i)))
    for i, one in enumerate(bound):
        for j, other in enumerate(bound[:i]):
            n_shared = int((one.gate & other.gate).sum())
            alike = one.concept is not None and one.concept is other.concept
            if alike and one.verb.sign != other.verb.sign and n_shared:
                problems.append(
                    f"{one.place}: found {one.verb.sign}: {one.verb.concept}, but rules[{j}] says {other.verb.sign} "
                    f"for {n_shared} of the same pairs, allowed: gates (where) that share no pair."
                )
    if problems:
        raise PolicyError(problems)
    return tuple(bound)
