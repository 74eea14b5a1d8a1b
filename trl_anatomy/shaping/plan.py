"""What a policy will touch, before any training: rows kept, offsets, fitted strengths, predicted shift.

Order of action: the rules on rows look at all pairs, each by itself; a pair goes if one of them drops it. The rules on
the margin then see only the pairs that stay: standard deviations, centring and fitted strengths come from those.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from ..audit.predict import predicted_shift
from ..errors import AnatomyError
from .bradley_terry import fit_strengths
from .hidden import HiddenEdit, hidden_strengths
from .interventions import FilterPairs, Intervention, ShapeReward
from .located import PolicyError
from .policy import ConceptPolicy

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.score import Scores
    from ..reading.spans import Pairs


@dataclass(frozen=True)
class PolicyPlan:
    """What a policy does to one dataset.

    Attributes:
        keep: (n_raw_rows,) bool: rows that stay. Rows that were not scored stay, for TRL to treat as it does.
        chosen_offset, rejected_offset: (n_raw_rows,) float64: o(y) = Σ_rules λ · s̃(y), added to β · log-ratio of the
            response; 0 where no rule acts. Centred: each rule's offsets have mean 0 over the responses it acts on.
        rules: a dict per rule, in the order of the policy; numbers that a verb does not have are None:
            `verb`, `concept`, `sign`, `stage`, `where`;
            `pairs`: pairs in the gate; `rows`: pairs dropped, or kept pairs whose margin moves;
            `mean_offset`: mean of o(chosen) − o(rejected) over the kept pairs in the gate;
            `strength` (λ, negative where it amplifies), `ci_low`, `ci_high` (95 %, fitted strengths only), `scale` (the
            standard deviation that one unit of s̃ stands for);
            `gradient_removed`, `gradient_added`: of Σ_i |dL/dmargin_i| = n_pairs / 2 of plain training at the start
            model, the share that this rule takes and gives, after the rules that act before it; `gradient_share` is
            added − removed;
            `gradient_touched`: rules on hidden states: share of that sum that comes from the pairs they touch;
            `note`: what a reader should know, or "".
        predicted: a row per concept of the audit: `concept`, `label`, `predicted`, `predicted_under_policy`; None
            without an audit.
        counts: `rows` (raw), `pairs` (scored), `pairs_kept`.
        gaps: concept of a margin rule -> (n_raw_rows,) its score gaps, 0 where a row was not scored; for the log.
        weight: (n_raw_rows,) float64 weight of each pair's loss, 1 where no rule weighs; None without such a rule.
        steering: (n_raw_rows, 2 * n_hidden_rules) float64: strengths of each rule on hidden states on the chosen, then
            on the rejected side; None without such a rule.
        turns: (n_raw_rows,) int64 tokens of the prompt before its last user turn; None where no rule asks.
        hidden: the edits of the rules on hidden states, in the order of the policy.
    """

    keep: np.ndarray
    chosen_offset: np.ndarray
    rejected_offset: np.ndarray
    rules: list[dict[str, Any]]
    predicted: pa.Table | None
    counts: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    weight: np.ndarray | None = None
    steering: np.ndarray | None = None
    turns: np.ndarray | None = None
    hidden: tuple[HiddenEdit, ...] = ()


def plan_policy(policy: ConceptPolicy, pairs: "Pairs", scores: "Scores", *, audit: "Audit | None" = None) -> PolicyPlan:
    """Settle what a policy does to these pairs.

    Args:
        policy: the policy; an empty one keeps all rows and adds nothing.
        pairs: the pairs of the raw dataset.
        scores: scores of the concepts that a rule acts on; those that rules on hidden states edit without a fraction
            may be left out.
        audit: the audit of these pairs: for gates on its contexts, and for the predicted shift.

    Raises:
        PolicyError: gates that cannot be applied, two rules that fight over some pair, a concept that scores all
            responses alike, a strength that cannot be fitted.
        AnatomyError: the audit was made from other pairs, a score is not finite, or no pair is left.

    Source: method.md sections 8 and 12.
    """
    if audit is not None:
        audit.check_pairs(pairs)
    for rule in policy.rules:
        for side in (scores.chosen, scores.rejected) if rule.concept in scores.names else ():
            if not np.isfinite(side[rule.concept]).all():
                raise AnatomyError(f"The scores of {rule.concept!r} hold NaN or infinity; look at its scorer.")
    gates = _gates(policy, pairs, audit)

    dropped = {
        i: rule.dropped(scores.gap(rule.concept), pairs.rows, gates[i])
        for i, rule in enumerate(policy.rules)
        if isinstance(rule, FilterPairs)
    }
    kept = ~np.logical_or.reduce([np.zeros(len(pairs), bool), *dropped.values()])
    if not kept.any():
        raise AnatomyError(f"{policy.source}: the filter_pairs rules leave no pair to train on; lower their fraction.")
    shaped = _shape(policy, scores, gates, kept)
    edited = hidden_strengths(policy, scores, pairs.rows, gates, kept)
    steering = np.zeros((len(pairs.raw), 2, len(edited)))
    for column, strengths in enumerate(edited.values()):
        steering[pairs.rows, :, column] = strengths

    records = _records(policy, gates, kept, dropped, shaped, edited)
    offsets = np.zeros((2, len(pairs.raw)))
    for part in shaped.values():
        offsets[:, pairs.rows] += part.offsets
    keep = np.ones(len(pairs.raw), dtype=bool)
    keep[pairs.rows] = kept
    gaps = {policy.rules[i].concept: np.zeros(len(pairs.raw)) for i in shaped}
    for name, gap in gaps.items():
        gap[pairs.rows] = scores.gap(name)
    return PolicyPlan(
        keep=keep,
        chosen_offset=offsets[0],
        rejected_offset=offsets[1],
        rules=records,
        predicted=None if audit is None else _predict(audit, keep, offsets[0] - offsets[1]),
        counts={"rows": len(pairs.raw), "pairs": len(pairs), "pairs_kept": int(kept.sum())},
        gaps=gaps,
        steering=steering.reshape(len(steering), -1) if edited else None,
    )


def _gates(policy: ConceptPolicy, pairs: "Pairs", audit: "Audit | None") -> list[np.ndarray]:
    """(n_pairs,) bool per rule: where it may act."""
    gates, problems = [], []
    for i, rule in enumerate(policy.rules):
        try:
            gates.append(np.ones(len(pairs), bool) if rule.where is None else rule.where.mask(pairs, audit))
        except AnatomyError as error:
            gates.append(np.zeros(len(pairs), bool))
            problems.append(f"{policy.place(f'rules[{i}]')}: {error}")
    for i, rule in enumerate(policy.rules):
        for j, other in enumerate(policy.rules[:i]):
            n_shared = int((gates[i] & gates[j]).sum())
            if rule.concept == other.concept and rule.sign != other.sign and n_shared:
                problems.append(
                    f"{policy.place(f'rules[{i}]')}: found {rule.sign}: {rule.concept}, but rules[{j}] says "
                    f"{other.sign} for {n_shared} of the same pairs, allowed: gates (where) that share no pair."
                )
    if problems:
        raise PolicyError(problems)
    return gates


@dataclass(frozen=True)
class _Shaped:
    """One margin rule at work: `offsets` (2, n_pairs) for chosen and rejected."""

    strength: float
    interval: tuple[float, float] | None
    scale: float
    offsets: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        return self.offsets[0] - self.offsets[1]


def _shape(
    policy: ConceptPolicy, scores: "Scores", gates: Sequence[np.ndarray], kept: np.ndarray
) -> dict[int, _Shaped]:
    """Strength and offsets of every margin rule."""
    rules = {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, ShapeReward)}
    standard: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    scales: dict[int, float] = {}
    problems = []
    for i, rule in rules.items():
        chosen, rejected = scores.chosen[rule.concept], scores.rejected[rule.concept]
        pooled = np.concatenate([chosen[kept], rejected[kept]])
        scales[i] = float(pooled.std())
        if scales[i] <= 1e-12 * max(1.0, float(np.abs(pooled).max())):
            problems.append(
                f"{policy.place(f'rules[{i}]')}: the concept {rule.concept!r} scores {pooled[0]:g} on every response; "
                "there is nothing to shape. Correct its scorer or drop the rule."
            )
        elif not (gates[i] & kept).any():
            problems.append(f"{policy.place(f'rules[{i}]')}: the filter_pairs rules leave no pair in this gate.")
        else:
            standard[i] = ((chosen - pooled.mean()) / scales[i], (rejected - pooled.mean()) / scales[i])
    if problems:
        raise PolicyError(problems)

    def offsets(i: int, strength: float) -> np.ndarray:
        return np.stack(ShapeReward.offsets(strength, *standard[i], gates[i] & kept))

    strengths = {i: rule.fixed for i, rule in rules.items() if rule.fixed is not None}
    intervals: dict[int, tuple[float, float]] = {}
    fitted = [i for i in rules if i not in strengths]
    if fitted:
        gaps = np.stack([np.where(gates[i], standard[i][0] - standard[i][1], 0.0)[kept] for i in fitted], axis=1)
        # What rules with a given strength already say is part of the margin that the fit starts from.
        given = sum((offsets(i, value) for i, value in strengths.items()), np.zeros((2, len(kept))))
        try:
            fit = fit_strengths(gaps, [f"{rules[i].concept!r}" for i in fitted], (given[0] - given[1])[kept])
        except AnatomyError as error:
            raise PolicyError([f"{policy.place(f'rules[{fitted[0]}]')}: {error}"]) from None
        for column, i in enumerate(fitted):
            strengths[i] = float(fit.strength[column])
            intervals[i] = (float(fit.ci_low[column]), float(fit.ci_high[column]))
    return {i: _Shaped(strengths[i], intervals.get(i), scales[i], offsets(i, strengths[i])) for i in rules}


def _records(
    policy: ConceptPolicy,
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
    dropped: dict[int, np.ndarray],
    shaped: dict[int, _Shaped],
    edited: dict[int, np.ndarray],
) -> list[dict[str, Any]]:
    """A dict per rule, as `PolicyPlan.rules` describes it."""
    records: dict[int, dict[str, Any]] = {}
    alive, margin = np.ones(len(kept), bool), np.zeros(len(kept))
    total = len(kept) / 2
    for i in [*dropped, *shaped, *edited]:
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
            **dict.fromkeys(("mean_offset", "strength", "ci_low", "ci_high", "scale", "gradient_touched")),
        }
        if i in dropped:
            alive = alive & ~dropped[i]
            record["rows"] = int(dropped[i].sum())
        elif i in edited:
            record["rows"] = int(edited[i].any(axis=1).sum())
            strength = getattr(rule, "strength", None)
            record["strength"] = -strength if strength and rule.sign == "amplify" else strength
            touched = before * edited[i].any(axis=1)
            record["gradient_touched"] = float(touched.sum() / total)
        else:
            part, acts = shaped[i], gates[i] & kept
            margin = margin + part.margin
            record["rows"] = int((part.margin != 0).sum())
            record["mean_offset"] = float(part.margin[acts].mean())
            record["strength"], record["scale"] = part.strength, part.scale
            if part.interval is not None:
                record["ci_low"], record["ci_high"] = part.interval
        change = alive * expit(-margin) - before
        record["gradient_removed"] = float(-change[change < 0].sum() / total)
        record["gradient_added"] = float(change[change > 0].sum() / total)
        record["gradient_share"] = record["gradient_added"] - record["gradient_removed"]
        record["note"] = _note(rule, record)
        records[i] = record
    return [records[i] for i in range(len(policy.rules))]


def _note(rule: Intervention, record: dict[str, Any]) -> str:
    if record["gradient_touched"] is not None:
        return f"edits the step of pairs that carry {record['gradient_touched']:.0%} of the gradient"
    if record["rows"] == 0:
        if isinstance(rule, FilterPairs) and rule.fraction * record["pairs"] < 1:
            return "touches nothing: the fraction is less than one pair"
        if isinstance(rule, FilterPairs):
            side = "chosen" if rule.sign == "explain_away" else "rejected"
            return f"touches nothing: the {side} response scores higher in no pair"
        return "touches nothing: the two responses score alike in every pair"
    if record["ci_low"] is None:
        return ""
    if record["ci_low"] <= 0 <= record["ci_high"]:
        return "the interval holds 0: these pairs say next to nothing about the concept"
    if record["strength"] < 0:
        return "the pairs punish this concept; the offset cancels that"
    return ""


def _predict(audit: "Audit", keep: np.ndarray, margin: np.ndarray) -> pa.Table:
    """Mean disparity of each concept: over all pairs, and over the kept ones weighted by their pull.

    A pair whose margin the policy shifts by m pulls at the start model with σ(−m) instead of 1/2: weight 2σ(−m).
    """
    u, names = audit.disparity()
    rows = audit.pairs["row"].to_numpy()
    kept = keep[rows]
    labels = dict(zip(audit.concepts["concept"].to_pylist(), audit.concepts["label"].to_pylist(), strict=True))
    return pa.table(
        {
            "concept": pa.array(names, pa.string()),
            "label": pa.array([labels.get(name) or "" for name in names], pa.string()),
            "predicted": predicted_shift(u),
            "predicted_under_policy": predicted_shift(u[kept], 2 * expit(-margin[rows][kept])),
        }
    )


def plan_json(plan: PolicyPlan) -> dict[str, Any]:
    """The plan as JSON holds it: `counts`, `rules`, and `predicted` (a dict per concept, or None)."""
    predicted = None
    if plan.predicted is not None:
        predicted = [
            {key: None if value != value else value for key, value in row.items()}  # NaN, which JSON does not know
            for row in plan.predicted.to_pylist()
        ]
    return {"counts": dict(plan.counts), "rules": [dict(rule) for rule in plan.rules], "predicted": predicted}


def plan_report(plan: PolicyPlan, *, n_concepts: int = 15) -> str:
    """The plan as text for a terminal: a row per rule, then the concepts whose predicted shift changes most."""
    counts = plan.counts or {"rows": len(plan.keep), "pairs": len(plan.keep), "pairs_kept": int(plan.keep.sum())}
    lines = [f"{counts['rows']} rows, {counts['pairs']} pairs scored, {counts['pairs_kept']} pairs trained on."]
    if not plan.rules:
        lines.append("The policy has no rules: training is TRL's own.")
    else:
        lines += ["", *_columns(_RULE_HEADER, [_rule_row(n, rule) for n, rule in enumerate(plan.rules, 1)])]
        lines += [f"rule {n}: {rule['note']}." for n, rule in enumerate(plan.rules, 1) if rule["note"]]
    if plan.predicted is not None and plan.predicted.num_rows:
        found = plan.predicted.to_pylist()
        found.sort(key=lambda row: -abs(row["predicted_under_policy"] - row["predicted"]))
        rows = [
            [
                row["concept"],
                f"{row['predicted']:+.4f}",
                f"{row['predicted_under_policy']:+.4f}",
                f"{row['predicted_under_policy'] - row['predicted']:+.4f}",
                _printable(row["label"])[:50],
            ]
            for row in found[:n_concepts]
        ]
        lines += ["", "Predicted shift, largest change first:"]
        lines += _columns(["concept", "plain", "with policy", "change", "label"], rows)
        if len(found) > n_concepts:
            lines.append(f"... and {len(found) - n_concepts} more concepts.")
    return "\n".join(lines) + "\n"


_RULE_HEADER = [
    "rule",
    "does",
    "concept",
    "with",
    "where",
    "pairs",
    "touched",
    "strength (95 %)",
    "mean offset",
    "gradient",
]


def _rule_row(n: int, rule: dict[str, Any]) -> list[str]:
    strength = "" if rule["strength"] is None else f"{rule['strength']:.3g}"
    if rule["ci_low"] is not None:
        strength += f" ({rule['ci_low']:.3g} to {rule['ci_high']:.3g})"
    gradient = f"-{rule['gradient_removed']:.1%} +{rule['gradient_added']:.1%}"
    return [
        str(n),
        rule["sign"].replace("_", " "),
        rule["concept"],
        rule["verb"],
        _printable(rule["where"] or "")[:40],
        str(rule["pairs"]),
        str(rule["rows"]),
        strength,
        "" if rule["mean_offset"] is None else f"{rule['mean_offset']:+.3f}",
        gradient if rule["gradient_touched"] is None else "",
    ]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _printable(text: str) -> str:
    """Without control characters: labels come from the data."""
    return "".join(character for character in text if character.isprintable())
