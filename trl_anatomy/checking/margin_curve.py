"""Extrapolate reward margins: the margin at the end of a training, and the distance along a path that reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.05  # of the margin aimed at: the error of the margin itself is larger
MAX_EVALUATIONS = 6


@dataclass(frozen=True)
class Expected:
    """The reward margin that a training is expected to end with.

    Attributes:
        margin, low, high: mean over held-out pairs, with a 95 % interval.
        pull: c of the curve, per unit of learning rate.
        known: whether the interval of the pull leaves out zero and below; else how far training goes is not known.
    """

    margin: float
    low: float
    high: float
    pull: float
    known: bool


@dataclass(frozen=True)
class Reached:
    """Where a path reaches a margin.

    Attributes:
        alpha: how far to go, in units of the pilot's own way.
        margin: there, as measured.
        slope: of the margin there, per unit of alpha.
        capped: the margin aimed at is not met up to the cap; alpha is where the margin is largest of those measured.
    """

    alpha: float
    margin: float
    slope: float
    capped: bool


def margin_after(pull: float | np.ndarray, s: float | np.ndarray, *, logistic: bool = True) -> np.ndarray:
    """Margin after steps whose learning rates sum to `s`, from zero.

    The logistic loss pulls a margin m by σ(−m), so dm/ds = c·σ(−m), whose solution is m + e^m = c·s + 1. Without
    `logistic` the pull does not fall: m = c·s/2, the same at the start.

    Args:
        pull: c.
        s: sum of learning rates; broadcasts with `pull`.

    Returns:
        The margin, float64, in the shape of both.
    """
    y = np.asarray(pull, dtype=np.float64) * np.asarray(s, dtype=np.float64) + 1.0
    if not logistic:
        return (y - 1.0) / 2.0
    # m + e^m is convex and rises: Newton's method from above comes down to the root.
    m = np.where(y > 1.0, np.log(np.maximum(y, 1.0)), y)
    for _ in range(100):
        step = (m + np.exp(m) - y) / (1.0 + np.exp(m))
        m = m - step
        if np.all(np.abs(step) <= 1e-14 * np.maximum(1.0, np.abs(m))):
            break
    return m


def expected_margin(
    s: Sequence[float],
    margins: Sequence[float],
    n_pairs: Sequence[int],
    spread: float,
    s_end: float,
    *,
    logistic: bool = True,
) -> Expected:
    """Fit the curve of `margin_after` to the margins of a pilot, and follow it to the end of the training.

    Weighted least squares with one parameter, the pull; the error of each mean is `spread` over the root of its pairs.

    Args:
        s: sum of learning rates before each measurement.
        margins: mean margin of pairs that had not been trained on by then.
        n_pairs: pairs that each is the mean of.
        spread: standard deviation of the margin of a pair.
        s_end: sum of all learning rates of the training.
        logistic: as in `margin_after`.
    """
    from scipy.optimize import least_squares

    at, seen, n = (np.asarray(values, dtype=np.float64) for values in (s, margins, n_pairs))
    start = np.sum(n * at * 2 * seen) / np.sum(n * at**2)
    scale = 1.0 / float(at.max())  # so that the parameter is of the size of a margin
    fit = least_squares(
        lambda c: np.sqrt(n) * (margin_after(c[0] * scale, at, logistic=logistic) - seen), [start / scale]
    )
    pull = float(fit.x[0]) * scale
    curve = margin_after(pull, at, logistic=logistic)
    slope = at / (1.0 + np.exp(curve)) if logistic else at / 2.0
    error = spread / float(np.sqrt(np.sum(n * slope**2)))
    ends = margin_after(np.array([pull, pull - 1.96 * error, pull + 1.96 * error]), s_end, logistic=logistic)
    margin, low, high = map(float, ends)
    return Expected(margin, low, high, pull=pull, known=bool(pull - 1.96 * error > 0))


def alpha_for_margin(margin_at: Callable[[float], float], target: float, cap: float, *, at_one: float) -> Reached:
    """Find how far along a straight path the mean margin is `target`.

    The margin is taken to rise along the path, which starts at margin 0. Linear interpolation in a shrinking bracket
    from 0 to `cap`, until the margin is within `TOLERANCE` of the target, `MAX_EVALUATIONS` times at most.

    Args:
        margin_at: alpha -> mean margin on held-out pairs.
        target: the margin wanted, above 0.
        cap: the largest alpha allowed.
        at_one: the margin at alpha 1, above 0.

    Returns:
        The point nearest to the target of those that were measured.
    """
    points = {0.0: 0.0, 1.0: at_one}
    if cap < 1.0:
        points[cap] = margin_at(cap)
    while len(points) < 2 + MAX_EVALUATIONS:
        if min(abs(margin - target) for margin in points.values()) <= TOLERANCE * target:
            break
        low = max((a for a, margin in points.items() if margin <= target and a < cap), default=0.0)
        above = [a for a, margin in points.items() if margin > target and a > low]
        if above:
            high = min(above)
            share = (target - points[low]) / (points[high] - points[low])
            guess = low + float(np.clip(share, 0.05, 0.95)) * (high - low)
        else:
            slope = points[low] / low if low else at_one
            guess = min(cap, max(low + (target - points[low]) / slope, low * 1.1)) if slope > 0 else cap
        if guess in points:
            break
        points[guess] = margin_at(guess)
        if guess == cap and points[cap] <= target:
            while points[guess] < max(points.values()) and len(points) < 2 + MAX_EVALUATIONS:
                # It has been higher on the way: halve towards where it was.
                best = max(points, key=lambda a: points[a])
                guess = (best + min(a for a in points if a > best)) / 2
                points[guess] = margin_at(guess)
            break
    alpha = min((a for a in points if 0 < a <= cap), key=lambda a: abs(points[a] - target))
    others = sorted((a for a in points if a != alpha), key=lambda a: abs(a - alpha))
    slope = (points[alpha] - points[others[0]]) / (alpha - others[0])
    if slope <= 0:
        slope = points[alpha] / alpha
    capped = cap in points and max(points.values()) < (1 - TOLERANCE) * target
    return Reached(alpha, points[alpha], slope, capped=bool(capped))
