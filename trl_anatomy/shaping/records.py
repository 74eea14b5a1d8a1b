"""What a plan says of each rule: the rows, tokens and share of the gradient that it touches, and a note."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .bind import BoundRule
from .stages import STAGES, Effect, Tally

if TYPE_CHECKING:
    from ..reading.spans import Pairs

# Numbers that some verbs have and others do not
_NUMBERS = (
    "tokens",
    "token_share",
    "raw_differs",
    "mean_offset",
    "strength",
    "ci_low",
    "ci_high",
    "scale",
    "effective_pairs",
    "gradient_touched",
)


def rule_records(
    bound: Sequence[BoundRule],
    effects: Mapping[int, Effect],
    pairs: "Pairs",
    kept: np.ndarray,
    raw_differs: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A dict per rule, as `PolicyPlan.rules` describes it.

    Args:
        bound: the rules, in the order of the policy.
        effects: rule -> effect, in the order in which they act.
        pairs, kept: the pairs, and (n_pairs,) bool those that every rule on rows leaves.
        raw_differs: as in `Scores`.
    """
    records: dict[int, dict[str, Any]] = {}
    tally = Tally(pairs, kept)
    for i, effect in effects.items():
        rule, before = bound[i], tally.pull
        verb, stage = rule.verb, STAGES[rule.verb.stage]
        record: dict[str, Any] = {
            "verb": verb.verb,
            "concept": verb.concept,
            "sign": verb.sign,
            "stage": verb.stage,
            "where": None if verb.where is None else str(verb.where),
            "pairs": int(rule.gate.sum()),
            "rows": 0,
            **dict.fromkeys(_NUMBERS),
        }
        record["raw_differs"] = raw_differs.get(verb.concept or "")
        record |= stage.record(rule, effect, tally)
        change = tally.pull - before
        record["gradient_removed"] = float(np.abs(change[change < 0]).sum() / tally.total)
        record["gradient_added"] = float(change[change > 0].sum() / tally.total)
        record["gradient_share"] = record["gradient_added"] - record["gradient_removed"]
        reached = rule.gate if stage.sees_all else rule.gate & kept
        whole = record["rows"] == reached.sum() and stage.chooses(rule)
        record["note"] = "; ".join(
            filter(None, (stage.note(rule, effect, record, whole, tally.one), _text_note(record, tally.one)))
        )
        records[i] = record
    return [records[i] for i in range(len(bound))]


def _text_note(record: dict[str, Any], one: str) -> str:
    if not record["raw_differs"]:
        return ""
    return (
        f"the dataset's text and the text that is trained on differ in the concept in {record['raw_differs']} {one}s, "
        "and the second counts"
    )
