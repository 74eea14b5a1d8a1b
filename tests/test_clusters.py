"""Communities and k-means against scikit-learn, scipy and planted answers."""

import ctypes
import os

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import contingency
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from trl_anatomy.audit import clusters


def planted(n=3000, groups=((0, 1, 2, 3, 4), (5, 6, 7, 8), (9, 10)), d=60, seed=0):
    """Each group's features copy one hidden coin with 5 % noise; the other features fire on their own."""
    rng = np.random.default_rng(seed)
    fired = rng.random((n, d)) < rng.uniform(0.05, 0.6, d)
    for group in groups:
        coin = rng.random(n) < 0.3
        for feature in group:
            fired[:, feature] = coin ^ (rng.random(n) < 0.05)
    return fired


def test_nmi_equals_scikit_learn():
    fired = planted(n=400, d=12)
    for a in range(6):
        for b in range(12):
            x, y = fired[:, a], fired[:, b]
            entropy = np.sqrt(mutual_info_score(x, x) * mutual_info_score(y, y))
            value = clusters.binary_information((x & y).sum(), x.sum(), y.sum(), len(x))[1]
            np.testing.assert_allclose(value, mutual_info_score(x, y) / entropy, rtol=1e-9, atol=1e-12)
    _, constant = clusters.binary_information(np.array([0, 50]), np.array([0, 50]), np.array([30, 50]), 50)
    assert constant.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_graph_keeps_the_top_share_of_positive_pairs(monkeypatch, share):
    d = 40
    fired = planted(n=500, d=d)
    fired[:, 20] = ~fired[:, 0]  # excludes feature 0: as much information, but no co-firing
    fired[:, 30] = fired[:, 31]
    reference = np.zeros((d, d))
    for a in range(d):
        for b in range(a):
            x, y = fired[:, a], fired[:, b]
            table = np.histogram2d(x, y, bins=2)[0]
            chance = contingency.chi2_contingency(table, correction=False, lambda_="log-likelihood").pvalue
            if (x & y).mean() > x.mean() * y.mean() and chance < 0.01 / (d * (d - 1) / 2):
                entropy = np.sqrt(mutual_info_score(x, x) * mutual_info_score(y, y))
                reference[a, b] = reference[b, a] = np.round(mutual_info_score(x, y) / entropy, 12)
    wanted = int(np.ceil(share * d * (d - 1) / 2))
    cut = np.sort(reference[np.triu_indices(d, 1)])[-wanted]
    assert cut > 0 if share == 0.01 else cut == 0  # the share binds; chance binds
    for block in (clusters.BLOCK_CELLS, d + 1):  # one block, and one block per feature
        monkeypatch.setattr(clusters, "BLOCK_CELLS", block)
        graph = clusters.cofiring_graph(sparse.csr_array(fired), np.arange(d), edge_share=share).toarray()
        np.testing.assert_allclose(graph, np.where(reference >= cut, reference, 0), atol=1e-9)
    assert graph[0, 20] == 0
    assert graph[30, 31] == pytest.approx(1.0)
    assert (graph > 0).any(1).sum() < d


def test_ties_at_the_cut_are_all_kept():
    base = np.random.default_rng(0).random(200) < 0.4
    fired = np.repeat(base[:, None], 6, axis=1)  # every pair of features has value 1
    graph = clusters.cofiring_graph(sparse.csr_array(fired), np.arange(6), edge_share=0.01)
    assert graph.nnz == 30


def test_communities_find_what_was_planted():
    fired = sparse.csr_array(planted())
    found = clusters.cofiring_communities(fired, min_size=4, edge_share=0.01)
    assert [c.tolist() for c in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    small = clusters.cofiring_communities(fired, min_size=2, edge_share=0.01)  # and nothing made of chance
    assert [c.tolist() for c in small] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    again = clusters.cofiring_communities(fired, min_size=2, edge_share=0.01)
    assert [c.tolist() for c in small] == [c.tolist() for c in again]


def test_communities_do_not_depend_on_what_drew_random_numbers_before():
    """Leiden's refinement draws from C's `rand()`, which every library of the process shares."""
    rng = np.random.default_rng(0)
    topic = rng.random((600, 40)) < 0.15  # topics overlap, so that refinement has something to choose from
    linked = rng.random((40, 400)) < 0.08
    fired = sparse.csr_matrix((topic.astype(float) @ linked > 0) & (rng.random((600, 400)) < 0.6))
    libc = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    found = []
    for before in range(6):
        libc.srand(before)
        found.append([c.tolist() for c in clusters.cofiring_communities(fired, edge_share=0.2, min_size=1, seed=3)])
    assert all(communities == found[0] for communities in found)
    assert len(found[0]) > 3


def test_communities_of_one_keep_every_live_feature():
    fired = sparse.csr_array(planted())
    live = clusters.live_features(fired, 10)
    found = clusters.cofiring_communities(fired, min_size=1, edge_share=0.01)
    assert [c.tolist() for c in found[:3]] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert {len(c) for c in found[3:]} == {1}
    assert sorted(f for c in found for f in c) == live.tolist()
    alone = sparse.csr_array(np.random.default_rng(0).random((400, 3)) < 0.5)  # nothing is linked at all
    assert [c.tolist() for c in clusters.cofiring_communities(alone, min_size=1)] == [[0], [1], [2]]
    assert clusters.cofiring_communities(alone, min_size=2) == []


def test_no_live_features_give_no_communities():
    silent = sparse.csr_array(np.zeros((50, 8)))
    always = sparse.csr_array(np.ones((50, 8)))
    assert clusters.cofiring_communities(silent) == []
    assert clusters.cofiring_communities(always) == []
    assert clusters.live_features(always, 1).size == 0


@pytest.fixture(scope="module")
def sphere():
    rng = np.random.default_rng(3)
    centres = np.abs(rng.normal(size=(12, 30)))
    truth = rng.integers(0, 12, 1500)
    x = np.maximum(centres[truth] + rng.normal(0, 0.15, (1500, 30)), 0)
    return x / np.linalg.norm(x, axis=1, keepdims=True), truth


def test_spherical_kmeans_finds_the_groups_and_is_deterministic(sphere):
    x, truth = sphere
    labels, centroids = clusters.spherical_kmeans(x, 12, seed=1)
    assert adjusted_rand_score(truth, labels) > 0.95
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(labels, (x @ centroids.T).argmax(1))
    assert (np.diff(np.bincount(labels)) <= 0).all()
    sparse_labels, _ = clusters.spherical_kmeans(sparse.csr_array(x), 12, seed=1)
    np.testing.assert_array_equal(labels, sparse_labels)
    np.testing.assert_array_equal(labels, clusters.spherical_kmeans(x, 12, seed=1)[0])


def test_spherical_kmeans_beats_random_starts(sphere):
    """Objective (mean cosine to the centroid) against Lloyd from random rows, 20 starts."""
    x, _ = sphere
    labels, centroids = clusters.spherical_kmeans(x, 12, seed=0)
    ours = (x * centroids[labels]).sum(1).mean()
    others = []
    for seed in range(20):
        centres = x[np.random.default_rng(seed).choice(len(x), 12, replace=False)]
        for _ in range(30):
            assigned = (x @ centres.T).argmax(1)
            sums = np.stack([x[assigned == c].sum(0) if (assigned == c).any() else centres[c] for c in range(12)])
            centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        others.append((x @ centres.T).max(1).mean())
    assert ours >= np.median(others)
    assert ours >= max(others) - 0.005


def test_spherical_kmeans_survives_duplicates_and_one_cluster():
    x = np.tile(np.eye(3), (5, 1))
    labels, centroids = clusters.spherical_kmeans(x, 5, seed=0)
    assert np.isfinite(centroids).all()
    assert len({tuple(row) for row in x[labels == labels[0]]}) == 1
    assert clusters.spherical_kmeans(x, 1)[0].tolist() == [0] * 15
    with pytest.raises(ValueError, match="k must be"):
        clusters.spherical_kmeans(x, 16)


def varying(n=1500, groups=8, d=64, seed=0):
    """(n, d) sparse values: the columns of a group rise together; the last four are empty, rare, constant, tiny."""
    rng = np.random.default_rng(seed)
    truth = np.arange(d) % groups
    together = rng.random((n, groups)) < 0.2
    x = (together[:, truth] & (rng.random((n, d)) < 0.8)) * rng.gamma(2.0, 1.0, (n, d)) + rng.normal(0, 0.05, (n, d))
    x[:, -4:] = 0
    x[:3, -3] = 1.0
    x[:, -2] = 2.0
    x[::2, -1] = 1e-5
    return x, truth


def test_column_moments_equal_dense_ones_and_add_up():
    x, _ = varying()
    x[x < 0.1] = 0
    matrix = sparse.csr_array(x)
    whole = clusters.ColumnMoments.none(x.shape[1]).plus(matrix)
    parts = clusters.ColumnMoments.none(x.shape[1]).plus(matrix[:500]).plus(matrix[500:])
    for name in ("n", "seen", "total", "square", "size"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))  # to the last bit
    for moments in (whole, parts):
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.std, x.std(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(moments.seen, (x != 0).sum(0))
        kept = (x != 0).sum(0) >= 10
        np.testing.assert_array_equal(moments.retained(10), np.flatnonzero(kept))
        kept &= (x.std(0) >= 1e-3) & (np.abs(x).mean(0) >= 1e-4)
        np.testing.assert_array_equal(moments.retained(10, 1e-3, 1e-4), np.flatnonzero(kept))


def test_svd_of_the_centred_matrix_equals_the_dense_one():
    x, _ = varying()
    mean = x.mean(0) + 0.3  # any row may be taken off, not only the sample's own mean
    sigma, vt = clusters.centred_svd(sparse.csr_array(x), mean, 6)
    _, exact, exact_vt = np.linalg.svd(x - mean, full_matrices=False)
    np.testing.assert_allclose(sigma, exact[:6], rtol=1e-3)
    np.testing.assert_allclose(np.abs((vt * exact_vt[:6]).sum(1)), 1, atol=2e-2)
    assert (np.sign(vt[np.arange(6), np.abs(vt).argmax(1)]) == 1).all()
    full_sigma, full_vt = clusters.centred_svd(sparse.csr_array(x[:20]), mean, 20)  # nothing random is left
    np.testing.assert_allclose(full_sigma, np.linalg.svd(x[:20] - mean, compute_uv=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(full_vt @ full_vt.T, np.eye(20), atol=1e-9)
    with pytest.raises(ValueError, match="between 1 and 20"):
        clusters.centred_svd(sparse.csr_array(x[:20]), mean, 21)


def test_geometry_clusters_find_what_varies_together():
    x, truth = varying()
    matrix = sparse.csr_array(x)
    moments = clusters.ColumnMoments.none(matrix.shape[1]).plus(matrix)
    retained = moments.retained(10, 1e-3)
    found = clusters.geometry_clusters(matrix[::2], moments, retained, 8)
    labels = np.full(x.shape[1], -1)
    for k, features in enumerate(found):
        assert (np.diff(features) > 0).all()
        labels[features] = k
    assert adjusted_rand_score(truth[retained], labels[retained]) > 0.99
    assert (labels[np.setdiff1d(np.arange(x.shape[1]), retained)] == -1).all()
    assert [len(c) for c in found] == sorted((len(c) for c in found), reverse=True)
    again = clusters.geometry_clusters(matrix[::2], moments, retained, 8)
    assert [c.tolist() for c in found] == [c.tolist() for c in again]
    assert clusters.geometry_clusters(matrix, moments, retained[:0], 8) == []
    assert sum(map(len, clusters.geometry_clusters(matrix[:5], moments, retained, 100))) == len(retained)


def test_a_change_of_scale_changes_no_geometry_cluster():
    """Columns are standardised, so the unit of a latent does not matter."""
    x, _ = varying()
    scaled = x * np.exp(np.random.default_rng(1).normal(0, 2, x.shape[1]))
    groups = []
    for values in (x, scaled):
        matrix = sparse.csr_array(values)
        moments = clusters.ColumnMoments.none(matrix.shape[1]).plus(matrix)
        groups.append(clusters.geometry_clusters(matrix, moments, np.arange(60), 8))
    assert [c.tolist() for c in groups[0]] == [c.tolist() for c in groups[1]]
