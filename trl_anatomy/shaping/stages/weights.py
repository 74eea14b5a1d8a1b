"""Weights: how much each pair counts. Columns come first, as they are; then balanced weights, all rules together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import AnatomyError
from ..bind import BoundRule
from ..located import PolicyError, no_column
from ..weights import balanced_weights, effective_size
from .stage import Effect, Met, Stage, Tally, Unbound

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ...reading.spans import Pairs

MIN_SHARE = 0.05  # of the pairs in a gate that balanced weights have to rest on, as effective sample size


class Weights(Stage):
    """reweight_pairs and reweight_rows."""

    name = "weight"
    on_scores = True

    def check(self, rule: Unbound) -> list[str]:
        name, columns = rule.verb.column, rule.columns
        if name is None or not columns or name in columns:
            return super().check(rule)
        return [no_column(rule.at("column"), name, columns)]

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        """Weights of all rules.

        Balanced weights are the closest to those of columns for which every rule's means are where it wants them, all
        rules together: also where their gates overlap. A row that was not scored has its column's weight where the rule
        has no gate, else 1.

        Raises:
            PolicyError: weights in a column that cannot be used, or means that no weights (or next to no pairs) reach.

        Source: method.md section 12, balanced weights.
        """
        pairs, kept, copies = met.pairs, met.kept, met.pairs.copies.identical
        row_factors = {rule.number: np.ones(len(pairs.raw)) for rule in rules}
        factors = {rule.number: np.ones(len(pairs)) for rule in rules}
        problems = []
        for rule in rules:
            name = _verb(rule).column
            if name is None:
                continue
            try:
                column = _column(pairs, name)
            except AnatomyError as error:
                problems.append(f"{rule.at('column')}: {error}")
                continue
            factors[rule.number] = np.where(rule.gate, column[pairs.rows], 1.0)
            is_open = np.full(len(pairs.raw), rule.verb.where is None)
            is_open[pairs.rows] = rule.gate
            row_factors[rule.number] = np.where(is_open, column, 1.0)
        if problems:
            raise PolicyError(problems)
        base = np.prod(list(factors.values()), axis=0)
        if not base[kept].any():
            raise AnatomyError(f"{met.source}: every pair that is kept weighs 0; nothing is left to train on.")

        balanced = [rule for rule in rules if rule.concept is not None]
        groups = _groups(balanced, met.scores, kept & (base > 0), base)
        leaders = {rule.number: group.rules[0].number for group in groups for rule in group.rules}
        for group, factor in zip(groups, _balance(groups, base, kept, copies), strict=True):
            factors[group.rules[0].number] = factor
        weight = np.prod(list(factors.values()), axis=0)
        effects = {}
        for rule in rules:
            inside, i = rule.gate & kept, rule.number
            effective = effective_size(weight[inside], copies[inside])[0]
            changed = bool((factors[i][kept] != 1).any())
            effects[i] = Effect(
                factor=factors[i],
                row_factor=row_factors[i],
                together=True,
                figures={"effective_pairs": effective, "strength": _verb(rule).signed},
                notes=_notes(rule, effective, leaders.get(i, i), changed, "row" if pairs.one_sided else "pair"),
            )
        return effects

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        assert effect.factor is not None
        tally.alive = tally.alive * effect.factor
        return {"rows": int((effect.factor[tally.kept] != 1).sum()), **effect.figures}

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        return "; ".join(effect.notes)


def _verb(rule: BoundRule) -> Any:
    return rule.verb


def _notes(rule: BoundRule, effective: float, leader: int, changed: bool, one: str) -> tuple[str, ...]:
    """What a reader should know; `leader`: the rule that stands for all that were solved together."""
    if leader == rule.number and not changed:
        return ("touches nothing: the weights are 1 already",)
    parts = [f"the {one}s in its gate count like {effective:.1f} of equal weight"]
    if rule.held:
        parts.append(f"held as they are: {', '.join(rule.held)}")
    if leader != rule.number:
        parts.append(f"solved together with rule {leader + 1}, where its rows and gradient are")
    return tuple(parts)


@dataclass(frozen=True)
class _Group:
    """Rules with the same pairs: `pairs` (n_pairs,) bool, and score gaps with the mean that each is to have."""

    rules: list[BoundRule]
    pairs: np.ndarray
    gaps: dict[str, np.ndarray]
    targets: dict[str, float]
    held: list[str]


def _groups(rules: Sequence[BoundRule], scores: "Scores", usable: np.ndarray, base: np.ndarray) -> list[_Group]:
    groups: dict[bytes, _Group] = {}
    problems = []
    for bound in rules:
        rule, place, inside = _verb(bound), bound.place, bound.gate & usable
        if not inside.any():
            problems.append(f"{place}: the rules before it leave no pair in this gate.")
            continue
        group = groups.setdefault(inside.tobytes(), _Group([], inside, {}, {}, []))
        gap = rule.balanced(scores.gap(rule.concept))
        mean = float(np.average(gap[inside], weights=base[inside]))
        target = rule.factor * mean
        if rule.concept in group.targets:
            text = f"{place}: found a second reweight_pairs rule for {rule.concept!r} on the same pairs, allowed: one."
            problems.append(text)
        elif rule.sign == "amplify" and mean < 0:
            problems.append(
                f"{place}: the pairs punish {rule.concept!r} (mean gap {mean:.3g}), which weights can only stretch; "
                "use amplify with shape_reward."
            )
        elif not gap[inside].min() < target < gap[inside].max() and np.ptp(gap[inside]) + abs(mean - target) > 0:
            problems.append(f"{place}: {_out_of_reach(rule, gap[inside], mean, target)}")
        group.rules.append(bound)
        group.gaps[rule.concept], group.targets[rule.concept] = gap, target
    if problems:
        raise PolicyError(problems)
    for group in groups.values():
        held = dict.fromkeys(name for rule in group.rules for name in rule.held)
        for name in held:
            if name in group.targets:
                first = next(rule for rule in group.rules if name in rule.held)
                problems.append(
                    f"{first.place}: found {name!r} in hold, and another reweight_pairs rule acts on it in the same "
                    "pairs, allowed: one of the two."
                )
        for name in held:
            group.held.append(name)
            group.gaps[name] = scores.gap(name)
            group.targets[name] = float(np.average(scores.gap(name)[group.pairs], weights=base[group.pairs]))
    if problems:
        raise PolicyError(problems)
    return list(groups.values())


def _out_of_reach(rule: Any, gap: np.ndarray, mean: float, target: float) -> str:
    if rule.reads == "rows":  # hits, of which the share never reaches 0 or 1
        shown = "every" if gap.all() else "too many a"
        return f"{shown} row shows {rule.concept!r}, so no weights bring the share to {target:.0%}; use filter_rows."
    text = f"no weights take the mean gap of {rule.concept!r} from {mean:.3g} to {target:.3g}: "
    if target == 0:
        side = "chosen" if mean > 0 else "rejected"
        return (
            f"{text}in all {int((gap != 0).sum())} pairs where the two responses differ, the {side} one scores higher. "
            "Give a strength below 1, or drop them with filter_pairs."
        )
    return f"{text}the gaps of single pairs reach from {gap.min():.3g} to {gap.max():.3g}. Give a smaller strength."


def _balance(groups: Sequence[_Group], base: np.ndarray, kept: np.ndarray, copies: np.ndarray) -> list[np.ndarray]:
    """(n_pairs,) factor of each group; all groups are solved together, so that overlapping gates agree."""
    if not groups:
        return []
    columns, totals, owner = [], [], []
    for k, group in enumerate(groups):
        inside = group.pairs
        columns.append(inside.astype(float))  # the sum of the weights in the gate stays
        totals.append(base[inside].sum())
        owner.append(k)
        for name, gap in group.gaps.items():
            distance = np.where(inside, gap - group.targets[name], 0.0)
            scale = np.sqrt(np.mean(distance[inside] ** 2))
            if scale > 1e-12 * max(1e-300, np.abs(gap[inside]).max(initial=0.0)):
                columns.append(distance / scale)
                totals.append(0.0)
                owner.append(k)
    usable = kept & (base > 0)
    x = np.stack(columns, axis=1)
    eta = balanced_weights(x[usable], np.array(totals), base[usable])
    remedy = "Hold fewer concepts (hold: [...]) or give a smaller strength."
    if eta is None:
        wanted = ", ".join(repr(name) for group in groups for name in group.targets if name not in group.held)
        held = ", ".join(dict.fromkeys(repr(name) for group in groups for name in group.held))
        raise PolicyError(
            [
                f"{groups[0].rules[0].place}: no weights take the mean gap of {wanted} where the "
                f"rules want it{f' while {held} stay as they are' if held else ''}. {remedy}"
            ]
        )
    weight = base * np.exp(x @ eta)
    factors, problems = [], []
    for k, group in enumerate(groups):
        mine = [column for column, whose in enumerate(owner) if whose == k]
        factors.append(np.where(group.pairs, np.exp(x[:, mine] @ eta[mine]), 1.0))
        inside = weight[group.pairs]
        effective, n = effective_size(inside, copies[group.pairs])
        if effective < MIN_SHARE * n:
            problems.append(
                f"{group.rules[0].place}: the weights rest on {effective:.1f} of {n} pairs "
                f"(effective sample size; at least {MIN_SHARE:.0%} are asked for). {remedy}"
            )
    if problems:
        raise PolicyError(problems)
    return factors


def _column(pairs: "Pairs", name: str) -> np.ndarray:
    """(n_raw,) weights of a dataset column."""
    if name not in pairs.raw.column_names:
        raise AnatomyError(f"the dataset has no column {name!r}; found: {', '.join(pairs.raw.column_names)}.")
    held = pairs.raw.with_format(None).select_columns([name])[:][name]
    try:
        weight = np.asarray([np.nan if value is None else value for value in held])
    except ValueError:  # lists of different lengths
        weight = np.zeros((0, 0))
    if weight.ndim != 1 or weight.dtype.kind not in "biuf":
        raise AnatomyError(f"the column {name!r} holds something else than numbers, allowed: a weight per row.")
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise AnatomyError(
            f"the column {name!r} holds {held[bad[0]]!r} in row {bad[0]} ({len(bad)} such rows), allowed: finite "
            "weights of at least 0."
        )
    return weight
