"""What a policy will touch, before any training: rows kept, offsets, fitted strengths, predicted shift.

Order of action: the rules on rows look at all pairs, each by itself; a pair goes if one of them drops it. Then tokens
leave the loss, each rule by itself, and prompts get their instructions. The rules on the margin see only the pairs that
stay: standard deviations, centring and fitted strengths come from those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from ..audit.predict import predicted_shift
from ..errors import AnatomyError
from .bradley_terry import fit_strengths
from .interventions import FilterPairs, Inoculate, Intervention, MaskTokens, Residualize, ShapeReward
from .located import PolicyError
from .policy import ConceptPolicy
from .tokens import Masked, chosen_masked, tokens_kept

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
            `pairs`: pairs in the gate; `rows`: pairs dropped, or kept pairs that the rule touches;
            `tokens`: response tokens (after truncation) that the rule takes out of the loss, or prompt tokens that the
            policy sees in addition;
            `mean_offset`: mean of o(chosen) − o(rejected) over the kept pairs in the gate;
            `strength` (λ, negative where it amplifies), `ci_low`, `ci_high` (95 %, fitted strengths only), `scale` (the
            standard deviation that one unit of s̃ stands for; None for log-probabilities);
            `gradient_removed`, `gradient_added`: of Σ_i |dL/dmargin_i| = n_pairs / 2 of plain training at the start
            model, the share that this rule takes and gives, after the rules that act before it (a pair whose responses
            lose a third of their tokens loses a third); `gradient_share` is added − removed;
            `note`: what a reader should know, or "".
        predicted: a row per concept of the audit: `concept`, `label`, `predicted`, `predicted_under_policy`; None
            without an audit.
        counts: `rows` (raw), `pairs` (scored), `pairs_kept`; with rules on tokens `chosen_masked`: kept pairs whose
            chosen response has no token left in the loss.
        gaps: concept of a margin rule -> (n_raw_rows,) its score gaps, 0 where a row was not scored; for the log.
        weight: (n_raw_rows,) float64 weight of each pair's loss, 1 where no rule weighs; None without such a rule.
        kept_tokens: raw row -> int8 flags of its chosen and rejected response, 1 for a token (before truncation) that
            stays in the loss; rows of which all tokens stay are absent. None without a rule on tokens.
        prompts: raw row -> prompt tokens (before truncation) that the policy sees before its chosen and its rejected
            response, [] for the pair's own; rows that keep their own are absent. None without a rule on prompts.
        prompt_lengths: (n_raw_rows,) int64 tokens of the own prompts, 0 where a row was not read; None without such a
            rule.
    """

    keep: np.ndarray
    chosen_offset: np.ndarray
    rejected_offset: np.ndarray
    rules: list[dict[str, Any]]
    predicted: pa.Table | None
    counts: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    weight: np.ndarray | None = None
    kept_tokens: dict[int, tuple[np.ndarray, np.ndarray]] | None = None
    prompts: dict[int, tuple[list[int], list[int]]] | None = None
    prompt_lengths: np.ndarray | None = None


def plan_policy(
    policy: ConceptPolicy,
    pairs: "Pairs",
    scores: "Scores",
    *,
    audit: "Audit | None" = None,
    read: Mapping[int, Any] | None = None,
) -> PolicyPlan:
    """Settle what a policy does to these pairs.

    Args:
        policy: the policy; an empty one keeps all rows and adds nothing.
        pairs: the pairs of the raw dataset.
        scores: scores of at least the concepts that a rule acts on.
        audit: the audit of these pairs: for gates on its contexts, and for the predicted shift.
        read: what `settle_policy` read for a rule, by its number: mask_tokens: pair -> bool flags of the tokens of its
            chosen and rejected response (before truncation) that leave the loss; inoculate: pair -> prompt tokens of
            the policy for each response, [] for its own; residualize: (2, n_pairs) A(y) of the responses.

    Raises:
        PolicyError: gates that cannot be applied, two rules that fight over some pair, a concept that scores all
            responses alike, a strength that cannot be fitted.
        AnatomyError: the audit was made from other pairs, a score is not finite, or no pair is left.

    Source: method.md sections 8 and 12.
    """
    if audit is not None:
        audit.check_pairs(pairs)
    for rule in policy.rules:
        for side in (scores.chosen, scores.rejected):
            if not np.isfinite(side[rule.concept]).all():
                raise AnatomyError(f"The scores of {rule.concept!r} hold NaN or infinity; look at its scorer.")
    gates = rule_gates(policy, pairs, audit)

    dropped = {
        i: rule.dropped(scores.gap(rule.concept), pairs.rows, gates[i])
        for i, rule in enumerate(policy.rules)
        if isinstance(rule, FilterPairs)
    }
    kept = ~np.logical_or.reduce([np.zeros(len(pairs), bool), *dropped.values()])
    if not kept.any():
        raise AnatomyError(f"{policy.source}: the filter_pairs rules leave no pair to train on; lower their fraction.")
    read = read or {}
    masked = {i: Masked(pairs, read[i], kept) for i, rule in enumerate(policy.rules) if isinstance(rule, MaskTokens)}
    asked = {
        i: {pair: prompts for pair, prompts in read[i].items() if kept[pair]}
        for i, rule in enumerate(policy.rules)
        if isinstance(rule, Inoculate)
    }
    shaped = _shape(policy, scores, read, gates, kept)

    records = _records(policy, pairs, gates, kept, dropped, masked, asked, shaped)
    offsets = np.zeros((2, len(pairs.raw)))
    for part in shaped.values():
        offsets[:, pairs.rows] += part.offsets
    keep = np.ones(len(pairs.raw), dtype=bool)
    keep[pairs.rows] = kept
    gaps = {policy.rules[i].concept: np.zeros(len(pairs.raw)) for i in shaped}
    for name, gap in gaps.items():
        gap[pairs.rows] = scores.gap(name)
    counts = {"rows": len(pairs.raw), "pairs": len(pairs), "pairs_kept": int(kept.sum())}
    if masked:
        counts["chosen_masked"] = chosen_masked(pairs, list(masked.values()), kept)
    prompt_lengths = None
    if asked:
        prompt_lengths = np.zeros(len(pairs.raw), np.int64)
        prompt_lengths[pairs.rows] = [len(pairs.ids(i, "prompt")) for i in range(len(pairs))]
    return PolicyPlan(
        keep=keep,
        chosen_offset=offsets[0],
        rejected_offset=offsets[1],
        rules=records,
        predicted=None if audit is None else _predict(audit, keep, offsets[0] - offsets[1]),
        counts=counts,
        gaps=gaps,
        kept_tokens=tokens_kept(pairs, list(masked.values())) if masked else None,
        prompts={int(pairs.rows[pair]): p for part in asked.values() for pair, p in part.items()} if asked else None,
        prompt_lengths=prompt_lengths,
    )


def rule_gates(policy: ConceptPolicy, pairs: "Pairs", audit: "Audit | None") -> list[np.ndarray]:
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
    scale: float | None
    offsets: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        return self.offsets[0] - self.offsets[1]


def _shape(
    policy: ConceptPolicy,
    scores: "Scores",
    ratios: Mapping[int, np.ndarray],
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
) -> dict[int, _Shaped]:
    """Strength and offsets of every margin rule."""
    rules = {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, ShapeReward | Residualize)}
    standard: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    scales: dict[int, float] = {}
    problems = []
    for i, rule in rules.items():
        if isinstance(rule, Residualize):
            chosen, rejected = ratios[i]
        else:
            chosen, rejected = scores.chosen[rule.concept], scores.rejected[rule.concept]
        pooled = np.concatenate([chosen[kept], rejected[kept]])
        scales[i] = float(pooled.std())
        if scales[i] <= 1e-12 * max(1.0, float(np.abs(pooled).max())):
            what = "what is asked for changes log pi0(y) by" if i in ratios else f"the concept {rule.concept!r} scores"
            problems.append(
                f"{policy.place(f'rules[{i}]')}: {what} {pooled[0]:g} on every response; there is nothing to shape. "
                "Correct its scorer or drop the rule."
            )
        elif not (gates[i] & kept).any():
            problems.append(f"{policy.place(f'rules[{i}]')}: the filter_pairs rules leave no pair in this gate.")
        elif isinstance(rule, Residualize):  # log-probabilities have a unit of their own
            standard[i] = (chosen, rejected)
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
    return {
        i: _Shaped(
            strengths[i],
            intervals.get(i),
            None if isinstance(rule, Residualize) else scales[i],
            offsets(i, strengths[i]),
        )
        for i, rule in rules.items()
    }


def _records(
    policy: ConceptPolicy,
    pairs: "Pairs",
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
    dropped: dict[int, np.ndarray],
    masked: dict[int, Masked],
    asked: dict[int, dict[int, tuple[list[int], list[int]]]],
    shaped: dict[int, _Shaped],
) -> list[dict[str, Any]]:
    """A dict per rule, as `PolicyPlan.rules` describes it."""
    records: dict[int, dict[str, Any]] = {}
    alive, margin = np.ones(len(kept)), np.zeros(len(kept))  # alive: share of a pair's tokens in the loss
    bounds = pairs.response_bounds
    n_tokens, gone = np.diff(bounds[::2]), np.zeros(int(bounds[-1]), bool)
    total = len(kept) / 2
    for i in [*dropped, *masked, *asked, *shaped]:
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
            **dict.fromkeys(("tokens", "mean_offset", "strength", "ci_low", "ci_high", "scale")),
        }
        if i in dropped:
            alive = alive * ~dropped[i]
            record["rows"] = int(dropped[i].sum())
        elif i in masked:
            gone |= masked[i].tokens
            left = n_tokens - np.diff(np.concatenate([[0], np.cumsum(gone)])[bounds[::2]])
            alive = np.where(kept, left / np.maximum(n_tokens, 1), 0.0)
            record["rows"], record["tokens"] = len(masked[i].flags), int(masked[i].tokens.sum())
        elif i in asked:
            more = [len(ids) - len(pairs.ids(pair, "prompt")) for pair, p in asked[i].items() for ids in p if ids]
            record["rows"], record["tokens"] = len(asked[i]), sum(more)
        else:
            part, acts = shaped[i], gates[i] & kept
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
        record["note"] = _note(rule, record)
        records[i] = record
    return [records[i] for i in range(len(policy.rules))]


def _note(rule: Intervention, record: dict[str, Any]) -> str:
    if record["rows"] == 0:
        if isinstance(rule, FilterPairs) and rule.fraction * record["pairs"] < 1:
            return "touches nothing: the fraction is less than one pair"
        if isinstance(rule, FilterPairs):
            side = "chosen" if rule.sign == "explain_away" else "rejected"
            return f"touches nothing: the {side} response scores higher in no pair"
        if isinstance(rule, MaskTokens):
            return "touches nothing: no token shows the concept"
        if isinstance(rule, Inoculate):
            return "touches nothing: no chosen response shows the concept"
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
    "tokens",
    "strength (95 %)",
    "mean offset",
    "gradient",
]


def _rule_row(n: int, rule: dict[str, Any]) -> list[str]:
    strength = "" if rule["strength"] is None else f"{rule['strength']:.3g}"
    if rule["ci_low"] is not None:
        strength += f" ({rule['ci_low']:.3g} to {rule['ci_high']:.3g})"
    return [
        str(n),
        rule["sign"].replace("_", " "),
        rule["concept"],
        rule["verb"],
        _printable(rule["where"] or "")[:40],
        str(rule["pairs"]),
        str(rule["rows"]),
        "" if rule["tokens"] is None else str(rule["tokens"]),
        strength,
        "" if rule["mean_offset"] is None else f"{rule['mean_offset']:+.3f}",
        f"-{rule['gradient_removed']:.1%} +{rule['gradient_added']:.1%}",
    ]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _printable(text: str) -> str:
    """Without control characters: labels come from the data."""
    return "".join(character for character in text if character.isprintable())
