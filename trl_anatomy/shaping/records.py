"""What a plan says of each rule: the rows, tokens and share of the gradient that it touches, and a note."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from .interventions import FilterPairs, Inoculate, Intervention, MaskTokens, ReweightPairs, ShapeReward
from .margins import Shaped
from .policy import ConceptPolicy
from .tokens import Masked
from .weights import Weighed

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


@dataclass(frozen=True)
class Acting:
    """What each rule does, by its number: pairs dropped (n_pairs,) bool; tokens; prompts; weights; offsets; edits."""

    dropped: dict[int, np.ndarray]
    masked: dict[int, Masked]
    asked: dict[int, dict[int, tuple[list[int], list[int]]]]
    weighed: dict[int, Weighed]
    shaped: dict[int, Shaped]
    edited: dict[int, np.ndarray]


def rule_records(  # noqa: PLR0915
    policy: ConceptPolicy,
    pairs: "Pairs",
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
    acting: Acting,
    raw_differs: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A dict per rule, as `PolicyPlan.rules` describes it; `raw_differs` as in `Scores`."""
    records: dict[int, dict[str, Any]] = {}
    alive, margin = np.ones(len(kept)), np.zeros(len(kept))  # share of each pair that is in the loss; its offset
    bounds = pairs.response_bounds
    n_tokens, gone = np.diff(bounds[::2]), np.zeros(int(bounds[-1]), bool)
    total = len(kept) / 2
    one, share = "pair", np.ones(len(kept))
    if pairs.one_sided:  # a row pulls by its tokens, of which the loss is a mean
        one, share = "row", n_tokens / max(n_tokens.mean(), 1e-300)
        alive = alive * share
    a = acting
    for i in [*a.dropped, *a.masked, *a.asked, *a.weighed, *a.shaped, *a.edited]:
        rule = policy.rules[i]
        before = alive * expit(-margin)
        record: dict[str, Any] = {
            "verb": rule.verb,
            "concept": rule.concept,
            "sign": rule.sign,
            "stage": rule.stage,
            "where": None if rule.where is None else str(rule.where),
            "pairs": int(gates[i].sum()),
            "rows": 0,
            **dict.fromkeys(_NUMBERS),
        }
        record["raw_differs"] = raw_differs.get(rule.concept or "")
        if i in a.dropped:
            alive = alive * ~a.dropped[i]
            record["rows"] = int(a.dropped[i].sum())
        elif i in a.masked:
            gone |= a.masked[i].tokens
            left = n_tokens - np.diff(np.concatenate([[0], np.cumsum(gone)])[bounds[::2]])
            alive = np.where(kept, left / np.maximum(n_tokens, 1), 0.0) * share
            record["rows"], record["tokens"] = len(a.masked[i].flags), int(a.masked[i].tokens.sum())
            record["token_share"] = record["tokens"] / max(1, int(n_tokens[kept & gates[i]].sum()))
        elif i in a.asked:
            more = [len(ids) - len(pairs.ids(pair, "prompt")) for pair, p in a.asked[i].items() for ids in p if ids]
            record["rows"], record["tokens"] = len(a.asked[i]), sum(more)
        elif isinstance(rule, ReweightPairs):
            weighed = a.weighed[i]
            alive = alive * weighed.factor
            record["rows"] = int((weighed.factor[kept] != 1).sum())
            record["effective_pairs"], record["strength"] = weighed.effective, rule.signed
        elif i in a.edited:
            touched = a.edited[i].any(axis=1)
            record["rows"] = int(touched.sum())
            strength = getattr(rule, "strength", None)
            record["strength"] = -strength if strength and rule.sign == "amplify" else strength
            record["gradient_touched"] = float((before * touched).sum() / total)
        else:
            part, acts = a.shaped[i], gates[i] & kept
            margin = margin + part.margin
            record["rows"] = int((part.margin != 0).sum())
            record["mean_offset"] = float(part.margin[acts].mean())
            record["strength"], record["scale"] = part.strength, part.scale
            if part.interval is not None:
                record["ci_low"], record["ci_high"] = part.interval
        change = alive * expit(-margin) - before
        record["gradient_removed"] = float(np.abs(change[change < 0]).sum() / total)
        record["gradient_added"] = float(change[change > 0].sum() / total)
        record["gradient_share"] = record["gradient_added"] - record["gradient_removed"]
        reached = gates[i] if i in a.dropped else gates[i] & kept
        whole = record["rows"] == reached.sum() and _chooses(rule, policy)
        note = _weight_note(a.weighed[i], record, one) if i in a.weighed else _note(rule, record, whole, one)
        record["note"] = "; ".join(filter(None, (note, _text_note(record, one))))
        records[i] = record
    return [records[i] for i in range(len(policy.rules))]


def _chooses(rule: Intervention, policy: ConceptPolicy) -> bool:
    """Whether it is odd that a rule touches every pair it may."""
    if isinstance(rule, ShapeReward):  # scores that are no hits differ in nearly every pair
        return rule.constant is None and policy.concepts[rule.concept].scorer == "text"
    return isinstance(rule, MaskTokens | Inoculate) or (isinstance(rule, FilterPairs) and rule.fraction != "all")


def _weight_note(weighed: Weighed, record: dict[str, Any], one: str) -> str:
    parts = [f"the {one}s in its gate count like {record['effective_pairs']:.1f} of equal weight"]
    if weighed.held:
        parts.append(f"held as they are: {', '.join(weighed.held)}")
    if weighed.leader is not None:
        parts.append(f"solved together with rule {weighed.leader + 1}, where its rows and gradient are")
    elif record["rows"] == 0:
        parts = ["touches nothing: the weights are 1 already"]
    return "; ".join(parts)


def _text_note(record: dict[str, Any], one: str) -> str:
    if not record["raw_differs"]:
        return ""
    return (
        f"the dataset's text and the text that is trained on differ in the concept in {record['raw_differs']} {one}s, "
        "and the second counts"
    )


def _note(rule: Intervention, record: dict[str, Any], whole: bool, one: str) -> str:
    """What a reader should know; `whole`: a rule that chooses pairs touches all that it may; `one`: pair or row."""
    if record["gradient_touched"] is not None:
        return f"edits the step of {one}s that carry {record['gradient_touched']:.0%} of the gradient"
    if record["rows"] == 0:
        if isinstance(rule, FilterPairs):
            return f"touches nothing: {rule.why_none(record['pairs'])}"
        if isinstance(rule, MaskTokens):
            return "touches nothing: no token shows the concept"
        if isinstance(rule, Inoculate):
            return f"touches nothing: no {'chosen ' if one == 'pair' else ''}response shows the concept"
        return "touches nothing: the two responses score alike in every pair"
    parts = []
    if record["ci_low"] is not None and record["ci_low"] <= 0 <= record["ci_high"]:
        parts.append("the interval holds 0: these pairs say next to nothing about the concept")
    elif record["ci_low"] is not None and record["strength"] < 0:
        parts.append("the pairs punish this concept; the offset cancels that")
    if whole and isinstance(rule, FilterPairs):
        parts.append(f"drops every {one} in its gate")
    elif whole:
        response = "chosen response" if one == "pair" else "response"
        every = f"{response} shows the concept" if isinstance(rule, Inoculate) else f"{one} is touched"
        parts.append(f"every {every}: check its pattern or threshold")
    return "; ".join(parts)
