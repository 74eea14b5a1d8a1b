"""Welch statistics, split halves, false discovery rate, intervals: plain functions on arrays, in float64.

Nothing here knows models, datasets or files. A missing answer (an empty group, a single member, no variance) is NaN,
never a silent zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy import stats as distributions

# A variance below this share of the mean square is rounding left over from sum-of-squares minus squared sum.
ROUNDING = 1e-12
# Columns that are copied at a time.
BLOCK = 64


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of columns within groups.

    Attributes:
        n: (n_groups,) members.
        total: (n_groups, n_columns) sums.
        square: (n_groups, n_columns) sums of squares.
    """

    n: np.ndarray
    total: np.ndarray
    square: np.ndarray

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.total - other.total, self.square - other.square)

    @property
    def mean(self) -> np.ndarray:
        """(n_groups, n_columns); NaN for an empty group."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.n[:, None] > 0, self.total / self.n[:, None], np.nan)

    @property
    def variance(self) -> np.ndarray:
        """(n_groups, n_columns), Bessel-corrected; NaN below two members, exactly 0 where only rounding is left."""
        n = self.n[:, None].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = self.square - self.total**2 / n
            spread = np.where(spread <= ROUNDING * np.maximum(self.square, n * ROUNDING), 0.0, spread)
            return np.where(n > 1, spread / (n - 1), np.nan)


def group_moments(values: np.ndarray, groups: np.ndarray, n_groups: int, centre: np.ndarray | float = 0.0) -> Moments:
    """Sums and sums of squares of `values - centre` within groups, by sparse products over blocks of columns.

    Args:
        values: (n, n_columns).
        groups: (n,) group of each row, 0..n_groups-1; rows of a negative group are left out.
        centre: (n_columns,) taken off first: it keeps the later subtraction of squares accurate.
    """
    rows = np.flatnonzero(groups >= 0)
    return Moments(
        n=np.bincount(groups[rows], minlength=n_groups).astype(np.float64),
        total=_group_sums(values, groups, n_groups, centre, lambda x: x),
        square=_group_sums(values, groups, n_groups, centre, np.square),
    )


def _group_sums(
    values: np.ndarray,
    groups: np.ndarray,
    n_groups: int,
    centre: np.ndarray | float,
    of: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """(n_groups, n_columns): sums within groups of a function of the centred values."""
    rows = np.flatnonzero(groups >= 0)
    one_hot = sparse.csr_array((np.ones(len(rows)), (groups[rows], rows)), shape=(n_groups, len(values)))
    n_columns = values.shape[1]
    centre = np.broadcast_to(centre, n_columns)
    sums = np.empty((n_groups, n_columns))
    for start in range(0, n_columns, BLOCK):
        block = slice(start, start + BLOCK)
        sums[:, block] = one_hot @ of(values[:, block].astype(np.float64) - centre[block])
    return sums


@dataclass(frozen=True)
class Welch:
    """Comparison of every group with the rest, for every column; each array is (n_groups, n_columns).

    delta = mean inside - mean outside; z = delta / standard error; d = Cohen's d with pooled variance;
    p two-sided from Student's t with Welch-Satterthwaite degrees of freedom `df`; ci_low..ci_high at 95 %.
    NaN where a side has fewer than two members or neither side varies.
    """

    delta: np.ndarray
    z: np.ndarray
    d: np.ndarray
    df: np.ndarray
    p: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    n_in: np.ndarray
    n_out: np.ndarray


def welch(inside: Moments, outside: Moments, level: float = 0.95) -> Welch:
    """Welch's unequal-variance comparison from sufficient statistics (METHOD section 4, step 3).

    `delta` needs one member a side; everything else needs two members a side and some variance: a context that
    shows no variance inside or outside can not be tested, so its p is NaN rather than 0.
    """
    n_in, n_out = inside.n[:, None], outside.n[:, None]
    delta = inside.mean - outside.mean
    var_in, var_out = inside.variance, outside.variance
    with np.errstate(invalid="ignore", divide="ignore"):
        share_in, share_out = var_in / n_in, var_out / n_out
        error = np.sqrt(share_in + share_out)
        error = np.where(error > 0, error, np.nan)
        z = delta / error
        df = (share_in + share_out) ** 2 / (share_in**2 / (n_in - 1) + share_out**2 / (n_out - 1))
        pooled = ((n_in - 1) * var_in + (n_out - 1) * var_out) / (n_in + n_out - 2)
        d = delta / np.where(pooled > 0, np.sqrt(pooled), np.nan)
    df = np.where(np.isnan(error), np.nan, df)
    p = 2 * distributions.t.sf(np.abs(z), df)
    half = distributions.t.ppf(0.5 + level / 2, df) * error
    return Welch(delta, z, d, df, p, delta - half, delta + half, inside.n, outside.n)


@dataclass(frozen=True)
class SplitHalf:
    """The effect in two halves of the rows; each array is (n_groups, n_columns).

    delta_min = min(|delta_a|, |delta_b|); consistent where both exceed `epsilon` in size and agree in sign.
    """

    delta_a: np.ndarray
    delta_b: np.ndarray
    delta_min: np.ndarray
    consistent: np.ndarray


def compare_groups(
    values: np.ndarray, groups: np.ndarray, n_groups: int, parity: np.ndarray, epsilon: float = 1e-6
) -> tuple[Welch, SplitHalf]:
    """Every group against the rest, for every column, with split halves, in two passes over the data.

    Args:
        values: (n, n_columns).
        groups: (n,) 0..n_groups-1; rows of a negative group belong to neither side.
        parity: (n,) 0 or 1: the half each row belongs to.
        epsilon: an effect of this size or less counts as none in a half.
    Source: METHOD section 4, steps 3 and 4.
    """
    centre = _mean_of_used(values, groups)
    halves = [group_moments(values, np.where(parity == half, groups, -1), n_groups, centre) for half in (0, 1)]
    inside = Moments(*(getattr(halves[0], name) + getattr(halves[1], name) for name in ("n", "total", "square")))

    def rest(part: Moments) -> Moments:
        return Moments(*(getattr(part, name).sum(axis=0, keepdims=True) for name in ("n", "total", "square"))) - part

    delta_a, delta_b = (half.mean - rest(half).mean for half in halves)
    with np.errstate(invalid="ignore"):
        consistent = (np.abs(delta_a) > epsilon) & (np.abs(delta_b) > epsilon) & (delta_a * delta_b > 0)
    split = SplitHalf(delta_a, delta_b, np.minimum(np.abs(delta_a), np.abs(delta_b)), consistent)
    return welch(inside, rest(inside)), split


def _mean_of_used(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n_columns,) mean over the rows that belong to a group; zeros if none does."""
    used = (groups >= 0).astype(np.float64)
    return used @ values / max(1.0, used.sum())


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of all p-values together; NaN stays NaN and does not count as a test. Same shape as `p`."""
    p = np.asarray(p, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = distributions.false_discovery_control(p[tested])
    return q


def mean_test(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and two-sided one-sample t-test of a zero mean, per column.

    Args:
        values: (n, n_columns).
    Returns:
        mean, error, p: each (n_columns,). error and p are NaN below two rows; p is NaN where nothing varies.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        empty = np.full(values.shape[1], np.nan)
        return (values[0] if n else empty), empty, empty
    mean = values.mean(axis=0)
    error = np.sqrt(np.square(values - mean).sum(axis=0) / (n - 1) / n)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(error > ROUNDING, mean / error, np.nan)
    return mean, error, 2 * distributions.t.sf(np.abs(t), n - 1)


def bootstrap_mean(
    values: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    max_units: int = 20_000,
    chunk_bytes: int = 64 << 20,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the column means, resampling rows (pairs).

    Above `max_units` rows, rows are first put at random into `max_units` cells of (almost) equal size and cells are
    resampled: the variance estimated is the same, the work stays bounded.

    Args:
        values: (n, n_columns).
        chunk_bytes: bound on the matrix of resampling counts held at a time.
    Returns:
        low, high: each (n_columns,); NaN without rows.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        empty = np.full(values.shape[1], np.nan)
        return empty, empty
    rng = np.random.default_rng(seed)
    size = np.ones(n)
    if n > max_units:
        cell = rng.permutation(n) % max_units
        one_hot = sparse.csr_array((size, (cell, np.arange(n))), shape=(max_units, n))
        values, size = one_hot @ values, np.bincount(cell, minlength=max_units).astype(np.float64)
    units = len(values)
    means = np.empty((n_resamples, values.shape[1]))
    step = max(1, chunk_bytes // (8 * units))
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        counts = np.stack(
            [np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(start, stop)]
        ).astype(np.float64)
        means[start:stop] = (counts @ values) / (counts @ size)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def length_adjusted_mean(
    values: np.ndarray, log_ratio: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each column that is left when chosen and rejected are equally long.

    The intercept of a least-squares line of the column on log(length chosen / length rejected), with a t interval
    from heteroscedasticity-consistent errors (White's sandwich with the n/(n-2) correction, "HC1").

    Args:
        values: (n, n_columns).
        log_ratio: (n,).
    Returns:
        intercept, low, high: each (n_columns,). If every ratio is 1 this is the plain mean; if every ratio is the
        same other number, or there are fewer than three rows, NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    x = np.asarray(log_ratio, dtype=np.float64)
    n = len(values)
    missing = np.full(values.shape[1], np.nan)
    if n < 3:
        return missing, missing, missing
    constant = np.ptp(x) <= ROUNDING
    if constant and np.abs(x).max() > ROUNDING:
        return missing, missing, missing
    design = np.ones((n, 1)) if constant else np.column_stack([np.ones(n), x])
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ (design.T @ values)
    residual = values - design @ coefficients
    # The intercept is a weighted sum of the rows, so its sandwich variance is the weighted sum of squared residuals.
    influence = design @ inverse[0]
    df = n - design.shape[1]
    error = np.sqrt(np.square(influence) @ np.square(residual) * n / df)
    half = distributions.t.ppf(0.5 + level / 2, df) * error
    return coefficients[0], coefficients[0] - half, coefficients[0] + half


def adjusted_difference(values: np.ndarray, covariate: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Difference between each group and the rest at equal covariate (analysis of covariance).

    The coefficient of "inside" in the least-squares fit of each column on (1, inside, covariate), from sums.

    Args:
        values: (n, n_columns); covariate: (n,); groups: (n,), a negative group belongs to neither side.
    Returns:
        (n_groups, n_columns); NaN where a side is empty. Where the covariate never varies within the sides, the plain
        difference if its means agree, else NaN.
    """
    x = np.asarray(covariate, dtype=np.float64)[:, None]
    x = x - _mean_of_used(x, groups)
    centre = _mean_of_used(values, groups)
    first = group_moments(values, groups, n_groups, centre)
    second = group_moments(x, groups, n_groups)
    cross = _group_sums(values, groups, n_groups, centre, lambda y: y * x)
    within_xy, within_xx = np.zeros_like(cross), np.zeros((n_groups, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        for n, sum_y, sum_x, sum_xy, sum_xx in (
            (first.n, first.total, second.total, cross, second.square),
            (first.n.sum() - first.n, *(t.sum(0) - t for t in (first.total, second.total, cross, second.square))),
        ):
            within_xy += sum_xy - sum_x * sum_y / n[:, None]
            within_xx += sum_xx - sum_x**2 / n[:, None]
        rest_n = (first.n.sum() - first.n)[:, None]
        gap_x = second.mean - (second.total.sum(0) - second.total) / rest_n
        delta = first.mean - (first.total.sum(0) - first.total) / rest_n
        varies = within_xx > ROUNDING * np.maximum(second.square.sum(), ROUNDING)
        slope = np.where(varies, within_xy / np.where(varies, within_xx, 1.0), 0.0)
        result = delta - slope * gap_x
    return np.where(varies | (np.abs(gap_x) <= ROUNDING) | np.isnan(delta), result, np.nan)
