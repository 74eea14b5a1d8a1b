"""The Bradley-Terry model of the choice: fits, margins of held-out prompts, and what a column adds to others.

`P(a over b) = σ(w·(x_a − x_b))`: logistic regression without intercept on the differences chosen minus rejected, each
divided by its root mean square, ridge-penalised, cross-validated by prompt (docs/explanation/findings.md).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import stats as distributions

from . import stats
from .findings import MIN_PROMPTS

FOLDS = 5
# Penalty λ of `mean loss + λ/2·|w|²` on standardised columns, strong to weak; the training folds choose.
STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
# Pairs, and values of a matrix, that are fitted at most: more would move an accuracy by less than half a point.
MOST_PAIRS, MOST_VALUES = 20_000, 8_000_000
# Columns up to which Newton's method beats L-BFGS.
NARROW = 100
# Models of different folds share most of their pairs, so errors by fold are not independent: intervals are wider by
# sqrt((1/5 + 1/4) / (1/5)) (Nadeau and Bengio 2003). Without it, one interval in seven misses 50 % on shuffled sides.
WIDER = 1.5
# The penalty of the few columns of a list, which need hardly any.
LIGHT = 1e-3


def drawn_rows(groups: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Rows of at most `most` pairs (of 20 prompts in any case), whole prompts drawn at random; all where they fit."""
    if len(groups) <= most:
        return np.arange(len(groups))
    _, index, size = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(size))
    n_kept = max(MIN_PROMPTS, int(np.searchsorted(np.cumsum(size[order]), most, side="right")))
    return np.flatnonzero(np.isin(index, order[:n_kept]))


def fold_of(groups: np.ndarray, seed: int) -> np.ndarray:
    """(n,) fold of each row, 0 to 4: groups at random, as many to each fold."""
    _, index = np.unique(groups, return_inverse=True)
    n_groups = int(index.max(initial=-1)) + 1
    return (np.random.default_rng(seed).permutation(n_groups) % FOLDS)[index]


def held_out_margins(gaps: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) margin `w·d` of each row by a model of the other folds, at the penalty that those folds choose.

    The penalty for a fold is the one of the largest likelihood of the other four, each predicted by the remaining
    three: a model without two folds serves both.

    Args:
        gaps: (n, n_columns) chosen minus rejected.
        folds: (n,) fold of each row.
    """
    likelihood = np.zeros((FOLDS, len(STRENGTHS)))
    for pair in combinations(range(FOLDS), 2):
        models = fit_path(gaps[~np.isin(folds, pair)], STRENGTHS)
        for fold, other in (pair, pair[::-1]):
            likelihood[other] += log_sigmoid(gaps[folds == fold] @ models.T).sum(axis=0)
    margins = np.zeros(len(gaps))
    for fold in range(FOLDS):
        best = int(likelihood[fold].argmax())
        models = fit_path(gaps[folds != fold], STRENGTHS[: best + 1])
        margins[folds == fold] = gaps[folds == fold] @ models[-1]
    return margins


def fit_path(gaps: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """(n_strengths, n_columns) weights that minimise `mean(−log σ(w·d)) + λ/2·|w·rms|²`, for each λ.

    Args:
        gaps: (n, n_columns), at least two rows.
        strengths: λ, each fit starting from the one before.
    """
    scale = np.sqrt(np.square(gaps).mean(axis=0))
    scale[scale == 0] = 1.0
    scaled = gaps / scale
    fit = _newton if gaps.shape[1] <= NARROW else _lbfgs
    weights = [np.zeros(gaps.shape[1])]
    for strength in strengths:
        weights.append(fit(scaled, strength, weights[-1]))
    return np.array(weights[1:]) / scale


def _newton(gaps: np.ndarray, strength: float, weights: np.ndarray) -> np.ndarray:
    """The minimum by Newton's method with halved steps, to full precision."""

    def loss(weights: np.ndarray) -> float:
        return float(strength / 2 * weights @ weights - log_sigmoid(gaps @ weights).mean())

    now = loss(weights)
    for _ in range(100):
        wrong = np.exp(log_sigmoid(-(gaps @ weights)))
        gradient = strength * weights - wrong @ gaps / len(gaps)
        curvature = (gaps.T * (wrong * (1 - wrong))) @ gaps / len(gaps) + strength * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        while (then := loss(weights - step)) > now and np.abs(step).max() > 1e-9:
            step /= 2
        weights, now = weights - step, then
        if np.abs(step).max() <= 1e-7:
            break
    return weights


def _lbfgs(gaps: np.ndarray, strength: float, weights: np.ndarray) -> np.ndarray:
    """The minimum by scikit-learn. Every other row is turned round: a classifier needs two classes, and without an
    intercept that changes nothing."""
    from sklearn.linear_model import LogisticRegression

    sign = np.where(np.arange(len(gaps)) % 2, -1.0, 1.0)
    model = LogisticRegression(C=1 / (strength * len(gaps)), fit_intercept=False, warm_start=True, max_iter=1000)
    model.coef_, model.intercept_, model.classes_ = weights[None], np.zeros(1), np.array([-1.0, 1.0])
    return model.fit(gaps * sign[:, None], sign).coef_[0]


def log_sigmoid(margins: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -margins)


def right(margins: np.ndarray) -> np.ndarray:
    """1.0 where the margin is above 0, 0.5 where it is 0 (but for rounding), else 0.0."""
    return (1 + np.sign(np.where(np.abs(margins) <= stats.ROUNDING, 0.0, margins))) / 2


def light_margins(gaps: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) margin of each row by a model of the other folds, at the light penalty; 0 without columns.

    Args:
        gaps: (n, n_columns), few; folds: (n,) fold of each row.
    """
    margins = np.zeros(len(gaps))
    for fold in range(FOLDS):
        margins[folds == fold] = gaps[folds == fold] @ fit_path(gaps[folds != fold], [LIGHT])[0]
    return margins


def interval(name: str, values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Mean of held-out values with its 95 % t interval over prompts."""
    (mean,), (error,), _ = stats.mean_test(values[:, None], groups)
    half = WIDER * error * distributions.t.ppf(0.975, len(np.unique(groups)) - 1)
    return {name: float(mean), f"{name}_low": float(mean - half), f"{name}_high": float(mean + half)}


def score_test(gaps: np.ndarray, candidates: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether a column adds to a model of others: the efficient score of each candidate, robust to shared prompts.

    The residual `1 − σ(w·d)` of the model, times the candidate less what the model's columns tell of it (least squares
    weighted by the model's variance): the estimate of w then plays no part to first order (Rao 1948).

    Args:
        gaps: (n, n_columns) of the model, chosen minus rejected; there may be none.
        candidates: (n, n_candidates).
        groups: (n,) prompt of each pair.

    Returns:
        z and two-sided p, each (n_candidates,), z above 0 where more of it speaks for chosen; 0 and 1 of what the
        model tells wholly.
    """
    margins, model = np.zeros(len(candidates)), gaps[:, :0]
    weighted = model
    if gaps.shape[1]:
        margins, model = gaps @ fit_path(gaps, [LIGHT])[0], gaps
        weighted = gaps * np.exp(log_sigmoid(margins) + log_sigmoid(-margins))[:, None]
    moments, residual = weighted.T @ model, np.exp(log_sigmoid(-margins))[:, None]

    def of(block: np.ndarray) -> tuple[np.ndarray, ...]:
        left = block - model @ np.linalg.lstsq(moments, weighted.T @ block, rcond=None)[0] if gaps.shape[1] else block
        size = np.sqrt(np.square(block).mean(axis=0))
        told = ~(np.sqrt(np.square(left).mean(axis=0)) > 1e-6 * size)  # also of a candidate that never varies
        return (*stats.mean_test(residual * left, groups), told)

    mean, error, p, told = stats.in_blocks(candidates, of)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(told, 0.0, np.where(error > 0, mean / error, np.sign(mean) * np.inf))
    return np.nan_to_num(z), np.where(told | np.isnan(p), 1.0, p)
