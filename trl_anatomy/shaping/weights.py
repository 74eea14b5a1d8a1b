"""Weights of pairs: those that a column gives, and balanced ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import AnatomyError
from .interventions import ReweightPairs
from .located import PolicyError

if TYPE_CHECKING:
    from ..reading.score import Scores
    from ..reading.spans import Pairs
    from .policy import ConceptPolicy

MIN_SHARE = 0.05  # of the pairs in a gate that balanced weights have to rest on, as effective sample size


@dataclass(frozen=True)
class Weighed:
    """What one rule on the weights does.

    Attributes:
        factor: (n_pairs,) what it multiplies the weights by; all 1 for a rule that was solved together with `leader`.
        effective: effective sample size (Σw)² / Σw² of the final weights over the kept pairs of its gate; identical
            pairs are one of their summed weight.
        held: the concepts that it holds.
        leader: number of the rule that stands for this one too; None where it stands for itself.
    """

    factor: np.ndarray
    effective: float
    held: tuple[str, ...] = ()
    leader: int | None = None


def settle_weights(
    policy: "ConceptPolicy",
    pairs: "Pairs",
    scores: "Scores",
    gates: Sequence[np.ndarray],
    kept: np.ndarray,
) -> tuple[dict[int, Weighed], np.ndarray | None]:
    """Weights of all `reweight_pairs` rules.

    Columns come first, as they are. Balanced weights are then the closest to them for which every rule's means are
    where it wants them, all rules together: also where their gates overlap.

    Args:
        policy: the policy.
        pairs: the pairs.
        scores: of the rules' concepts and of the held ones.
        gates: (n_pairs,) bool per rule.
        kept: (n_pairs,) bool.

    Returns:
        Rule number -> what it does, and (n_raw,) float64 weight of every raw row (None without such a rule). A row that
        was not scored has its column's weight where the rule has no gate, else 1.

    Raises:
        PolicyError: weights in a column that cannot be used, or means that no weights (or next to no pairs) reach.

    Source: method.md section 12, balanced weights.
    """
    rules = {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, ReweightPairs)}
    if not rules:
        return {}, None
    raw_weight = np.ones(len(pairs.raw))
    factors = {i: np.ones(len(pairs)) for i in rules}
    problems = []
    for i, rule in rules.items():
        if rule.column is not None:
            try:
                column = _column(pairs, rule.column)
            except AnatomyError as error:
                problems.append(f"{policy.place(f'rules[{i}].column')}: {error}")
                continue
            factors[i] = np.where(gates[i], column[pairs.rows], 1.0)
            open_rows = np.ones(len(pairs.raw), bool) if rule.where is None else np.zeros(len(pairs.raw), bool)
            open_rows[pairs.rows] = gates[i]
            raw_weight *= np.where(open_rows, column, 1.0)
    if problems:
        raise PolicyError(problems)
    base = np.prod(list(factors.values()), axis=0)
    if not base[kept].any():
        raise AnatomyError(f"{policy.source}: every pair that is kept weighs 0; nothing is left to train on.")

    groups, copies = _groups(policy, scores, gates, kept & (base > 0), base), pairs.copies.identical
    for group, factor in zip(groups, _balance(policy, groups, base, kept, copies), strict=True):
        factors[group.rules[0]] = factor
    raw_weight[pairs.rows] = weight = np.prod(list(factors.values()), axis=0)
    weighed = {}
    for i, rule in rules.items():
        inside = gates[i] & kept
        effective = effective_size(weight[inside], copies[inside])[0]
        own = next((group for group in groups if i in group.rules), None)
        leader = own.rules[0] if own is not None and own.rules[0] != i else None
        weighed[i] = Weighed(factors[i], effective, policy.held(rule), leader)
    return weighed, raw_weight


def effective_size(weight: np.ndarray, copies: np.ndarray) -> tuple[float, int]:
    """Effective sample size (Σw)² / Σw² of pairs of which identical ones are one of their summed weight.

    Args:
        weight: (n,) of at least 0.
        copies: (n,) the same number for identical pairs.

    Returns:
        It, and the number of distinct pairs.

    >>> effective_size(np.ones(6), np.array([0, 0, 1, 1, 2, 2]))
    (3.0, 3)
    """
    together = np.bincount(np.unique(copies, return_inverse=True)[1], weight)
    return float(together.sum() ** 2 / max(np.square(together).sum(), 1e-300)), len(together)


def balanced_weights(x: np.ndarray, totals: np.ndarray, base: np.ndarray) -> np.ndarray | None:
    """Coefficients of the weights closest to `base` whose sums over the columns of x are `totals`.

    With η the result, w = base · exp(x · η) solves x' w = totals and has the smallest generalised Kullback-Leibler
    divergence Σ w·log(w/base) − w + base of all that do (its convex dual, by Newton's method).

    Args:
        x: (n, K).
        totals: (K,).
        base: (n,) above 0.

    Returns:
        (K,); None where no weights above 0 do it. Columns that say the same share what they need.

    Source: method.md section 12, balanced weights (entropy balancing).

    Example:
        >>> x = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])  # three up, one down: balance, keep the sum
        >>> eta = balanced_weights(x, np.array([4.0, 0.0]), np.ones(4))
        >>> np.exp(x @ eta).round(6).tolist()
        [0.666667, 0.666667, 0.666667, 2.0]
    """
    size = base.sum()
    eta = np.zeros(x.shape[1])

    def dual(at: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float(base @ np.exp(x @ at) - totals @ at)

    for _ in range(200):
        weight = base * np.exp(x @ eta)
        force = totals - x.T @ weight
        if np.abs(force).max() <= 1e-13 * size:
            break
        step = np.linalg.lstsq((x * weight[:, None]).T @ x, force, rcond=1e-13)[0]
        gain, length = float(force @ step), 1.0
        if not gain > 1e-24 * size:  # as near as rounding lets it come
            break
        if gain > 1e-8 * size:  # below, the dual is too flat for a comparison and the full step is right
            before = dual(eta)
            while not dual(eta + length * step) <= before - 1e-4 * length * gain and length > 1e-12:
                length /= 2
        if np.abs(x @ (eta + length * step)).max() > 500:
            return None
        eta = eta + length * step
    missed = np.abs(totals - x.T @ (base * np.exp(x @ eta))).max()
    return eta if missed <= 1e-8 * size else None


@dataclass(frozen=True)
class _Group:
    """Rules with the same pairs: `pairs` (n_pairs,) bool, and score gaps with the mean that each is to have."""

    rules: list[int]
    pairs: np.ndarray
    gaps: dict[str, np.ndarray]
    targets: dict[str, float]
    held: list[str]


def _groups(  # noqa: C901
    policy: "ConceptPolicy", scores: "Scores", gates: Sequence[np.ndarray], usable: np.ndarray, base: np.ndarray
) -> list[_Group]:
    groups: dict[bytes, _Group] = {}
    problems = []
    for i, rule in enumerate(policy.rules):
        if not isinstance(rule, ReweightPairs) or rule.concept is None:
            continue
        place, inside = policy.place(f"rules[{i}]"), gates[i] & usable
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
        group.rules.append(i)
        group.gaps[rule.concept], group.targets[rule.concept] = gap, target
    if problems:
        raise PolicyError(problems)
    for group in groups.values():
        held = dict.fromkeys(name for i in group.rules for name in policy.held(policy.rules[i]))
        for name in held:
            if name in group.targets:
                i = next(i for i in group.rules if name in policy.held(policy.rules[i]))
                problems.append(
                    f"{policy.place(f'rules[{i}]')}: found {name!r} in hold, and another reweight_pairs rule acts on "
                    "it in the same pairs, allowed: one of the two."
                )
        for name in held:
            group.held.append(name)
            group.gaps[name] = scores.gap(name)
            group.targets[name] = float(np.average(scores.gap(name)[group.pairs], weights=base[group.pairs]))
    if problems:
        raise PolicyError(problems)
    return list(groups.values())


def _out_of_reach(rule: ReweightPairs, gap: np.ndarray, mean: float, target: float) -> str:
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


def _balance(
    policy: "ConceptPolicy", groups: Sequence[_Group], base: np.ndarray, kept: np.ndarray, copies: np.ndarray
) -> list[np.ndarray]:
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
                f"{policy.place(f'rules[{groups[0].rules[0]}]')}: no weights take the mean gap of {wanted} where the "
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
                f"{policy.place(f'rules[{group.rules[0]}]')}: the weights rest on {effective:.1f} of {n} pairs "
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
