"""Welch statistics, split halves, false discovery rate, intervals: plain functions on arrays, in float64.

Nothing here knows models, datasets or files. A missing answer (an empty group, a single member, no variance) is NaN,
never a silent zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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

    def __getitem__(self, groups: slice) -> "Moments":
        return Moments(self.n[groups], self.total[groups], self.square[groups])

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.total + other.total, self.square + other.square)

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


def one_hot(groups: np.ndarray, n_groups: int) -> sparse.csr_array:
    """(n_groups, n) membership matrix of ones; rows of a negative group are in none."""
    rows = np.flatnonzero(groups >= 0)
    return sparse.csr_array((np.ones(len(rows)), (groups[rows], rows)), shape=(n_groups, len(groups)))


def member_moments(values: np.ndarray, members: sparse.csr_array, centre: np.ndarray | float = 0.0) -> Moments:
    """Sums and sums of squares of `values - centre` over the members of each group, by sparse products.

    Args:
        values: (n, n_columns), taken in blocks of columns.
        members: (n_groups, n) of ones and zeros; groups may overlap.
        centre: (n_columns,) taken off first: it keeps the later subtraction of squares accurate.
    """
    total, square = _sums(values, members, centre, np.positive, np.square)
    return Moments(members.sum(axis=1).astype(np.float64), total, square)


def member_means(values: np.ndarray, members: sparse.csr_array) -> np.ndarray:
    """(n_groups, n_columns) mean of `values` over the members of each group; NaN for an empty group."""
    (total,) = _sums(values, members, 0.0, np.positive)
    return Moments(members.sum(axis=1).astype(np.float64), total, total).mean


def _sums(
    values: np.ndarray, members: sparse.csr_array, centre: np.ndarray | float, *of: Callable[..., np.ndarray]
) -> tuple[np.ndarray, ...]:
    """(n_groups, n_columns) for each of `of`: sums over members of that function of the centred values.

    A function is called as `function(block, out=buffer)`: two buffers serve all blocks.
    """
    n, n_columns = values.shape
    centre = np.broadcast_to(centre, n_columns)
    sums = tuple(np.empty((members.shape[0], n_columns)) for _ in of)
    buffers = np.empty((2, n * min(BLOCK, n_columns)))
    for start in range(0, n_columns, BLOCK):
        block = slice(start, min(start + BLOCK, n_columns))
        # Row by row, as the sparse product wants them.
        centred, result = (buffer[: n * (block.stop - start)].reshape(n, -1) for buffer in buffers)
        np.subtract(values[:, block], centre[block], out=centred)
        for total, function in zip(sums, of, strict=True):
            total[:, block] = members @ function(centred, out=result)
    return sums


@dataclass(frozen=True)
class Welch:
    """Comparison of every group with the rest, for every column; each array is (n_groups, n_columns).

    delta = mean inside - mean outside; z = delta / Welch's standard error; d = Cohen's d with pooled variance;
    p two-sided from Student's t of delta / `error` with `df` degrees of freedom; ci_low..ci_high at 95 %. `error` and
    `df` are Welch's (with Satterthwaite's degrees of freedom) unless `no_surer_than_a_draw` changed them.
    NaN where a side has fewer than two members; where neither side varies, `error` is 0 and the others are NaN.
    """

    delta: np.ndarray
    error: np.ndarray
    z: np.ndarray
    d: np.ndarray
    df: np.ndarray
    p: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    n_in: np.ndarray
    n_out: np.ndarray


def welch(inside: Moments, outside: Moments, level: float = 0.95) -> Welch:
    """Welch's unequal-variance comparison from sufficient statistics (method.md section 4, step 3).

    `delta` needs one member a side; everything else needs two members a side and some variance: a context that
    shows no variance inside or outside can not be tested, so its p is NaN rather than 0.
    """
    n_in, n_out = inside.n[:, None], outside.n[:, None]
    delta = inside.mean - outside.mean
    var_in, var_out = inside.variance, outside.variance
    with np.errstate(invalid="ignore", divide="ignore"):
        share_in, share_out = var_in / n_in, var_out / n_out
        error = np.sqrt(share_in + share_out)
        df = (share_in + share_out) ** 2 / (share_in**2 / (n_in - 1) + share_out**2 / (n_out - 1))
        pooled = ((n_in - 1) * var_in + (n_out - 1) * var_out) / (n_in + n_out - 2)
        d = delta / np.where(pooled > 0, np.sqrt(pooled), np.nan)
    return _tested(delta, error, d, df, inside.n, outside.n, level)


def _tested(
    delta: np.ndarray,
    error: np.ndarray,
    d: np.ndarray,
    df: np.ndarray,
    n_in: np.ndarray,
    n_out: np.ndarray,
    level: float = 0.95,
) -> Welch:
    known = np.where(error > 0, error, np.nan)
    z = delta / known
    p = 2 * distributions.t.sf(np.abs(z), df)
    half = distributions.t.ppf(0.5 + level / 2, df) * known
    return Welch(delta, error, z, d, df, p, delta - half, delta + half, n_in, n_out)


def no_surer_than_a_draw(found: Welch, values: np.ndarray, pool: np.ndarray, groups: np.ndarray | None = None) -> Welch:
    """The comparison with errors that are never below those of a context drawn from the pool at random.

    A concept that fires in few pairs may happen to be silent in all pairs of a small context. Welch's error sees no
    variance there and calls the silence sure; with rare concepts contexts drawn at random are then "found" in most
    audits. And where neither side varies it has no answer, though a concept that is in every pair of a context and in
    no other is the surest there can be. If n_in of the N rows of the pool were drawn at random, the difference of the
    means would have exactly the variance S²·(1/n_in + 1/n_out), S² the variance over the pool. Where the draw errs on
    the other side (a few firing pairs fall together), Welch's error is the larger one. For concepts that vary alike
    inside and outside both agree.

    Args:
        found: what `compare_members` or `welch_of_groups` says of the same values and pool.
        values: (n, n_columns).
        pool: (n,) bool.
        groups: (n,) group of each row (prompt of a pair), added up before squaring; default every row its own.
    Returns:
        As `found`, z unchanged; error, df, p and interval of the larger error.
    Source: method.md section 4, step 3.
    """
    rows = np.flatnonzero(pool)
    within = _within(None if groups is None else groups[rows], len(rows))
    n_groups, centre = within.shape[0], _mean_of_pool(values, pool)
    spread = np.empty(values.shape[1])
    for start in range(0, values.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        spread[block] = np.square(within @ (values[rows, block].astype(np.float64) - centre[block])).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = spread / len(rows) * n_groups / (n_groups - 1)
        draw = np.sqrt(variance * (1 / found.n_in[:, None] + 1 / found.n_out[:, None]))
    wider = draw > found.error
    df = np.where(wider, np.maximum(n_groups - 2.0, 1.0), found.df)
    tested = _tested(found.delta, np.where(wider, draw, found.error), found.d, df, found.n_in, found.n_out)
    return replace(tested, z=found.z)


def _welch_error(inside: Moments, outside: Moments) -> np.ndarray:
    """(n_groups, n_columns) standard error of the difference of means; NaN where it is unknown."""
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(inside.variance / inside.n[:, None] + outside.variance / outside.n[:, None])
        return np.where(error > 0, error, np.nan)


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
    """`compare_members` of groups that do not overlap, against all other rows that belong to a group.

    Args:
        groups: (n,) 0..n_groups-1; rows of a negative group belong to neither side.
    """
    return compare_members(values, one_hot(groups, n_groups), groups >= 0, parity, epsilon)


def compare_members(
    values: np.ndarray, members: sparse.csr_array, pool: np.ndarray, parity: np.ndarray, epsilon: float = 1e-6
) -> tuple[Welch, SplitHalf]:
    """Every group against the rest of the pool, for every column, with split halves, in one pass over the data.

    Args:
        values: (n, n_columns).
        members: (n_groups, n) of ones and zeros, within the pool; groups may overlap.
        pool: (n,) bool; other rows belong to neither side.
        parity: (n,) 0 or 1: the half each row belongs to.
        epsilon: an effect of this size or less counts as none in a half.
    Source: method.md section 4, steps 3 and 4; section 5.
    """
    centre = _mean_of_pool(values, pool)
    with_all = sparse.csr_array(sparse.vstack([members, sparse.csr_array(pool[None].astype(np.float64))]))
    halves = [sparse.csr_array(with_all.multiply((parity == half)[None])) for half in (0, 1)]
    both = member_moments(values, sparse.csr_array(sparse.vstack(halves)), centre)
    inside, outside = [], []
    for moments in (both[: with_all.shape[0]], both[with_all.shape[0] :]):
        inside.append(moments[:-1])
        outside.append(moments[-1:] - moments[:-1])
    delta_a, delta_b = (a.mean - b.mean for a, b in zip(inside, outside, strict=True))
    with np.errstate(invalid="ignore"):
        consistent = (np.abs(delta_a) > epsilon) & (np.abs(delta_b) > epsilon) & (delta_a * delta_b > 0)
    split = SplitHalf(delta_a, delta_b, np.minimum(np.abs(delta_a), np.abs(delta_b)), consistent)
    return welch(inside[0] + inside[1], outside[0] + outside[1]), split


def welch_of_groups(
    plain: Welch, values: np.ndarray, members: sparse.csr_array, pool: np.ndarray, groups: np.ndarray
) -> Welch:
    """The same comparison where rows of one group (pairs of one prompt) may depend on each other.

    The standard error is cluster-robust: a group's deviations from the mean of its side are added up before they are
    squared, with the G/(G-1) correction a side; a group on both sides brings in a covariance. Degrees of freedom as
    Welch-Satterthwaite, from numbers of groups. Where every row is a group of its own, this is Welch's comparison.

    Args:
        plain: what `compare_members` says of the same values, members and pool.
        groups: (n,) group of each row, any integers.
    Returns:
        As `plain`, with other z, df, p and interval; NaN where a side has fewer than two groups or nothing varies.
    """
    rows = np.flatnonzero(pool)
    _, index = np.unique(groups[rows], return_inverse=True)
    size = np.bincount(index).astype(np.float64)
    within = one_hot(index, len(size))
    contexts = []
    for inside in _lists(members[:, rows]):
        touched, of = np.unique(index[inside], return_inverse=True)
        contexts.append((inside, touched, one_hot(of, len(touched))))
    centre = _mean_of_pool(values, pool)
    error, df = np.full_like(plain.delta, np.nan), np.full_like(plain.delta, np.nan)
    for start in range(0, values.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        u = values[rows, block].astype(np.float64) - centre[block]
        total = within @ u
        square, cross, count = np.square(total).sum(axis=0), size @ total, np.square(size).sum()
        overall = total.sum(axis=0)
        for k, (inside, touched, part) in enumerate(contexts):
            n_in, n_out = len(inside), len(rows) - len(inside)
            n_part = part.sum(axis=1)
            g_in, g_out = len(touched), len(size) - int((n_part == size[touched]).sum())
            if g_in < 2 or g_out < 2:
                continue
            of_part = part @ u[inside]
            mean_in, mean_out = of_part.sum(axis=0) / n_in, (overall - of_part.sum(axis=0)) / n_out
            dev_in = of_part - np.outer(n_part, mean_in)
            dev_out = total[touched] - of_part - np.outer(size[touched] - n_part, mean_out)
            # All groups as if they were outside, less those that are touched, plus what these have outside.
            spread_out = square - 2 * mean_out * cross + mean_out**2 * count
            spread_out -= np.square(total[touched] - np.outer(size[touched], mean_out)).sum(axis=0)
            spread_out += np.square(dev_out).sum(axis=0)
            spread_in = np.square(dev_in).sum(axis=0)
            spread_in[spread_in <= ROUNDING * np.maximum(np.square(of_part).sum(axis=0), n_in * ROUNDING)] = 0.0
            spread_out[spread_out <= ROUNDING * np.maximum(square, n_out * ROUNDING)] = 0.0
            share_in = spread_in / n_in**2 * g_in / (g_in - 1)
            share_out = spread_out / n_out**2 * g_out / (g_out - 1)
            variance = share_in + share_out - 2 * (dev_in * dev_out).sum(axis=0) / (n_in * n_out)
            varies = share_in + share_out > 0
            good = (variance > 0) & varies
            with np.errstate(invalid="ignore", divide="ignore"):
                error[k, block] = np.where(good, np.sqrt(variance), np.where(varies, np.nan, 0.0))
                freedom = (share_in + share_out) ** 2 / (share_in**2 / (g_in - 1) + share_out**2 / (g_out - 1))
                df[k, block] = np.where(good, freedom, np.nan)
    return _tested(plain.delta, error, plain.d, df, plain.n_in, plain.n_out)


def _lists(members: sparse.csr_array) -> list[np.ndarray]:
    """The members of each group."""
    return np.split(members.indices, members.indptr[1:-1])[: members.shape[0]]


def _mean_of_pool(values: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """(n_columns,) mean over the rows of the pool; zeros if it is empty."""
    used = pool.astype(np.float64)
    return used @ values / max(1.0, used.sum())


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of all p-values together; NaN stays NaN and does not count as a test. Same shape as `p`."""
    p = np.asarray(p, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = distributions.false_discovery_control(p[tested])
    return q


def holm(p: np.ndarray) -> np.ndarray:
    """Family-wise p-values of all tests together (Holm 1979); NaN stays NaN and does not count. Same shape as `p`."""
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p, axis=None, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    steps = p.flat[order] * np.arange(len(order), 0, -1)
    adjusted.flat[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def group_sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n_groups, n_columns): sums of the rows of each group, in the order of their numbers."""
    return np.asarray(_within(groups, len(values)) @ values)


def mean_test(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and two-sided one-sample t-test of a zero mean, per column.

    Rows of one group may depend on each other: the error is the cluster-robust one (Liang and Zeger 1986, with the
    G/(G-1) correction, G groups, t with G-1 degrees of freedom). Where every row is a group of its own, this is the
    plain t-test.

    Args:
        values: (n, n_columns).
        groups: (n,) group of each row, any integers; default every row its own.
    Returns:
        mean, error, p: each (n_columns,). error and p are NaN below two groups. Where nothing varies, p is that of the
        exact test that swaps the sides of whole groups, 2^(1 - G), and NaN for a mean of zero.
    """
    n, empty = len(values), np.full(values.shape[1], np.nan)
    if n == 0:
        return empty, empty, empty
    within = _within(groups, n)
    n_groups = within.shape[0]

    def of(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = block.mean(axis=0)
        return mean, np.square(within @ (block - mean)).sum(axis=0)

    mean, square = in_blocks(values, of)
    if n_groups < 2:
        return mean, empty, empty
    error = np.sqrt(square * n_groups / (n_groups - 1)) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(error > ROUNDING, mean / error, np.nan)
    swapped = np.where(np.abs(mean) > ROUNDING, np.exp2(1.0 - n_groups), np.nan)
    return mean, error, np.where(error > ROUNDING, 2 * distributions.t.sf(np.abs(t), n_groups - 1), swapped)


def rate_interval(
    hits: np.ndarray, confidence: float = 0.95, *, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Rate with its Wilson score interval.

    Args:
        hits: bool, shape (n,).
        confidence: coverage of the interval.
        groups: (n,) prompt of each response: several responses to one prompt tell less than as many prompts. They
            count as what would vary as much by itself (Korn and Graubard 1998: n over the design effect), and as one a
            prompt where all or none of them are hits. Default: every response its own.

    Returns:
        (rate, low, high); (nan, nan, nan) where `hits` is empty.
    """
    n = float(len(hits))
    if n == 0:
        return float("nan"), float("nan"), float("nan")
    rate = float(hits.mean())
    if groups is not None and (n_groups := len(np.unique(groups))) < n:
        _, (error,), _ = mean_test(np.asarray(hits, dtype=np.float64)[:, None], groups)
        n = min(n, rate * (1 - rate) / error**2) if error > 0 else float(n_groups)
    z = distributions.norm.ppf(0.5 + confidence / 2)
    middle, half = rate + z**2 / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return rate, float(max(0.0, low)) if rate > 0 else 0.0, float(min(1.0, high)) if rate < 1 else 1.0


def in_blocks(values: np.ndarray, of: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """`of` of (n, some columns) in float64, a block at a time; its results put together along their last axis."""
    starts = range(0, max(1, values.shape[1]), BLOCK)
    parts = [of(np.asarray(values[:, start : start + BLOCK], dtype=np.float64)) for start in starts]
    return tuple(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))


def _within(groups: np.ndarray | None, n: int) -> sparse.csr_array:
    """(n_groups, n): sums over the rows of each group; the identity without groups."""
    if groups is None:
        return sparse.csr_array(sparse.eye_array(n, format="csr"))
    _, index = np.unique(groups, return_inverse=True)
    return one_hot(index, int(index.max(initial=-1)) + 1)


def bootstrap_mean(
    values: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    max_units: int = 20_000,
    chunk_bytes: int = 64 << 20,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the column means, resampling rows (pairs), or groups of rows together.

    Above `max_units` groups, groups are first put at random into `max_units` cells of (almost) equally many and cells
    are resampled: the variance estimated is the same, the work stays bounded.

    Args:
        values: (n, n_columns).
        groups: (n,) group of each row, any integers; default every row its own.
        chunk_bytes: bound on the matrix of resampling counts held at a time.
    Returns:
        low, high: each (n_columns,); NaN without rows.
    """
    n = len(values)
    if n == 0:
        empty = np.full(values.shape[1], np.nan)
        return empty, empty
    rng = np.random.default_rng(seed)
    units = _within(groups, n)
    if units.shape[0] > max_units:
        units = one_hot(rng.permutation(units.shape[0]) % max_units, max_units) @ units
    size = units.sum(axis=1)
    (values,) = in_blocks(values, lambda block: (units @ block,))
    n_units = len(values)
    means = np.empty((n_resamples, values.shape[1]))
    step = max(1, chunk_bytes // (8 * n_units))
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        counts = np.stack(
            [np.bincount(rng.integers(0, n_units, n_units), minlength=n_units) for _ in range(start, stop)]
        ).astype(np.float64)
        means[start:stop] = (counts @ values) / (counts @ size)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def random_signs(n: int, n_permutations: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Blocks (at most `step`, n) of independent signs, +1 or -1; the stream does not depend on `step`."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_permutations, step):
        yield np.where(rng.random((min(step, n_permutations - start), n)) < 0.5, 1.0, -1.0)


def swapped_mean_p(
    values: np.ndarray,
    n_permutations: int,
    seed: int = 0,
    chunk_bytes: int = 64 << 20,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Permutation p-value of each column's mean: chosen and rejected swapped at random in every pair.

    A swap turns the sign of the pair's row. If the labels are arbitrary, the data as they are and the data after any
    swaps are equally likely, so the test is exact, whatever the distribution.

    Args:
        values: (n, n_columns), chosen minus rejected.
        chunk_bytes: bound on the signs held at a time.
        groups: (n,) group of each row, any integers: rows of one group are swapped together; default every row its own.
    Returns:
        (n_columns,) two-sided: (1 + swaps with a mean at least as large) / (1 + n_permutations); NaN without rows or
        where no pair differs.
    """
    if groups is not None:
        within = _within(groups, len(values))
        (values,) = in_blocks(values, lambda block: (within @ block,))
    values = np.asarray(values, dtype=np.float64)
    observed = np.abs(values.sum(axis=0))
    count = np.zeros(values.shape[1])
    slack, differ = in_blocks(values, lambda block: (_slack(np.abs(block).sum(axis=0)), (block != 0).any(axis=0)))
    for signs in random_signs(len(values), n_permutations, seed, max(1, chunk_bytes // (8 * max(1, len(values))))):
        count += (np.abs(signs @ values) >= observed - slack).sum(axis=0)
    return np.where(differ, (1 + count) / (1 + n_permutations), np.nan)


def swapped_best_z(
    values: np.ndarray,
    members: sparse.csr_array,
    pool: np.ndarray,
    n_permutations: int,
    seed: int = 0,
    chunk_bytes: int = 64 << 20,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """The largest |Welch z| over all groups and columns, for each random swap of chosen and rejected.

    The share of swaps whose largest |z| reaches that of a cell is the cell's family-wise p-value (Westfall and Young
    1993, single step): the chance that any cell at all would look as good if the labels were arbitrary.

    Args:
        values: (n, n_columns), chosen minus rejected; members, pool: as in `compare_members`; all groups count.
        chunk_bytes: bound on the signs and on each array of z held at a time.
        groups: (n,) group of each row, any integers: rows of one group are swapped together; default every row its own.
    Returns:
        (n_permutations,); 0 where no cell can be tested.
    """
    rows = np.flatnonzero(pool)
    of = None if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    values = np.asarray(values, dtype=np.float64)
    values = values if pool.all() else values[rows]
    inside = _lists(members[:, rows])
    shape = (len(inside), values.shape[1])
    if not all(shape):
        return np.zeros(n_permutations)
    n = np.array([len(part) for part in inside], dtype=np.float64)
    square = np.stack([np.square(values[part]).sum(axis=0) for part in inside])
    every = Moments(
        np.full(shape[0], float(len(rows))), np.zeros(shape), np.tile(np.square(values).sum(axis=0), (shape[0], 1))
    )
    best = []
    step = max(1, chunk_bytes // (8 * max(len(rows), shape[0] * shape[1])))
    n_signs = len(rows) if of is None else int(of.max(initial=-1)) + 1
    for drawn in random_signs(n_signs, n_permutations, seed, step):
        signs = drawn if of is None else drawn[:, of]
        totals = np.stack([signs[:, part] @ values[part] for part in inside], axis=1)
        for total, overall in zip(totals, signs @ values, strict=True):
            part = Moments(n, total, square)
            rest = Moments(every.n, np.tile(overall, (shape[0], 1)), every.square) - part
            z = (part.mean - rest.mean) / _welch_error(part, rest)
            best.append(np.nanmax(np.abs(z), initial=0.0))
    return np.array(best)


def family_wise_p(z: np.ndarray, best: np.ndarray) -> np.ndarray:
    """(1 + swaps whose `best` reaches |z|) / (1 + swaps), for each z; NaN stays NaN. Same shape as `z`."""
    least = np.sort(best)
    size = np.abs(z)
    reached = len(best) - np.searchsorted(least, size - _slack(size), side="left")
    return np.where(np.isnan(z), np.nan, (1 + reached) / (1 + len(best)))


def _slack(size: np.ndarray) -> np.ndarray:
    """Rounding of a sum of this size: equal results summed in another order count as equal."""
    return 1e-9 * np.nan_to_num(size)


def length_adjusted_mean(
    values: np.ndarray,
    log_ratio: np.ndarray,
    level: float = 0.95,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each column that is left when chosen and rejected are equally long.

    The intercept of a least-squares line of the column on log(length chosen / length rejected), with a t interval
    from cluster-robust errors (sandwich over groups, with the G/(G-1) · (n-1)/(n-2) correction, "CR1"; copies count as
    one in n). Where every row is a group of its own, these are White's heteroscedasticity-consistent errors ("HC1").

    Args:
        values: (n, n_columns).
        log_ratio: (n,).
        groups: (n,) group of each row, any integers; default every row its own.
        copies: (n,) the same number for rows that are copies, which are in one group; default none are.
    Returns:
        intercept, low, high: each (n_columns,). If every ratio is 1 this is the plain mean; if every ratio is the
        same other number, or there are fewer than three groups, NaN.
    """
    x = np.asarray(log_ratio, dtype=np.float64)
    n = len(values)
    missing = np.full(values.shape[1], np.nan)
    within = _within(groups, n)
    n_groups = within.shape[0]
    if n_groups < 3:
        return missing, missing, missing
    constant = np.ptp(x) <= ROUNDING
    if constant and np.abs(x).max() > ROUNDING:
        return missing, missing, missing
    design = np.ones((n, 1)) if constant else np.column_stack([np.ones(n), x])
    inverse = np.linalg.inv(design.T @ design)
    share = (design @ inverse[0])[:, None]

    def of(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coefficients = inverse @ (design.T @ block)
        # The intercept is a weighted sum of the rows: its sandwich variance is the sum of squares of groups' shares.
        influence = within @ ((block - design @ coefficients) * share)
        return coefficients[0], np.square(influence).sum(axis=0)

    intercept, square = in_blocks(values, of)
    n_fitted = design.shape[1]
    n_told = n if copies is None else len(np.unique(copies))
    correction = n_groups / (n_groups - 1) * (n_told - 1) / (n_told - n_fitted)
    half = distributions.t.ppf(0.5 + level / 2, n_groups - n_fitted) * np.sqrt(square * correction)
    return intercept, intercept - half, intercept + half


def adjusted_difference(
    values: np.ndarray, covariate: np.ndarray, members: sparse.csr_array, pool: np.ndarray
) -> np.ndarray:
    """Difference between each group and the rest of the pool at equal covariate (analysis of covariance).

    The coefficient of "inside" in the least-squares fit of each column on (1, inside, covariate), from sums.

    Args:
        values: (n, n_columns); covariate: (n,); members, pool: as in `compare_members`.
    Returns:
        (n_groups, n_columns); NaN where a side is empty. Where the covariate never varies within the sides, the plain
        difference if its means agree, else NaN.
    """
    x = np.asarray(covariate, dtype=np.float64)[:, None]
    x = x - _mean_of_pool(x, pool)
    centre = _mean_of_pool(values, pool)
    with_all = sparse.csr_array(sparse.vstack([members, sparse.csr_array(pool[None].astype(np.float64))]))
    total, cross = _sums(values, with_all, centre, np.positive, lambda y, out: np.multiply(y, x, out=out))
    second = member_moments(x, with_all)
    first = Moments(second.n, total, np.full_like(total, np.nan))
    inside = first[:-1], second[:-1], cross[:-1]
    outside = first[-1:] - first[:-1], second[-1:] - second[:-1], cross[-1:] - cross[:-1]
    within_xy, within_xx = np.zeros_like(inside[2]), np.zeros((members.shape[0], 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        for of_y, of_x, sum_xy in (inside, outside):
            within_xy += sum_xy - of_x.total * of_y.total / of_y.n[:, None]
            within_xx += of_x.square - of_x.total**2 / of_y.n[:, None]
        gap_x = inside[1].mean - outside[1].mean
        delta = inside[0].mean - outside[0].mean
        varies = within_xx > ROUNDING * np.maximum(second.square[-1:], ROUNDING)
        slope = np.where(varies, within_xy / np.where(varies, within_xx, 1.0), 0.0)
        result = delta - slope * gap_x
    return np.where(varies | (np.abs(gap_x) <= ROUNDING) | np.isnan(delta), result, np.nan)


def partial_effect(
    values: np.ndarray, inside: np.ndarray, others: np.ndarray, groups: np.ndarray
) -> tuple[float, float]:
    """What a column adds to a least-squares fit on others, and its two-sided p.

    The coefficient of `inside` in the fit of `values` on (1, inside, others), with cluster-robust errors (sandwich over
    groups, "CR1") and t with as many degrees of freedom as there are groups more than columns.

    Args:
        values, inside: (n,); others: (n, n_others).
        groups: (n,) group of each row, any integers.
    Returns:
        coefficient, p; (nan, 1.0) where the others leave nothing of `inside`, or there are too few groups.
    """
    centred = others - others.mean(axis=0)
    strength, axes = np.linalg.eigh(centred.T @ centred)
    used = strength > 1e-9 * max(1.0, float(strength.max(initial=0.0)))
    design = centred @ (axes[:, used] / np.sqrt(strength[used]))
    own, left = (column - column.mean() - design @ (design.T @ column) for column in (inside, values))
    square = float(own @ own)
    within = _within(groups, len(values))
    n, n_groups, n_fitted = len(values), within.shape[0], design.shape[1] + 2
    if square <= 1e-9 * max(1.0, float(inside @ inside)) or n_groups <= n_fitted:
        return float("nan"), 1.0
    coefficient = float(own @ left) / square
    scores = within @ (own * (left - coefficient * own))
    correction = n_groups / (n_groups - 1) * (n - 1) / (n - n_fitted)
    error = np.sqrt(correction * float(scores @ scores)) / square
    if not error > ROUNDING:
        return coefficient, 0.0 if abs(coefficient) > ROUNDING else 1.0
    return coefficient, float(2 * distributions.t.sf(abs(coefficient) / error, n_groups - n_fitted))


def row_halves(rows: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """(n,) 0 or 1: the half of each row, by parity of its number; groups go whole, in turn by first appearance.

    Args:
        rows: (n,) numbers in the raw dataset.
        groups: (n,) group of each row (prompt of a pair), any integers; default every row its own.
    """
    if groups is None:
        return rows % 2
    _, first, of = np.unique(groups, return_index=True, return_inverse=True)
    turn = np.empty(len(first), dtype=np.int64)
    turn[np.argsort(first)] = np.arange(len(first))
    return turn[of] % 2


def half_masks(groups: np.ndarray, n_splits: int, seed: int = 0) -> np.ndarray:
    """Random halves of the groups, several times: (n_splits, n) bool, True in the first half.

    Args:
        groups: (n,) group of each row (prompt of a response); rows of one group stay together.
    """
    _, of = np.unique(groups, return_inverse=True)
    n_groups, rng = int(of.max(initial=-1)) + 1, np.random.default_rng(seed)
    masks = np.zeros((n_splits, len(of)), dtype=bool)
    for mask in masks:
        mask[:] = (rng.permutation(n_groups) < n_groups // 2)[of]
    return masks


def stepped_up(first: np.ndarray, second: np.ndarray) -> float | None:
    """Reliability of the mean of two halves, by Spearman and Brown from their correlation; in [0, 1].

    None below three values or where a half does not vary.
    """
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    r = float(np.corrcoef(first, second)[0, 1])
    return max(0.0, 2 * r / (1 + r)) if r > -1 else 0.0


def split_half_reliability(u: np.ndarray, seed: int, groups: np.ndarray | None = None) -> float | None:
    """R² that a perfect prediction would reach: reliability of the mean over rows, from random halves of the prompts.

    The correlation over concepts of the two halves' shifts, stepped up by Spearman-Brown; the median of 50 splits.

    Args:
        u: (n, K) disparity.
        groups: (n,) prompt of each row, which stays in one half; default every row its own.

    Returns:
        In [0, 1], or None below four prompts or three concepts.
    """
    groups = np.arange(len(u)) if groups is None else groups
    if len(np.unique(groups)) < 4:
        return None
    masks = half_masks(groups, 50, seed)
    halves = [mask.astype(np.float64) @ u / mask.sum(axis=1)[:, None] for mask in (masks, ~masks)]
    found = [stepped for pair in zip(*halves, strict=True) if (stepped := stepped_up(*pair)) is not None]
    return float(np.median(found)) if found else None
