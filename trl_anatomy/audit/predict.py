"""What training will shift, what it did shift, and how well the two agree (method.md sections 4 and 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from scipy import stats as distributions

from . import stats
from .config import AuditConfig
from .findings import few_prompts
from .shown import RATES, rates
from .views import Activity, Disparity

# Kinds of concepts, and the letters of their names.
CO_FIRING, RESPONSE_GEOMETRY = "co-firing", "response-geometry"
LETTERS = {CO_FIRING: "T", RESPONSE_GEOMETRY: "R"}

# Verdicts on a concept, in the words of the page.
RISES, FALLS, NO_EVIDENCE, TOO_FEW = "rises", "falls", "no evidence", "too few pairs to tell"
BY_LENGTH = "explained by length"
# Of concepts of SFT data.
NO_PAIRS = "no pairs"

# A sum of disparities of this size is rounding left over from copies that cancel.
CANCELLED = 1e-9

# What a label rests on (`concept_labels.py`).
EVIDENCE = pa.struct(
    [
        ("tokens", pa.list_(pa.string())),
        ("promoted", pa.list_(pa.string())),
        ("place", pa.string()),
        ("habit", pa.string()),
        ("correlation", pa.float64()),
    ]
)
# Null where no tokens were read for labels, and in audits of earlier versions.
LABELLED = pa.schema([("label_score", pa.float64()), ("label_rule", pa.string()), ("evidence", EVIDENCE)])
CONCEPTS = pa.schema(
    [
        ("concept", pa.string()),
        ("kind", pa.string()),
        ("label", pa.string()),
        ("features", pa.list_(pa.int32())),
        ("n_features", pa.int32()),
        ("predicted", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("p_permutation", pa.float64()),
        ("length_adjusted", pa.float64()),
        ("length_adjusted_low", pa.float64()),
        ("length_adjusted_high", pa.float64()),
        ("detectable", pa.float64()),
        ("support", pa.int64()),
        ("differ", pa.int64()),
        ("verdict", pa.string()),
        ("terms", pa.list_(pa.string())),
        ("telling_rows", pa.list_(pa.int64())),
        *((name, pa.float64()) for name in RATES),
        ("shown_above", pa.float64()),
        *LABELLED,
    ]
)
# Columns that audits of earlier versions do not have: read as null.
LATER = (*RATES, "shown_above", *LABELLED.names)


def predicted_shift(u: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean disparity of every concept: the shift that training on these pairs is predicted to cause.

    The mean is over all pairs, the silent ones included, so that it is the same quantity with and without weights.

    Args:
        u: (n, K) signed disparity.
        weights: (n,) pull of each pair on the policy relative to plain training; the sum is still divided by n, so a
            pair of weight 0 teaches nothing and takes no part of its pull to the others.
    Returns:
        (K,); NaN without pairs.
    Source: method.md section 4 (mean of u), section 12 (weights under a policy).
    """
    u = np.asarray(u, dtype=np.float64)
    if len(u) == 0:
        return np.full(u.shape[1], np.nan)
    return u.mean(axis=0) if weights is None else np.asarray(weights, dtype=np.float64) @ u / len(u)


def concept_table(  # noqa: PLR0913
    scores: Disparity,
    communities: Sequence[np.ndarray],
    config: AuditConfig,
    *,
    terms: Sequence[Sequence[str]] | None = None,
    n_telling: int = 3,
    kind: str = CO_FIRING,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    cut: Mapping[str, np.ndarray] | None = None,
) -> pa.Table:
    """A row per concept: predicted shift with interval, test, length-adjusted shift, support, verdict.

    - predicted: mean of u over all pairs; ci: percentile bootstrap over pairs; p: t-test of a zero mean; q: over all
      concepts.
    - p_permutation: the same by random swaps of chosen and rejected, exact; null if none was asked for.
    - length_adjusted: mean of u left when chosen and rejected are equally long, with interval.
    - detectable: smallest shift that these pairs would show at 5 % with 80 % power: 2.8 standard errors.
    - support: pairs in which the concept fires at all; differ: pairs in which u is not zero.
    - verdict: "too few pairs to tell" below 20 prompts or `min_context` differing pairs (copies count once, reversed
      ones not at all); else rises / falls where q <= alpha, the bootstrap interval leaves out zero, and neither length
      nor truncation explains it (`_explained`), "explained by length" where one does; else "no evidence".
    - telling_rows: rows of the raw dataset that show the shift best: largest u on the side of the shift, then least
      difference in the other concepts, then shortest.
    - rate_chosen, rate_rejected: share of the responses of that side that show the concept; shown_above: the share of
      its features beyond which one does (`shown.split_points`). Null without `Disparity.shown`.

    Args:
        terms: distinctive terms of each concept, for its label.
        groups: (n,) prompt of each pair: pairs of one prompt are resampled together, and errors of means are robust
            to what they share; default every pair its own.
        copies: (n,) the same number for copies of a pair, reversed ones too; default none are.
        cut: "chosen" and "rejected" -> (n,) bool, responses that truncation cut short; default none.
        kind: CO_FIRING, or RESPONSE_GEOMETRY, whose u is in standard deviations of a feature's difference.
    Returns:
        Table of schema CONCEPTS, in the order T1, T2, ... or R1, R2, ...
    """
    u = scores.u
    predicted = predicted_shift(u)
    _, error, p = stats.mean_test(u, groups)
    q = stats.benjamini_hochberg(p)
    low, high = stats.bootstrap_mean(u, config.bootstrap, config.seed, groups=groups)
    adjusted, adjusted_low, adjusted_high = stats.length_adjusted_mean(
        u, scores.log_ratio, groups=groups, copies=copies
    )
    swapped = np.full(len(communities), np.nan)
    if config.permutations:
        swapped = stats.swapped_mean_p(u, config.permutations, config.seed, groups=groups)
    n_differ = distinct_differing(u, copies)
    few = (n_differ < config.min_context) | few_prompts(groups, len(u))
    by_length = _explained(scores, predicted, adjusted_low, adjusted_high, config, groups, cut)
    differ = np.array([np.count_nonzero(column) for column in u.T], dtype=np.int64)
    size = np.zeros(len(u))
    for column in u.T:  # one after the other: a second array of this size may not fit
        size += np.abs(column)
    verdicts = []
    for m in range(len(communities)):
        if few[m]:
            verdicts.append(TOO_FEW)
        elif q[m] <= config.alpha and low[m] * high[m] > 0:
            verdicts.append(BY_LENGTH if by_length[m] else RISES if predicted[m] > 0 else FALLS)
        else:
            verdicts.append(NO_EVIDENCE)
    labels = [" · ".join(list(t)[:4]) for t in terms] if terms is not None else [""] * len(communities)
    unknown = np.full(len(communities), np.nan)
    shown = (unknown, unknown) if scores.shown is None else rates(scores.shown, scores.lengths)
    shown_above = unknown if scores.shown_above is None else scores.shown_above
    return pa.table(
        {
            "concept": [f"{LETTERS[kind]}{m + 1}" for m in range(len(communities))],
            "kind": [kind] * len(communities),
            "label": labels,
            "features": [np.asarray(c, dtype=np.int32) for c in communities],
            "n_features": [len(c) for c in communities],
            "predicted": predicted,
            "ci_low": low,
            "ci_high": high,
            "p": p,
            "q": q,
            "p_permutation": pa.array(swapped, from_pandas=True),
            "length_adjusted": adjusted,
            "length_adjusted_low": adjusted_low,
            "length_adjusted_high": adjusted_high,
            "detectable": (distributions.norm.ppf(0.975) + distributions.norm.ppf(0.8)) * error,
            "support": scores.support,
            "differ": differ,
            "verdict": verdicts,
            "terms": [list(t) for t in terms] if terms is not None else [[] for _ in communities],
            "telling_rows": [telling_rows(scores, m, predicted[m], size, n_telling) for m in range(len(communities))],
            **{name: pa.array(rate, from_pandas=True) for name, rate in zip(RATES, shown, strict=True)},
            "shown_above": pa.array(shown_above, from_pandas=True),
            **{field.name: pa.nulls(len(communities), field.type) for field in LABELLED},
        },
        schema=CONCEPTS,
    )


def distinct_differing(u: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """(K,) int64: pairs in which a concept differs, copies counted once and those that cancel not at all.

    Args:
        u: (n, K) signed disparity.
        copies: (n,) the same number for copies of a pair; None where none are.
    """
    if copies is None:
        return np.array([np.count_nonzero(column) for column in u.T], dtype=np.int64)
    _, of = np.unique(copies, return_inverse=True)
    sums = (np.bincount(of, column) for column in u.T)
    return np.array([np.count_nonzero(np.abs(total) > CANCELLED) for total in sums], dtype=np.int64)


def _explained(
    scores: Disparity,
    predicted: np.ndarray,
    adjusted_low: np.ndarray,
    adjusted_high: np.ndarray,
    config: AuditConfig,
    groups: np.ndarray | None,
    cut: Mapping[str, np.ndarray] | None,
) -> np.ndarray:
    """(K,) bool: shifts that the lengths of the responses explain, or that truncation does.

    A shift stands only if it has the same sign, and a nominal p of at most alpha,
    - counting firing tokens on one length for both responses: what fires equally often on both sides is no finding;
    - in the mean share of firing tokens, or in the mean of u left at equal length: what fires at an equal rate on both
      sides is no finding, though the threshold tau is met more or less often in a longer response;
    - over the pairs in which truncation did not cut the side that shows less, and that one alone: where the end is
      missing, so is what stands there.
    """
    side = np.sign(predicted)

    def falls_away(values: np.ndarray, of: np.ndarray | None) -> np.ndarray:
        mean, _, p = stats.mean_test(values, of)
        return ~((mean * side > 0) & (p <= config.alpha))

    at_equal_length = np.where(side > 0, adjusted_low, -adjusted_high) > 0
    share = scores.v if isinstance(scores, Activity) else scores.u if config.pooling == "freq" else None
    explained = np.zeros(len(predicted), dtype=bool)
    if scores.by_count is not None:
        explained |= falls_away(scores.by_count, groups)
    if share is not None:
        explained |= ~at_equal_length & falls_away(share, groups)
    else:
        explained |= ~at_equal_length & ~np.isnan(adjusted_low)
    for less, more, rises in (("rejected", "chosen", 1), ("chosen", "rejected", -1)):
        whole = np.ones(len(scores.u), dtype=bool) if cut is None else ~(cut[less] & ~cut[more])
        if not whole.all():
            explained |= (side == rises) & falls_away(scores.u[whole], None if groups is None else groups[whole])
    return explained


def telling_rows(scores: Disparity, concept: int, predicted: float, size: np.ndarray, n: int = 3) -> list[int]:
    """Rows of the raw dataset that show a concept best on the side of `predicted`: see `concept_table`.

    `size` (n_pairs,) is the sum of |u| over all concepts.
    """
    side = -1.0 if predicted < 0 else 1.0
    u = side * scores.u[:, concept]
    positive = u[u > 0]
    if len(positive) == 0:
        return []
    n = min(n, len(positive))
    candidates = np.flatnonzero(u >= np.partition(positive, len(positive) - n)[len(positive) - n])
    others = size[candidates] - u[candidates]
    length = (scores.lengths["chosen"] + scores.lengths["rejected"])[candidates]
    # Differences elsewhere are rounded, so that of two pairs that tell the same the shorter comes first.
    order = np.lexsort((scores.rows[candidates], length, np.round(2 * others), -u[candidates]))
    return scores.rows[candidates[order[:n]]].tolist()


def explained_shift(u: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The part of each concept's mean disparity that cheap measures of the two responses explain: a baseline.

    Least squares of u on x with an intercept; the shift is the slopes times the mean of x. With x the log ratio of the
    two lengths this is the mean disparity less its length-adjusted form.

    Args:
        u: (n, K) signed disparity.
        x: (n, R) measures of chosen minus rejected: log length, 1 or 0 by text rule, log-likelihood.

    Returns:
        (K,); zeros where no measure varies.
    """
    centred = x - x.mean(axis=0)
    slopes = np.linalg.lstsq(centred, u - u.mean(axis=0), rcond=None)[0]
    return x.mean(axis=0) @ slopes


def tilted_shift(u: np.ndarray, before: np.ndarray, prompt_groups: np.ndarray | None = None) -> np.ndarray:
    """Shift that the optimum of training would show in the start model's own responses: the exponential tilt.

    The reward is read from the pairs as a sum of concepts, r(y) = w · c(y), with w the joint Bradley-Terry coefficients
    of the disparities (logistic, no intercept, ridge of unit strength); the start model's responses are then reweighted
    by exp(r), the optimum of DPO at beta 1. Unlike the mean disparity this knows which concepts come together in the
    start model, and that a habit which is always there can not become more frequent.

    Args:
        u: (n_pairs, K) signed disparity.
        before: (n_responses, K) activity of the concepts in responses of the start model (`views.concept_activity`).
        prompt_groups: (n_responses,) int, equal for responses to one prompt: the tilt is then taken prompt by prompt.
            None, or one response to each prompt: over all responses together.

    Returns:
        (K,) mean activity under the tilt, minus the mean.

    Source: method.md section 1 (the tilt), section 12 (predicted shift, first order; this is the whole tilt).
    """
    from sklearn.linear_model import LogisticRegression

    if not len(u) or not len(before) or not u.any():
        return np.zeros(u.shape[1])
    mirrored, label = np.concatenate([u, -u]), np.repeat([1, 0], len(u))
    # Each pair counts once: the mirror image repeats it.
    fit = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
    reward = before @ fit.fit(mirrored, label, sample_weight=np.full(len(label), 0.5)).coef_[0]
    _, group = np.unique(np.zeros(len(before)) if prompt_groups is None else prompt_groups, return_inverse=True)
    size = np.bincount(group)
    if len(size) == len(before):
        group, size = np.zeros(len(before), dtype=np.int64), np.array([len(before)])
    highest = np.full(len(size), -np.inf)
    np.maximum.at(highest, group, reward)
    weight = np.exp(reward - highest[group])
    weight *= size[group] / np.bincount(group, weights=weight)[group]
    return (weight[:, None] * before).mean(axis=0) - before.mean(axis=0)


def odds_shift(chosen: np.ndarray, rejected: np.ndarray, n_pairs: int, start: np.ndarray) -> np.ndarray:
    """Shift of firing rates if training moves the log-odds of firing by as much as chosen and rejected differ in them.

    A difference of shares knows no ends: what the start model shows in a third of its responses can not fall by much
    more than the pairs' -0.32, and what it shows in a quarter may rise further than +0.32. The optimum of training at
    beta 1 moves the log-odds of a feature that comes independently of all others by just this difference.

    Args:
        chosen, rejected: (d,) responses of that side in which each feature fires, of `n_pairs`.
        start: (d,) rate of each feature in responses of the start model.
    Returns:
        (d,) rate afterwards less `start`. Half a response is added to each count, so that all odds are finite.
    Source: method.md section 12.
    """
    log_odds = [np.log((count + 0.5) / (n_pairs - count + 0.5)) for count in (chosen, rejected)]
    grown = start * np.exp(log_odds[0] - log_odds[1])
    return grown / (1 - start + grown) - start


def step_shift(activity: np.ndarray, change: np.ndarray, prompt_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift of what the start model does, to first order in a small step of training: a covariance within each prompt.

    A response whose log-probability rises by d comes exp(d) times as often, so that the mean of a concept moves by its
    covariance with the rises among the responses to one prompt. A prompt with a single response says nothing.

    Args:
        activity: (n_responses, K) of each concept in responses of the start model.
        change: (n_responses,) of their log-probability along the step.
        prompt_groups: (n_responses,) int, equal for responses to one prompt.

    Returns:
        (K,) shift and its standard error over prompts, per unit of the step; NaN where it is unknown.

    Source: method.md section 12.
    """
    _, group = np.unique(prompt_groups, return_inverse=True)
    size = np.bincount(group)
    used = size[group] > 1
    if not used.any():
        return np.full(activity.shape[1], np.nan), np.full(activity.shape[1], np.nan)
    activity, change, group = activity[used], change[used], group[used]
    inside = stats.one_hot(group, len(size))
    centred = activity - (inside @ activity / np.maximum(size, 1)[:, None])[group]
    # Of n responses the sum of products is n - 1 covariances; every prompt counts by its number of responses.
    products = centred * (change * (size / np.maximum(size - 1, 1))[group])[:, None]
    mean, error, _ = stats.mean_test(products, group)
    return mean, error


def concept_means(values: np.ndarray, features: Sequence[np.ndarray]) -> np.ndarray:
    """(K,) mean over each concept's features of what is said of single ones, (d,)."""
    return np.array([values[of].mean() for of in features], dtype=np.float64)


@dataclass(frozen=True)
class Agreement:
    """How well predicted shifts match observed ones, over concepts.

    Attributes:
        n: concepts compared (those finite in both).
        r2: squared Pearson correlation: how well a straight line fits. The "R²" of method.md section 7.
        r2_identity: 1 - sum (observed - predicted)² / sum (observed - mean)²: how well the prediction fits as it is,
            without a line; may be negative.
        pearson, spearman: correlation and rank correlation.
        p: one-sided permutation p-value of the Pearson correlation being this large by chance.
        *_low, *_high: 95 % percentile bootstrap intervals over concepts.
    """

    n: int
    r2: float
    r2_low: float
    r2_high: float
    r2_identity: float
    r2_identity_low: float
    r2_identity_high: float
    pearson: float
    spearman: float
    spearman_low: float
    spearman_high: float
    p: float

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-able; NaN becomes None."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


def agreement(
    predicted: np.ndarray,
    observed: np.ndarray,
    *,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Agreement:
    """Compare predicted with observed shifts (method.md section 7).

    Args:
        predicted, observed: (K,). Concepts that are NaN in either are left out.
    Returns:
        Agreement; its numbers are NaN below three concepts or where one side never varies.
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    n = len(x)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(n, *[float("nan")] * 11)
    rng = np.random.default_rng(seed)
    pearson = float(_pearson(x, y))
    permuted = np.stack([rng.permutation(n) for _ in range(n_permutations)])
    by_chance = _pearson(np.broadcast_to(x, permuted.shape), y[permuted])
    p = float((1 + np.sum(by_chance >= pearson - 1e-12)) / (1 + n_permutations))

    drawn = rng.integers(0, n, (n_bootstrap, n))
    xs, ys = x[drawn], y[drawn]
    resampled = {
        "r2": _pearson(xs, ys) ** 2,
        "r2_identity": _identity(xs, ys),
        "spearman": _pearson(distributions.rankdata(xs, axis=1), distributions.rankdata(ys, axis=1)),
    }
    intervals = {
        name: np.nanquantile(values, [0.025, 0.975]) if np.isfinite(values).any() else np.full(2, np.nan)
        for name, values in resampled.items()
    }
    return Agreement(
        n=n,
        r2=pearson**2,
        r2_low=float(intervals["r2"][0]),
        r2_high=float(intervals["r2"][1]),
        r2_identity=float(_identity(x, y)),
        r2_identity_low=float(intervals["r2_identity"][0]),
        r2_identity_high=float(intervals["r2_identity"][1]),
        pearson=pearson,
        spearman=float(_pearson(distributions.rankdata(x), distributions.rankdata(y))),
        spearman_low=float(intervals["spearman"][0]),
        spearman_high=float(intervals["spearman"][1]),
        p=p,
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; NaN where a side does not vary."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))


def _identity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 - residual over total sum of squares of y about the line y = x, along the last axis."""
    total = np.square(y - y.mean(axis=-1, keepdims=True)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, 1 - np.square(y - x).sum(axis=-1) / np.where(total > 0, total, 1.0), np.nan)
