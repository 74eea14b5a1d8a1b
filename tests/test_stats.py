"""Statistics against scipy and closed forms, one cell at a time, in float64."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import sparse
from scipy import stats as reference

from trl_anatomy.audit import stats

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def sample():
    """Columns with ties, groups of 0, 1, 2 and many members, a constant column, rows outside the pool."""
    rng = np.random.default_rng(0)
    n = 300
    values = np.column_stack(
        [
            rng.integers(-3, 4, n) / 3,
            rng.normal(5, 1e-3, n),
            np.zeros(n),
            rng.choice([-1.0, 0.0, 1.0], n, p=[0.02, 0.95, 0.03]),
        ]
    )
    groups = rng.integers(4, 9, n)
    groups[:30] = -1  # silent
    groups[30] = 1  # one member; group 0 stays empty
    groups[31:33] = 2
    groups[33:40] = 3
    values[33:40, 0] = 1 / 3  # no variance inside
    return values, groups, 9, rng.integers(0, 2, n)


def test_welch_equals_scipy_for_every_cell(sample):
    values, groups, n_groups, parity = sample
    welch, _ = stats.compare_groups(values, groups, n_groups, parity)
    checked = 0
    for g in range(n_groups):
        for column in range(values.shape[1]):
            inside = values[groups == g, column]
            outside = values[(groups != g) & (groups >= 0), column]
            assert welch.n_in[g] == len(inside)
            assert welch.n_out[g] == len(outside)
            if len(inside) < 2 or (np.ptp(inside) == 0 and np.ptp(outside) == 0):
                assert np.isnan(welch.p[g, column])
                assert np.isnan(welch.z[g, column])
                continue
            test = reference.ttest_ind(inside, outside, equal_var=False)
            interval = test.confidence_interval(0.95)
            np.testing.assert_allclose(welch.delta[g, column], inside.mean() - outside.mean(), **TOLERANCE)
            np.testing.assert_allclose(welch.z[g, column], test.statistic, **TOLERANCE)
            np.testing.assert_allclose(welch.df[g, column], test.df, rtol=1e-8)
            np.testing.assert_allclose(welch.p[g, column], test.pvalue, **TOLERANCE)
            np.testing.assert_allclose(welch.ci_low[g, column], interval.low, **TOLERANCE)
            np.testing.assert_allclose(welch.ci_high[g, column], interval.high, **TOLERANCE)
            a, b = len(inside), len(outside)
            pooled = ((a - 1) * inside.var(ddof=1) + (b - 1) * outside.var(ddof=1)) / (a + b - 2)
            np.testing.assert_allclose(
                welch.d[g, column], (inside.mean() - outside.mean()) / np.sqrt(pooled), **TOLERANCE
            )
            checked += 1
    assert checked >= 20


def test_split_halves_equal_a_loop(sample):
    values, groups, n_groups, parity = sample
    _, split = stats.compare_groups(values, groups, n_groups, parity)
    for g in range(n_groups):
        for column in range(values.shape[1]):
            deltas = []
            for half in (0, 1):
                inside = values[(groups == g) & (parity == half), column]
                outside = values[(groups != g) & (groups >= 0) & (parity == half), column]
                deltas.append(inside.mean() - outside.mean() if len(inside) and len(outside) else np.nan)
            np.testing.assert_allclose(
                [split.delta_a[g, column], split.delta_b[g, column]], deltas, rtol=1e-9, atol=1e-12
            )
            agree = min(abs(deltas[0]), abs(deltas[1])) > 1e-6 and deltas[0] * deltas[1] > 0
            assert split.consistent[g, column] == agree
            if not np.isnan(deltas).any():
                assert split.delta_min[g, column] == pytest.approx(min(map(abs, deltas)), abs=1e-12)


def test_overlapping_groups_equal_a_loop():
    """Groups that share members, one empty, one of a single member, one that is the whole pool; ties everywhere."""
    rng = np.random.default_rng(11)
    n = 250
    values = np.column_stack([rng.integers(-2, 3, n) / 4, rng.normal(0, 1, n) * (rng.random(n) < 0.1)])
    parity, x, pool = rng.integers(0, 2, n), rng.normal(size=n), rng.random(n) < 0.9
    inside = rng.random((6, n)) < np.array([0.5, 0.3, 0.1, 0.0, 0.0, 1.0])[:, None]
    inside &= pool
    inside[4, np.flatnonzero(pool)[0]] = True
    members = sparse.csr_array(inside.astype(float))
    welch, split = stats.compare_members(values, members, pool, parity)
    adjusted = stats.adjusted_difference(values, x, members, pool)
    for g in range(6):
        outside = pool & ~inside[g]
        for column in range(2):
            a, b = values[inside[g], column], values[outside, column]
            assert (welch.n_in[g], welch.n_out[g]) == (len(a), len(b))
            if len(a) < 2 or len(b) < 2:
                assert np.isnan(welch.p[g, column])
                continue
            test = reference.ttest_ind(a, b, equal_var=False)
            np.testing.assert_allclose([welch.z[g, column], welch.p[g, column]], test, **TOLERANCE)
            pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
            np.testing.assert_allclose(welch.d[g, column], (a.mean() - b.mean()) / np.sqrt(pooled), **TOLERANCE)
            for half, delta in enumerate((split.delta_a, split.delta_b)):
                means = [values[side & (parity == half), column].mean() for side in (inside[g], outside)]
                np.testing.assert_allclose(delta[g, column], means[0] - means[1], **TOLERANCE)
            design = np.column_stack([np.ones(pool.sum()), inside[g][pool], x[pool]])
            solution = np.linalg.lstsq(design, values[pool, column], rcond=None)[0]
            np.testing.assert_allclose(adjusted[g, column], solution[1], **TOLERANCE)


def test_a_single_context_has_no_outside():
    welch, split = stats.compare_groups(np.eye(4), np.zeros(4, int), 1, np.arange(4) % 2)
    assert np.isnan(welch.delta).all()
    assert np.isnan(welch.p).all()
    assert not split.consistent.any()


def test_benjamini_hochberg_leaves_out_what_was_not_tested():
    p = np.array([[0.01, np.nan], [0.02, 0.5]])
    q = stats.benjamini_hochberg(p)
    assert np.isnan(q[0, 1])
    # by hand: sorted .01 .02 .5 times 3/rank -> .03 .03 .5
    np.testing.assert_allclose(q[[0, 1, 1], [0, 0, 1]], [0.03, 0.03, 0.5])
    assert np.isnan(stats.benjamini_hochberg(np.array([np.nan]))).all()


def test_false_discoveries_are_controlled_on_null_data():
    """Shuffled labels: the published split-half filter passes about half of all cells, q-values hardly any."""
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], (2000, 40), p=[0.1, 0.8, 0.1])
    welch, split = stats.compare_groups(values, rng.integers(0, 20, 2000), 20, np.arange(2000) % 2)
    assert 0.4 < split.consistent.mean() < 0.6
    assert (stats.benjamini_hochberg(welch.p) < 0.05).mean() < 0.005


def test_mean_test_equals_scipy(sample):
    values = sample[0]
    mean, error, p = stats.mean_test(values)
    test = reference.ttest_1samp(values[:, [0, 1, 3]], 0)
    np.testing.assert_allclose(p[[0, 1, 3]], test.pvalue, **TOLERANCE)
    np.testing.assert_allclose(error, reference.sem(values), **TOLERANCE)
    np.testing.assert_allclose(mean, values.mean(0), **TOLERANCE)
    assert np.isnan(p[2])
    assert np.isnan(stats.mean_test(values[:1])[2]).all()


@pytest.mark.parametrize("n", [2, 6, 60])
def test_a_mean_of_values_that_are_all_the_same_is_told_by_swaps(n):
    """What every pair says alike is the surest of all, and Student's t has no answer: the exact test of swaps has."""
    values = np.column_stack([np.ones(n), np.full(n, -0.1), np.zeros(n)])
    _, error, p = stats.mean_test(values)
    np.testing.assert_allclose(error, 0, atol=1e-15)
    assert np.isnan(p[2])
    np.testing.assert_allclose(p[:2], 2.0 ** (1 - n))
    if n == 6:
        signs = np.array(list(product([1, -1], repeat=n)))
        as_large = np.abs(signs @ values[:, 1]) >= abs(values[:, 1].sum()) - 1e-12
        assert p[1] == pytest.approx(as_large.mean())
    pairs = np.arange(2 * n) // 2  # two pairs of a prompt, which together say the same in each
    np.testing.assert_allclose(stats.mean_test(np.tile([[1.0], [0.0]], (n, 1)), pairs)[2], 2.0 ** (1 - n))


def test_bootstrap_is_seeded_chunk_free_and_agrees_with_the_normal_interval():
    rng = np.random.default_rng(2)
    values = rng.choice([-1.0, 0.0, 1.0], (2000, 3), p=[0.2, 0.5, 0.3])
    low, high = stats.bootstrap_mean(values, 2000, seed=3)
    again = stats.bootstrap_mean(values, 2000, seed=3, chunk_bytes=8 * 2000 * 7)
    np.testing.assert_allclose([low, high], again, rtol=0, atol=1e-15)
    half = 1.96 * reference.sem(values)
    np.testing.assert_allclose(low, values.mean(0) - half, atol=0.15 * half.max())
    np.testing.assert_allclose(high, values.mean(0) + half, atol=0.15 * half.max())
    assert not np.array_equal(low, stats.bootstrap_mean(values, 2000, seed=4)[0])


def test_bootstrap_of_many_rows_by_cells_keeps_the_width():
    values = np.random.default_rng(5).normal(1, 2, (5003, 2))
    low, high = stats.bootstrap_mean(values, 3000, seed=0, max_units=600)
    half = 1.96 * reference.sem(values)
    np.testing.assert_allclose((high - low) / 2, half, rtol=0.12)
    np.testing.assert_allclose((high + low) / 2, values.mean(0), atol=0.2 * half.max())
    assert np.isnan(stats.bootstrap_mean(np.zeros((0, 2)))[0]).all()


def test_length_adjusted_mean_equals_least_squares_with_a_sandwich():
    rng = np.random.default_rng(6)
    x = rng.normal(0.3, 0.5, 400)
    values = np.column_stack([0.2 + 0.5 * x + rng.normal(0, 0.1, 400), rng.choice([0.0, 1.0], 400) * (1 + x**2)])
    intercept, low, high = stats.length_adjusted_mean(values, x)
    design = np.column_stack([np.ones(400), x])
    for column in range(2):
        y = values[:, column]
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        residual = y - design @ solution
        bread = np.linalg.inv(design.T @ design)
        covariance = bread @ (design.T * residual**2 @ design) @ bread * 400 / 398
        half = reference.t.ppf(0.975, 398) * np.sqrt(covariance[0, 0])
        np.testing.assert_allclose(intercept[column], solution[0], **TOLERANCE)
        np.testing.assert_allclose([low[column], high[column]], [solution[0] - half, solution[0] + half], **TOLERANCE)


def test_length_adjustment_removes_an_effect_that_is_only_length():
    rng = np.random.default_rng(7)
    x = rng.normal(0.5, 0.4, 3000)
    intercept, low, high = stats.length_adjusted_mean((x + rng.normal(0, 0.3, 3000))[:, None], x)
    assert low[0] < 0 < high[0]
    assert abs(intercept[0]) < 0.03


def test_length_adjustment_without_any_length_difference():
    values = np.random.default_rng(8).normal(size=(50, 2))
    intercept, low, high = stats.length_adjusted_mean(values, np.zeros(50))
    half = reference.t.ppf(0.975, 49) * values.std(0, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(intercept, values.mean(0), **TOLERANCE)
    np.testing.assert_allclose((high - low) / 2, half, **TOLERANCE)
    assert np.isnan(stats.length_adjusted_mean(values, np.full(50, 0.7))[0]).all()
    assert np.isnan(stats.length_adjusted_mean(values[:2], np.zeros(2))[0]).all()


def test_adjusted_difference_equals_least_squares(sample):
    values, groups, n_groups, _ = sample
    x = np.random.default_rng(9).normal(size=len(values)) + 0.3 * groups
    pool, members = groups >= 0, stats.one_hot(groups, n_groups)
    adjusted = stats.adjusted_difference(values, x, members, pool)
    for g in range(n_groups):
        if not (groups == g).any():
            assert np.isnan(adjusted[g]).all()
            continue
        design = np.column_stack([np.ones(pool.sum()), groups[pool] == g, x[pool]])
        solution = np.linalg.lstsq(design, values[pool], rcond=None)[0]
        np.testing.assert_allclose(adjusted[g], solution[1], **TOLERANCE)
    plain = stats.compare_groups(values, groups, n_groups, np.zeros(len(values)))[0].delta
    np.testing.assert_allclose(stats.adjusted_difference(values, np.zeros(len(values)), members, pool), plain)


def all_signs(n):
    return np.array(list(product([1.0, -1.0], repeat=n)))


def test_swapped_mean_equals_full_enumeration():
    """Over all 2^10 swaps the share is known; many random ones come close, and none is below 1 / (1 + swaps)."""
    rng = np.random.default_rng(12)
    values = np.column_stack([rng.normal(0.6, 1, 10), rng.choice([-1.0, 0.0, 1.0], 10), np.ones(10), np.zeros(10)])
    exact = (np.abs(all_signs(10) @ values) >= np.abs(values.sum(0)) - 1e-9).mean(0)
    found = stats.swapped_mean_p(values, 20_000, seed=1)
    np.testing.assert_allclose(found[:3], exact[:3], atol=4 * np.sqrt(0.25 / 20_000))
    assert np.isnan(found[3])
    np.testing.assert_array_equal(found, stats.swapped_mean_p(values, 20_000, seed=1, chunk_bytes=8 * 10 * 7))
    assert stats.swapped_mean_p(np.ones((60, 1)), 99, seed=0) == pytest.approx(0.01)


def test_best_z_of_swaps_equals_a_loop(sample):
    values, groups, n_groups, _ = sample
    members, pool = stats.one_hot(groups, n_groups), groups >= 0
    best = stats.swapped_best_z(values, members, pool, 25, seed=2)
    again = stats.swapped_best_z(values, members, pool, 25, seed=2, chunk_bytes=1)
    np.testing.assert_allclose(best, again, **TOLERANCE)
    [signs] = stats.random_signs(int(pool.sum()), 25, 2, 25)
    for swap, sign in enumerate(signs):
        swapped = values.copy()
        swapped[pool] *= sign[:, None]
        z = stats.compare_members(swapped, members, pool, np.zeros(len(values)))[0].z
        np.testing.assert_allclose(best[swap], np.nanmax(np.abs(z)), rtol=1e-6)
    assert (stats.swapped_best_z(values, members[:0], pool, 5) == 0).all()


def test_family_wise_p_counts_the_swaps_that_do_as_well():
    best = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(stats.family_wise_p(np.array([0.5, -2.0, 3.5, 9.0]), best), [1, 0.8, 0.4, 0.2])
    assert np.isnan(stats.family_wise_p(np.array([np.nan]), best)).all()


@pytest.fixture
def clustered():
    """Groups of 1 to 5 rows that share most of their value; group ids are arbitrary and unsorted."""
    rng = np.random.default_rng(13)
    groups = np.repeat(rng.choice(10**9, 120, replace=False), rng.integers(1, 6, 120))
    _, index = np.unique(groups, return_inverse=True)
    shared = rng.normal(0.3, 1, (120, 2))[index]
    values = shared + rng.normal(0, 0.2, shared.shape)
    order = rng.permutation(len(groups))
    return values[order], groups[order], rng.normal(0.2, 0.4, len(groups))[order]


def test_cluster_robust_mean_equals_a_loop(clustered):
    values, groups, _ = clustered
    mean, error, p = stats.mean_test(values, groups)
    n, names = len(values), np.unique(groups)
    meat = np.zeros(2)
    for group in names:
        meat += (values[groups == group] - values.mean(0)).sum(0) ** 2
    expected = np.sqrt(meat * len(names) / (len(names) - 1)) / n
    np.testing.assert_allclose(error, expected, **TOLERANCE)
    np.testing.assert_allclose(mean, values.mean(0), **TOLERANCE)
    np.testing.assert_allclose(p, 2 * reference.t.sf(np.abs(mean / expected), len(names) - 1), **TOLERANCE)
    plain = stats.mean_test(values)[1]
    assert (error > 1.4 * plain).all()  # rows of a group tell almost the same
    np.testing.assert_allclose(stats.mean_test(values, np.arange(n))[1], plain, **TOLERANCE)
    assert np.isnan(stats.mean_test(values, np.zeros(n, int))[2]).all()


def test_cluster_bootstrap_equals_resampling_whole_groups(clustered):
    """The same draws, made by hand: groups with all their rows; then its width against the cluster-robust error."""
    values, groups, _ = clustered
    low, high = stats.bootstrap_mean(values, 400, seed=3, groups=groups)
    names, rng, means = np.unique(groups), np.random.default_rng(3), []
    for _ in range(400):
        drawn = rng.integers(0, len(names), len(names))
        means.append(np.concatenate([values[groups == names[g]] for g in drawn]).mean(0))
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0), **TOLERANCE)
    low, high = stats.bootstrap_mean(values, 4000, seed=3, groups=groups)
    np.testing.assert_allclose((high - low) / 2, 1.98 * stats.mean_test(values, groups)[1], rtol=0.08)
    cells = stats.bootstrap_mean(values, 4000, seed=3, groups=groups, max_units=60)
    np.testing.assert_allclose(cells[1] - cells[0], high - low, rtol=0.3)
    alone = stats.bootstrap_mean(values, 300, seed=3, groups=np.arange(len(values)))
    np.testing.assert_allclose(alone, stats.bootstrap_mean(values, 300, seed=3), rtol=0, atol=1e-12)


def test_length_adjusted_mean_with_groups_equals_a_clustered_sandwich(clustered):
    values, groups, x = clustered
    intercept, low, high = stats.length_adjusted_mean(values, x, groups=groups)
    n, names = len(x), np.unique(groups)
    design = np.column_stack([np.ones(n), x])
    bread = np.linalg.inv(design.T @ design)
    for column in range(2):
        solution = np.linalg.lstsq(design, values[:, column], rcond=None)[0]
        residual = values[:, column] - design @ solution
        scores = np.stack([design[groups == g].T @ residual[groups == g] for g in names])
        correction = len(names) / (len(names) - 1) * (n - 1) / (n - 2)
        error = np.sqrt((bread @ scores.T @ scores @ bread)[0, 0] * correction)
        half = reference.t.ppf(0.975, len(names) - 2) * error
        np.testing.assert_allclose([intercept[column], low[column]], [solution[0], solution[0] - half], **TOLERANCE)
        np.testing.assert_allclose(high[column], solution[0] + half, **TOLERANCE)


@pytest.mark.parametrize("cut", [False, True], ids=["whole groups", "groups on both sides"])
def test_comparison_of_groups_equals_an_explicit_sandwich(clustered, cut):
    """Least squares on (1, inside) written out, with the correction a side; contexts overlap."""
    values, groups, _ = clustered
    values = np.column_stack([values, np.zeros(len(values)), values[:, 0] > 1.2])
    rng = np.random.default_rng(14)
    pool = rng.random(len(values)) < 0.95
    by_group = dict(zip(np.unique(groups), rng.random((120, 4)).tolist(), strict=True))
    chance = rng.random((4, len(values))) if cut else np.array([by_group[g] for g in groups]).T
    inside = (chance < np.array([[0.5], [0.3], [0.05], [0.0]])) & pool
    members = sparse.csr_array(inside.astype(float))
    plain, _ = stats.compare_members(values, members, pool, np.zeros(len(values)))
    found = stats.welch_of_groups(plain, values, members, pool, groups)
    for k in range(3):
        outside = pool & ~inside[k]
        for column in (0, 1, 3):
            u, shares, freedom, both = values[:, column], [], [], np.zeros(len(u_names := np.unique(groups)))
            for side, sign in ((inside[k], 1), (outside, -1)):
                sums = np.array([(u[side & (groups == g)] - u[side].mean()).sum() for g in u_names]) / side.sum()
                n_groups = len(np.unique(groups[side]))
                shares.append((sums**2).sum() * n_groups / (n_groups - 1))
                freedom.append(n_groups - 1)
                both = both * sums * -1 if sign < 0 else sums
            variance = sum(shares) + 2 * both.sum()
            df = sum(shares) ** 2 / sum(v**2 / f for v, f in zip(shares, freedom, strict=True))
            z = plain.delta[k, column] / np.sqrt(variance)
            np.testing.assert_allclose(found.z[k, column], z, **TOLERANCE)
            np.testing.assert_allclose(found.df[k, column], df, **TOLERANCE)
            np.testing.assert_allclose(found.p[k, column], 2 * reference.t.sf(abs(z), df), **TOLERANCE)
    np.testing.assert_array_equal(found.delta, plain.delta)
    assert np.isnan(found.p[:, 2]).all()  # a column that never varies
    assert np.isnan(found.p[3]).all()  # an empty context
    assert cut or (np.abs(found.z[:2, :2]) < np.abs(plain.z[:2, :2])).all()


def test_comparison_of_single_rows_is_welch(sample):
    values, groups, n_groups, parity = sample
    members, pool = stats.one_hot(groups, n_groups), groups >= 0
    plain, _ = stats.compare_members(values, members, pool, parity)
    found = stats.welch_of_groups(plain, values, members, pool, np.arange(len(values)) * 7 - 50)
    for name in ("z", "df", "p", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-8, atol=1e-9)


def test_a_draw_has_the_variance_of_all_draws():
    """The mean square of the difference over every way to draw three rows of seven."""
    values = np.array([[0.0, 1], [0, 5], [1, 2], [0, 2], [0, 9], [3, 4], [0, 0]])
    pool, n = np.ones(7, dtype=bool), 3
    draws = [list(rows) for rows in combinations(range(7), n)]
    differences = [values[rows].mean(0) - np.delete(values, rows, axis=0).mean(0) for rows in draws]
    expected = np.sqrt(np.mean(np.square(differences), axis=0))
    members = stats.one_hot(np.array([-1, -1, -1, 0, 0, -1, 0]), 1)  # the first column is silent in them
    plain, _ = stats.compare_members(values, members, pool, np.arange(7) % 2)
    found = stats.no_surer_than_a_draw(plain, values, pool)
    np.testing.assert_allclose(found.error[0], np.maximum(expected, plain.error[0]), **TOLERANCE)
    assert found.error[0, 0] == pytest.approx(expected[0], rel=1e-9)
    assert plain.error[0, 0] < expected[0]
    np.testing.assert_array_equal(found.z, plain.z)
    assert found.p[0, 0] == pytest.approx(2 * reference.t.sf(abs(plain.delta[0, 0]) / expected[0], 5), rel=1e-9)
    half = reference.t.ppf(0.975, 5) * expected[0]
    assert found.ci_high[0, 0] - found.delta[0, 0] == pytest.approx(half, rel=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_sides_that_never_overlap_are_told_by_the_draw(shared):
    """All of a context one thing and all of the rest another: no side varies, and nothing is surer."""
    n, n_in = 300, 40
    values = np.column_stack([np.arange(n) < n_in, np.zeros(n), np.ones(n)]).astype(float)
    groups = np.where(np.arange(n) < n_in, 0, 1)
    groups[-1] = 2  # a context of one row
    prompts = np.arange(n) // 2 if shared else None
    members, pool = stats.one_hot(groups, 3), np.ones(n, bool)
    found, _ = stats.compare_members(values, members, pool, np.arange(n) % 2)
    if prompts is not None:
        found = stats.welch_of_groups(found, values, members, pool, prompts)
    assert np.isnan(found.p[0]).all()
    told = stats.no_surer_than_a_draw(found, values, pool, prompts)
    totals = values[:, 0] - values[:, 0].mean() if prompts is None else np.bincount(prompts, values[:, 0] - n_in / n)
    spread = np.square(totals).sum() / n * len(totals) / (len(totals) - 1)
    error = np.sqrt(spread * (1 / n_in + 1 / (n - n_in)))
    assert told.error[0, 0] == pytest.approx(error, rel=1e-9)
    assert told.p[0, 0] == pytest.approx(2 * reference.t.sf(1 / error, len(totals) - 2), rel=1e-6)
    assert told.ci_low[0, 0] == pytest.approx(1 - reference.t.ppf(0.975, len(totals) - 2) * error, rel=1e-9)
    assert np.isnan(told.p[:, 1:]).all()
    assert np.isnan(told.p[2]).all()
    assert np.isnan(told.ci_low[2]).all()


def test_a_draw_of_prompts_adds_up_what_their_pairs_share():
    """Every row twice, under one prompt, is known as well as every row once: the sum over a prompt is what varies."""
    rng = np.random.default_rng(0)
    once = (rng.random((200, 3)) < 0.05).astype(float)
    inside = np.arange(200) < 40
    prompts = np.arange(200)
    single = two_sided(once, inside, prompts)
    double = two_sided(np.repeat(once, 2, axis=0), np.repeat(inside, 2), np.repeat(prompts, 2))
    np.testing.assert_allclose(double.error, single.error, **TOLERANCE)
    np.testing.assert_allclose(double.p, single.p, **TOLERANCE)


def two_sided(values: np.ndarray, inside: np.ndarray, prompts: np.ndarray) -> stats.Welch:
    members = stats.one_hot(np.where(inside, 0, -1), 1)
    pool = np.ones(len(values), dtype=bool)
    plain, _ = stats.compare_members(values, members, pool, np.arange(len(values)) % 2)
    robust = stats.welch_of_groups(plain, values, members, pool, prompts)
    return stats.no_surer_than_a_draw(robust, values, pool, prompts)
