"""How well scores tell two classes apart, with bootstrap intervals; plain functions on arrays."""

from typing import Any

import numpy as np

_RESAMPLES_AT_ONCE = 100


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative, ties counting half.

    Args:
        scores: (n,).
        labels: (n,) bool, both values present.

    >>> roc_auc(np.array([0.0, 1.0, 2.0]), np.array([False, True, True]))
    1.0
    """
    from scipy.stats import rankdata

    wanted = np.asarray(labels, bool)
    n_positive = int(wanted.sum())
    above = rankdata(scores)[wanted].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * (len(wanted) - n_positive)))


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The score from which calling an example positive gives the best F1 (the highest such score among equals)."""
    cuts, above_positive, above_negative = _cumulative(scores, labels, np.ones((1, len(scores))))
    f1 = 2 * above_positive / (above_positive + above_negative + np.asarray(labels, bool).sum())
    return float(cuts[int(np.argmax(f1[0]))])


def detector_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    *,
    groups: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """F1 at a threshold, ROC-AUC and PR-AUC (average precision), each with a 95 % percentile bootstrap interval.

    Args:
        scores: (n,).
        labels: (n,) bool, both values present.
        threshold: positive from this score on; chosen on other examples, or F1 flatters.
        groups: (n,) integers; examples of one group are drawn together. None: each by itself.
        resamples: of the bootstrap; resamples without both labels are left out.
        seed: of the bootstrap.

    Returns:
        ``n``, ``n_positive``, ``threshold``, and ``f1``, ``roc_auc``, ``pr_auc``, each with ``_low`` and ``_high``.
    """
    wanted = np.asarray(labels, bool)
    scores = np.asarray(scores, np.float64)
    _, group = np.unique(np.arange(len(wanted)) if groups is None else groups, return_inverse=True)
    n_groups = int(group.max()) + 1
    point = _figures(scores, wanted, threshold, np.ones((1, len(wanted))))
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        n_now = min(_RESAMPLES_AT_ONCE, resamples - start)
        counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_now)
        drawn.append(_figures(scores, wanted, threshold, counts[:, group].astype(np.float64)))
    out: dict[str, Any] = {"n": len(wanted), "n_positive": int(wanted.sum()), "threshold": float(threshold)}
    for name, value in point.items():
        values = np.concatenate([part[name] for part in drawn])
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
        out |= {name: float(value[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return out


def _cumulative(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores falling, and the weight (n_resamples, n_cuts) of positives and of negatives from each on up."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ordered, wanted = np.asarray(scores)[order], np.asarray(labels, bool)[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    held = weights[:, order]
    return ordered[ends], np.cumsum(held * wanted, axis=1)[:, ends], np.cumsum(held * ~wanted, axis=1)[:, ends]


def _figures(scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (n_resamples,); NaN where a resample has one label only."""
    _, positives, negatives = _cumulative(scores, labels, weights)
    called = weights * (scores >= threshold)
    hits = (called * labels).sum(axis=1)
    n_positive, n_negative = positives[:, -1:], negatives[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.concatenate([np.zeros_like(n_positive), positives / n_positive], axis=1)
        false = np.concatenate([np.zeros_like(n_negative), negatives / n_negative], axis=1)
        precision = np.nan_to_num(positives / (positives + negatives))
        area = (np.diff(false) * (recall[:, 1:] + recall[:, :-1]) / 2).sum(axis=1)
        average = (np.diff(recall) * precision).sum(axis=1)
        f1 = 2 * hits / (called.sum(axis=1) + n_positive[:, 0])
        one_label = (n_positive[:, 0] == 0) | (n_negative[:, 0] == 0)
    found = {"f1": f1, "roc_auc": area, "pr_auc": average}
    return {name: np.where(one_label, np.nan, value) for name, value in found.items()}
