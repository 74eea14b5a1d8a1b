"""What a policy will touch, before any training: rows kept, offsets, fitted strengths, predicted shift.

Order of action: the rules on rows look at all pairs, each by itself; a pair goes if one of them drops it. All others
see only the pairs that stay. Tokens leave the loss, each rule by itself, and prompts get their instructions; weights
come next; then the rules on the margin, whose fitted strengths take the weights into account.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from ..audit.predict import predicted_shift
from ..errors import AnatomyError
from ..reading.spans import EMPTY
from .bind import BoundRule, bind
from .effects import own_concepts
from .gaps import gap_text
from .hidden import HiddenEdit
from .policy import ConceptPolicy
from .records import rule_records
from .stages import STAGES, Effect, Met
from .stages.tokens import chosen_masked, tokens_kept

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
            `token_share`: of the response tokens of the kept pairs in the gate, the share that the rule takes out;
            `raw_differs`: of a text rule, pairs in which the dataset's text and the text that is trained on differ in
            the concept;
            `effective_pairs`: (Σw)² / Σw² over the kept pairs in the gate of a rule on the weights;
            `mean_offset`: mean of o(chosen) − o(rejected) over the kept pairs in the gate;
            `strength` (λ or the constant, negative where it amplifies), `ci_low`, `ci_high` (95 %, fitted strengths
            only), `scale` (the standard deviation that one unit of s̃ stands for; None for log-probabilities);
            `gradient_removed`, `gradient_added`: of Σ_i |dL/dmargin_i| = n_pairs / 2 of plain training at the start
            model, the share that this rule takes and gives, after the rules that act before it (a pair whose responses
            lose a third of their tokens loses a third; of `reweight_pairs` rules with one gate, the first stands for
            all); `gradient_share` is added − removed;
            `gradient_touched`: rules on hidden states: share of that sum that comes from the pairs they touch;
            `note`: what a reader should know, or "";
            `warning`: where the rule moves its own concept away from the start model, or overshoots: how far, and what
            would not; else "".
        concepts: a dict per concept that a rule names, in the order of the policy, each followed by one per gate of its
            rules:
            `concept`, `scorer`; `where`: the gate, None for all pairs; `pairs`: in it;
            `unit`: "share" (of responses, for text rules) or "sd" (standard deviations of the score), None without
            scores; `chosen`, `rejected`: share of responses with a hit, else None;
            `predicted`, `predicted_under_policy`: mean score gap, chosen minus rejected, of plain training and of the
            kept pairs by their pull; None where the pairs do not tell it;
            `effect`: on that gap, in a few words.
        predicted: a row per concept of the audit: `concept`, `label`, `predicted`, `predicted_under_policy`; None
            without an audit that has concepts.
        counts: `rows` (raw), `pairs` (scored), `pairs_kept`; `untouched`: rows that train though no rule could read
            them; `blank`: pairs with a blank response, where there are any; with rules on tokens `chosen_masked`: kept
            pairs whose chosen response has no token left in the loss.
        gaps: concept of a rule -> (n_raw_rows,) its score gaps, 0 where a row was not scored; for the log. Concepts
            that no rule needs scores of (rules on hidden states without a fraction) are absent.
        weight: (n_raw_rows,) float64 weight of each pair's loss, 1 where no rule weighs; None without such a rule.
        kept_tokens: raw row -> int8 flags of its chosen and rejected response, 1 for a token (before truncation) that
            stays in the loss; rows of which all tokens stay are absent. None without a rule on tokens.
        prompts: raw row -> prompt tokens (before truncation) that the policy sees before its chosen and its rejected
            response, [] for the pair's own; rows that keep their own are absent. None without a rule on prompts.
        prompt_lengths: (n_raw_rows,) int64 tokens of the own prompts, 0 where a row was not read; None without such a
            rule, and without one on the ends of responses.
        steering: (n_raw_rows, 2 * n_hidden_rules) float64: strengths of each rule on hidden states on the chosen, then
            on the rejected side; None without such a rule.
        turns: (n_raw_rows,) int64 tokens of the prompt before its last user turn; None where no rule asks.
        hidden: the edits of the rules on hidden states, in the order of the policy.
        left_out: reason -> rows that were not read.
        one_sided: rows of SFT data: what is said of a chosen response is said of the row's own, of gaps of its score.
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
    steering: np.ndarray | None = None
    turns: np.ndarray | None = None
    hidden: tuple[HiddenEdit, ...] = ()
    concepts: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    one_sided: bool = False

    @property
    def warnings(self) -> list[str]:
        """The warnings of its rules, in the order of the policy."""
        return [rule["warning"] for rule in self.rules if rule.get("warning")]

    def __str__(self) -> str:
        """As `trl-anatomy plan` prints it."""
        return plan_report(self)


def plan_policy(
    policy: ConceptPolicy,
    pairs: "Pairs",
    scores: "Scores",
    *,
    audit: "Audit | None" = None,
    read: Mapping[int, Any] | None = None,
    bound: Sequence[BoundRule] | None = None,
) -> PolicyPlan:
    """Settle what a policy does to these pairs.

    Args:
        policy: the policy; an empty one keeps all rows and adds nothing.
        pairs: the pairs of the raw dataset.
        scores: scores of the concepts that a rule acts on; those that rules on hidden states edit without a fraction
            may be left out.
        audit: the audit of these pairs: for gates on its contexts, and for the predicted shift.
        read: what `settle_policy` read for a rule, by its number: mask_tokens: pair -> bool flags of the tokens of its
            chosen and rejected response (before truncation) that leave the loss; inoculate: pair -> prompt tokens of
            the policy for each response, [] for its own; residualize: (2, n_pairs) A(y) of the responses; rules on
            hidden states: the edit.
        bound: the rules as `bind` bound them to these pairs; None binds them now.

    Raises:
        PolicyError: gates that cannot be applied, two rules that fight over some pair, a concept that scores all
            responses alike, a strength that cannot be fitted.
        AnatomyError: the audit was made from other pairs, a score is not finite, or no pair is left.

    Source: method.md sections 8 and 12.
    """
    if audit is not None:
        audit.check_pairs(pairs)
    for name in policy.used:
        for side in (scores.chosen, scores.rejected) if name in scores.names else ():
            if not np.isfinite(side[name]).all():
                raise AnatomyError(f"The scores of {name!r} hold NaN or infinity; look at its scorer.")
    bound = bind(policy, pairs, audit) if bound is None else bound
    effects, met = _solved(policy, bound, pairs, scores, read or {})
    kept = met.kept
    records = rule_records(bound, effects, pairs, kept, scores.raw_differs)
    concepts, warnings = own_concepts(policy, bound, scores, effects, kept)
    for i, record in enumerate(records):
        record["warning"] = warnings.get(i, "")
    keep = np.ones(len(pairs.raw), dtype=bool)
    keep[pairs.rows] = kept
    scored = [rule.concept for rule in policy.rules if rule.concept in scores.names]
    gaps = {str(name): np.zeros(len(pairs.raw)) for name in scored}
    for name, gap in gaps.items():
        gap[pairs.rows] = scores.gap(name)
    acting = list(effects.values())
    masked = [effect.masked for effect in acting if effect.masked is not None]
    asked = [effect.prompts for effect in acting if effect.prompts is not None]
    weight, offsets = _weight(acting, met), _offsets(acting, pairs)
    counts = {"rows": len(pairs.raw), "pairs": len(pairs), "pairs_kept": int(kept.sum())}
    counts["untouched"] = pairs.left_out.get(EMPTY, 0)  # TRL leaves out the others too
    if pairs.blank is not None and pairs.blank.any():
        counts["blank"] = int(pairs.blank.sum())
    if masked:
        counts["chosen_masked"] = chosen_masked(pairs, masked, kept)
    prompt_lengths = None
    if asked or any(spec.scorer == "reft" for spec in policy.used.values()):
        prompt_lengths = np.zeros(len(pairs.raw), np.int64)
        prompt_lengths[pairs.rows] = [len(pairs.ids(i, "prompt")) for i in range(len(pairs))]
    return PolicyPlan(
        keep=keep,
        chosen_offset=offsets[0],
        rejected_offset=offsets[1],
        rules=records,
        predicted=None if pairs.one_sided else _predict(audit, keep, offsets[0] - offsets[1], weight),
        counts=counts,
        left_out=dict(pairs.left_out),
        gaps=gaps,
        weight=weight,
        kept_tokens=tokens_kept(pairs, masked) if masked else None,
        prompts={int(pairs.rows[pair]): p for part in asked for pair, p in part.items()} if asked else None,
        prompt_lengths=prompt_lengths,
        steering=_steering(acting, pairs),
        hidden=tuple(effect.edit for effect in acting if effect.edit is not None),
        concepts=concepts,
        one_sided=pairs.one_sided,
    )


def _solved(
    policy: ConceptPolicy, bound: Sequence[BoundRule], pairs: "Pairs", scores: "Scores", read: Mapping[int, Any]
) -> tuple[dict[int, Effect], Met]:
    """Rule -> effect, in the order in which they act, and what they leave."""
    met = Met(policy.source, pairs, scores, read, np.ones(len(pairs), bool), np.ones(len(pairs)))
    effects: dict[int, Effect] = {}
    for stage in STAGES.values():
        own = [rule for rule in bound if rule.verb.stage == stage.name]
        done = stage.solve(own, met) if own else {}
        effects |= done
        met = met.after(done)
        if not met.kept.any():
            verb, one = ("filter_rows", "row") if pairs.one_sided else ("filter_pairs", "pair")
            raise AnatomyError(f"{policy.source}: the {verb} rules leave no {one} to train on; lower their fraction.")
    return effects, met


def _weight(effects: Sequence[Effect], met: Met) -> np.ndarray | None:
    """`PolicyPlan.weight`."""
    factors = [effect.row_factor for effect in effects if effect.row_factor is not None]
    if not factors:
        return None
    weight = np.prod(factors, axis=0)
    weight[met.pairs.rows] = met.weight
    return weight


def _offsets(effects: Sequence[Effect], pairs: "Pairs") -> np.ndarray:
    """(2, n_raw) offsets of chosen and rejected responses."""
    offsets = np.zeros((2, len(pairs.raw)))
    for effect in effects:
        if effect.offsets is not None:
            offsets[:, pairs.rows] += effect.offsets
    return offsets


def _steering(effects: Sequence[Effect], pairs: "Pairs") -> np.ndarray | None:
    """`PolicyPlan.steering`."""
    strengths = [effect.strengths for effect in effects if effect.strengths is not None]
    if not strengths:
        return None
    steering = np.zeros((len(pairs.raw), 2, len(strengths)))
    steering[pairs.rows] = np.stack(strengths, axis=-1)
    return steering.reshape(len(steering), -1)


def _predict(audit: "Audit | None", keep: np.ndarray, margin: np.ndarray, weight: np.ndarray | None) -> pa.Table | None:
    """Mean disparity of each concept: over all pairs, and over the kept ones weighted by their pull.

    A pair of weight w whose margin the policy shifts by m pulls at the start model with w·σ(−m) instead of 1/2: it
    counts 2w·σ(−m) times.
    """
    if audit is None or not audit.has_concepts:
        return None
    u, names = audit.disparity()
    rows = audit.pairs["row"].to_numpy()
    kept = keep[rows]
    pull = 2 * expit(-margin[rows][kept]) * (1.0 if weight is None else weight[rows][kept])
    labelled = audit.labelled(audit.concepts)
    labels = dict(zip(labelled["concept"].to_pylist(), labelled["label"].to_pylist(), strict=True))
    return pa.table(
        {
            "concept": pa.array(names, pa.string()),
            "label": pa.array([labels.get(name) or "" for name in names], pa.string()),
            "predicted": predicted_shift(u),
            "predicted_under_policy": predicted_shift(u[kept], pull),
        }
    )


def plan_json(plan: PolicyPlan) -> dict[str, Any]:
    """The plan as JSON holds it: `counts`, `rules`, `concepts`, `warnings`, and `predicted` (a dict per concept of the
    audit, or None)."""
    predicted = None
    if plan.predicted is not None:
        predicted = [
            {key: None if value != value else value for key, value in row.items()}  # NaN, which JSON does not know
            for row in plan.predicted.to_pylist()
        ]
    return {
        "counts": {**plan.counts, "left_out": dict(plan.left_out)},
        "rules": [dict(rule) for rule in plan.rules],
        "concepts": [dict(row) for row in plan.concepts],
        "warnings": plan.warnings,
        "predicted": predicted,
    }


def plan_report(plan: PolicyPlan, *, n_concepts: int = 15) -> str:
    """The plan as text for a terminal.

    A row per rule, then one per concept of the policy, warnings, and the audit's concepts whose predicted shift changes
    most.
    """
    counts = plan.counts or {"rows": len(plan.keep), "pairs": len(plan.keep), "pairs_kept": int(plan.keep.sum())}
    ones = "rows" if plan.one_sided else "pairs"
    lines = [f"{counts['rows']} rows, {counts['pairs']} {ones} scored, {counts['pairs_kept']} {ones} trained on."]
    if blank := counts.get("blank"):
        lines.append(f"{blank} of the pairs scored have a blank response; TRL trains on them, so rules act on them.")
    if untouched := counts.get("untouched"):
        lines.append(f"{untouched} rows train untouched by any rule: {EMPTY}.")
    dropped = [f"{n} x {reason}" for reason, n in plan.left_out.items() if reason != EMPTY]
    if dropped:
        lines.append(f"TRL leaves rows out: {', '.join(dropped)}.")
    if not plan.rules:
        lines.append("The policy has no rules: training is TRL's own.")
    else:
        table = [_rule_row(n, rule) for n, rule in enumerate(plan.rules, 1)]
        lines += ["", *_columns([ones if name == "pairs" else name for name in _RULE_HEADER], table)]
        lines += [f"rule {n}: {rule['note']}." for n, rule in enumerate(plan.rules, 1) if rule["note"]]
    if plan.concepts:
        lines += ["", f"Concepts of the policy: mean score {_ROWS_SAY if plan.one_sided else _PAIRS_SAY}."]
        header = [name for name in _CONCEPT_HEADER if not (plan.one_sided and name in ("chosen", "rejected"))]
        lines += _columns(header, [_concept_row(row, header) for row in plan.concepts])
        lines.append("pp: percentage points of responses with a hit; sd: standard deviations of the score.")
    lines += [line for text in plan.warnings for line in _wrapped(f"WARNING: {text}")]
    unknown = list(dict.fromkeys(rule["verb"] for rule in plan.rules if not STAGES[rule["stage"]].on_scores))
    if unknown:
        lines.append(f"No number here counts what {', '.join(unknown)} changes; trl-anatomy predict does.")
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
        lines += [
            "",
            "How far the pairs lean towards the audit's concepts: chosen minus rejected, of the share of their",
            "features that fire; largest change first. A model may learn it: trl-anatomy predict asks yours.",
        ]
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
    "of all",
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
        (rule["sign"] or "").replace("_", " "),
        rule["concept"] or "",
        rule["verb"],
        _printable(rule["where"] or "")[:40],
        str(rule["pairs"]),
        str(rule["rows"]),
        "" if rule["tokens"] is None else str(rule["tokens"]),
        "" if rule["token_share"] is None else f"{rule['token_share']:.1%}",
        strength,
        "" if rule["mean_offset"] is None else f"{rule['mean_offset']:+.3f}",
        gradient if rule["gradient_touched"] is None else "",
    ]


_CONCEPT_HEADER = ["concept", "scorer", "where", "chosen", "rejected", "plain", "with policy", "effect"]


_PAIRS_SAY = "gap, chosen minus rejected; above 0 the pairs lean towards it"
_ROWS_SAY = "of the rows"


def _concept_row(row: dict[str, Any], header: Sequence[str]) -> list[str]:
    cells = [
        _printable(row["concept"]),
        row["scorer"],
        _printable(row["where"] or "")[:40],
        *("" if row[side] is None else f"{row[side]:.1%}" for side in ("chosen", "rejected")),
        *(
            "" if row[key] is None else gap_text(row[key], row["unit"])
            for key in ("predicted", "predicted_under_policy")
        ),
        row["effect"],
    ]
    return [cell for cell, name in zip(cells, _CONCEPT_HEADER, strict=True) if name in header]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, without the columns in which no row has anything."""
    told = [i for i in range(len(header)) if any(row[i] for row in rows)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in told]
    lines = [[row[i] for i in told] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(_printable(text), 120, subsequent_indent="  ", break_long_words=False)


def _printable(text: str) -> str:
    """Without control characters: labels come from the data."""
    return "".join(character for character in text if character.isprintable())
