"""What the choice is made of: how well length, named habits and concepts predict which side is chosen, held out.

A Bradley-Terry model, `P(a over b) = σ(w·(x_a − x_b))`: logistic regression without intercept on the differences chosen
minus rejected, ridge-penalised, cross-validated by prompt (docs/habits.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats as distributions

from ..reading.habits import LENGTHS, Habit
from . import stats
from .findings import MIN_PROMPTS, one_blas_thread

FOLDS = 5
# Penalty λ of `mean loss + λ/2·|w|²` on standardised columns, strong to weak; the training folds choose.
STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
# The penalty of the few habits in `carried_by`, which need hardly any.
LIGHT = 1e-3
# Pairs, and values of a matrix, that are fitted at most: more would move an accuracy by less than half a point.
MOST_PAIRS, MOST_VALUES = 20_000, 8_000_000
# Columns up to which Newton's method beats L-BFGS.
NARROW = 100
# Models of different folds share most of their pairs, so errors by fold are not independent: intervals are wider by
# sqrt((1/5 + 1/4) / (1/5)) (Nadeau and Bengio 2003). Without it, one interval in seven misses 50 % on shuffled sides.
WIDER = 1.5
# Rows of `carried_by`; candidates tried for each; the least that one adds, in nats a pair; the correlation beyond which
# a habit is folded under the one above.
N_CARRIED, N_TRIED, LEAST_GAIN, FOLDED = 6, 5, 1e-3, 0.5

TOLD, CHANCE, TOO_FEW = "beyond chance", "nothing beyond chance", "too few prompts to tell"
LENGTH, HABITS, CONCEPTS, ALL = "length", "habits", "concepts", "all"

_INTERVALS = {f"{name}{end}": float for name in ("accuracy", "auc") for end in ("", "_low", "_high")}
# What `audit.json` holds under `choice`; audits of earlier versions have none.
SHAPE = {
    "verdict": str,
    "pairs": int,
    "prompts": int,
    "sources": [{"source": str, "features": int, "verdict": str, "log_likelihood": float, **_INTERVALS}],
    "carried_by": [
        {"habit": str, "with_it": [str], "favours": str, "odds": float, "step": str, "log_likelihood": float}
        | {f"{name}{end}": float for name in ("accuracy", "adds") for end in ("", "_low", "_high")}
    ],
}


@dataclass(frozen=True)
class Counted:
    """Habits as counted on both sides.

    Attributes:
        values: (2, n_pairs, n_habits) of chosen and rejected (`habit_table.habit_values`).
        habits: name -> habit, in that order.
        groups: (n_pairs,) prompt of each pair; copies share it.
    """

    values: np.ndarray
    habits: Mapping[str, Habit]
    groups: np.ndarray

    def gaps(self) -> np.ndarray:
        """(n_pairs, n_habits) chosen minus rejected; of amounts the difference of logarithms (of 1 + amount)."""
        amounts = [not _is_share(habit) for habit in self.habits.values()]
        levels = np.where(amounts, np.sign(self.values) * np.log1p(np.abs(self.values)), self.values)
        return levels[0] - levels[1]


@one_blas_thread
def choice_of(counted: Counted, concepts: np.ndarray | None = None, seed: int = 0) -> dict[str, Any]:
    """Held-out accuracy and AUC of the preference by source, and the few habits that carry it.

    Pairs of one prompt stay in one fold, so nothing is learnt from a copy. Each fold is predicted by a model of the
    other four: standardised by their root mean squares, at the penalty that predicts them best when each is left out
    in turn. Accuracy is the share of pairs with a margin above 0 (0 counts half), AUC that of all margins and their
    negatives; intervals are robust to what pairs of one prompt and models of different folds share.

    Args:
        counted: habits of both sides.
        concepts: (n_pairs, K) disparity u of the SAE's concepts, where there is an SAE.
        seed: of the folds, and of the pairs that are drawn where there are too many to fit.

    Returns:
        JSON-able. `verdict`; `pairs` and `prompts` that were fitted, and whether they were `drawn`; `sources`: per
        source its `features`, held-out `accuracy`, `auc` (each with `_low` and `_high`), `log_likelihood` (nats a
        pair), `verdict`, and what it `adds` to the accuracy of another (`to`); `carried_by`: as the function of that
        name. With fewer than 20 prompts the lists are empty.
    """
    found: dict[str, Any] = {"verdict": TOO_FEW, "pairs": len(counted.groups), "sources": [], "carried_by": []}
    found["prompts"] = len(np.unique(counted.groups))
    if found["prompts"] < MIN_PROMPTS:
        return found
    names = list(counted.habits)
    n_columns = len(names) + (0 if concepts is None else concepts.shape[1])
    rows = drawn_rows(counted.groups, min(MOST_PAIRS, MOST_VALUES // max(1, n_columns)), seed)
    groups = counted.groups[rows]
    gaps = Counted(counted.values[:, rows], counted.habits, groups).gaps()
    folds = fold_of(groups, seed)
    matrices = {LENGTH: gaps[:, [names.index(next(name for name in LENGTHS if name in names))]], HABITS: gaps}
    if concepts is not None and concepts.shape[1]:
        matrices[CONCEPTS] = np.asarray(concepts[rows], dtype=np.float64)
        matrices[ALL] = np.concatenate([gaps, matrices[CONCEPTS]], axis=1)
    correct: dict[str, np.ndarray] = {}
    for source, matrix in matrices.items():
        margins = held_out_margins(matrix, folds)
        correct[source] = right(margins)
        entry = {"source": source, "features": matrix.shape[1], **scores(margins, groups)}
        if (before := {HABITS: LENGTH, ALL: HABITS}.get(source)) is not None:
            entry |= {"to": before, **_interval("adds", correct[source] - correct[before], groups)}
        found["sources"].append(entry)
    beyond = any(entry["verdict"] == TOLD for entry in found["sources"])
    found["verdict"], found["drawn"] = TOLD if beyond else CHANCE, len(rows) < found["pairs"]
    found["pairs"], found["prompts"] = len(rows), len(np.unique(groups))
    if beyond:
        found["carried_by"] = carried_by(gaps, list(counted.habits.values()), groups, folds)
    return found


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


def scores(margins: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Accuracy, AUC with their 95 % intervals, and mean log-likelihood of held-out margins."""
    rate, low, high = stats.rate_interval(right(margins), groups=groups)
    low, high = max(0.0, rate - WIDER * (rate - low)), min(1.0, rate + WIDER * (high - rate))
    # Of m and −m: the share of (i, j) with m_i > −m_j. Each pair counts as i and as j, hence twice the error.
    negative = np.sort(-margins)
    below = (np.searchsorted(negative, margins, "left") + np.searchsorted(negative, margins, "right")) / 2
    (auc,), (error,), _ = stats.mean_test(below[:, None] / len(margins), groups)
    half = 2 * WIDER * error * distributions.t.ppf(0.975, len(np.unique(groups)) - 1)
    return {
        "accuracy": float(rate),
        "accuracy_low": low,
        "accuracy_high": high,
        "auc": float(auc),
        "auc_low": float(max(0.0, auc - half)),
        "auc_high": float(min(1.0, auc + half)),
        "log_likelihood": float(log_sigmoid(margins).mean()),
        "verdict": TOLD if low > 0.5 else CHANCE,
    }


def carried_by(
    gaps: np.ndarray, habits: Sequence[Habit], groups: np.ndarray, folds: np.ndarray
) -> list[dict[str, Any]]:
    """The fewest habits that together tell the choice: forward selection by held-out log-likelihood.

    A habit comes in if it adds 0.001 nats to the likelihood of a held-out pair, and if the score test on what those
    above leave finds it at 5 % over all candidates (robust to shared prompts). Habits that vary with it (|correlation|
    over both directions of all pairs above 0.5) are folded under it.

    Args:
        gaps: (n, n_habits) of `Counted.gaps`.

    Returns:
        At most six rows, the one that adds most first: `habit`; `with_it`, the names folded under it; `favours`, the
        side; `odds` of being chosen for a response that has it where the other has not (`step` "one side has it"), or
        has twice as much, or a tenth more of a share, all other rows equal; `accuracy` of it with those above;
        `adds`, the same less that of those above, with interval; `log_likelihood` that it adds, nats a pair.
    """
    moments = gaps.T @ gaps
    size = np.sqrt(np.diag(moments))
    with np.errstate(invalid="ignore", divide="ignore"):
        related = np.nan_to_num(np.abs(moments / np.outer(size, size))) > FOLDED
    candidates = np.flatnonzero(size > 0).tolist()
    least = distributions.norm.isf(0.05 / 2 / max(1, len(candidates)))
    kept: list[int] = []
    rows: list[dict[str, Any]] = []
    margins = np.zeros(len(gaps))
    while candidates and len(kept) < N_CARRIED:
        mean, error, _ = stats.mean_test((1 - np.exp(log_sigmoid(margins)))[:, None] * gaps[:, candidates], groups)
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.where(error > stats.ROUNDING, np.abs(mean) / error, np.where(mean != 0, np.inf, 0.0))
        tried = [candidates[i] for i in np.argsort(-z, kind="stable")[:N_TRIED] if z[i] > least]
        by_habit = {k: _margins_of(gaps[:, [*kept, k]], folds) for k in tried}  # costly: of the most promising only
        gain = {k: float((log_sigmoid(new) - log_sigmoid(margins)).mean()) for k, new in by_habit.items()}
        best = max(gain, key=gain.__getitem__, default=-1)
        if best < 0 or gain[best] < LEAST_GAIN:
            break
        new = by_habit[best]
        together = [k for k in candidates if k != best and related[best, k]]
        rows.append(
            {
                "habit": habits[best].name,
                "with_it": [habits[k].name for k in sorted(together, key=lambda k: -abs(moments[best, k]) / size[k])],
                **_interval("accuracy", right(new), groups),
                **_interval("adds", right(new) - right(margins), groups),
                "log_likelihood": gain[best],
            }
        )
        kept.append(best)
        candidates = [k for k in candidates if k != best and k not in together]
        margins = new
    if kept:
        for row, k, weight in zip(rows, kept, fit_path(gaps[:, kept], [LIGHT])[0], strict=True):
            step, size_of_step = _step(habits[k])
            row |= {
                "favours": "chosen" if weight > 0 else "rejected",
                "odds": float(np.exp(min(50.0, weight * size_of_step))),
                "step": step,
            }
    return rows


def _margins_of(gaps: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) held-out margins at the light penalty."""
    margins = np.zeros(len(gaps))
    for fold in range(FOLDS):
        margins[folds == fold] = gaps[folds == fold] @ fit_path(gaps[folds != fold], [LIGHT])[0]
    return margins


def _interval(name: str, values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Mean of held-out values with its 95 % t interval over prompts."""
    (mean,), (error,), _ = stats.mean_test(values[:, None], groups)
    half = WIDER * error * distributions.t.ppf(0.975, len(np.unique(groups)) - 1)
    return {name: float(mean), f"{name}_low": float(mean - half), f"{name}_high": float(mean + half)}


def _is_share(habit: Habit) -> bool:
    return habit.kind == "rate" or habit.unit == "share"


def _step(habit: Habit) -> tuple[str, float]:
    """The difference that odds are given for, and its size in `Counted.gaps`."""
    if habit.kind == "rate":
        return "one side has it", 1.0
    return ("a tenth more", 0.1) if _is_share(habit) else ("twice as much", float(np.log(2)))
