"""How a harvest is cut and where scores lie changes nothing: shards, blocks, scratch files, rows read alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_world import SPANS, make_world
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from trl_anatomy.audit import clusters, folder, prompt_view, stats, views
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.run import Findings, analyse
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import files
from trl_anatomy.reading.harvest import Harvest, write_harvest

CONFIG = AuditConfig(n_contexts=4, bootstrap=100, min_seen=20, geometry_rows=700, community_pairs=900)


@pytest.fixture(scope="module")
def world() -> Any:
    return make_world(n=1200)


def harvest_of(world: Any, out: Path, shard_pairs: int) -> Harvest:
    maximum = {span: world.maximum(span) for span in SPANS}
    return write_harvest(out, maximum, world.counts, world.lengths, world.rows, {"pairs": "x"}, shard_pairs=shard_pairs)


def findings_of(world: Any, read: Harvest, config: AuditConfig = CONFIG) -> Findings:
    groups = np.arange(world.n_pairs) // 3
    return analyse(read, config, lambda i: tuple(world.texts[i][s] for s in ("prompt", "chosen", "rejected")), groups)


def assert_same(found: Findings, wanted: Findings) -> None:
    for name in ("hypotheses", "concepts", "pairs"):
        assert repr(getattr(found, name).to_pylist()) == repr(getattr(wanted, name).to_pylist()), name
    assert found.info == wanted.info


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return findings_of(world, harvest_of(world, tmp_path_factory.mktemp("whole"), 5000))


@pytest.mark.parametrize("shard_pairs", [97, 600])
def test_the_size_of_shards_changes_no_bit(shard_pairs: int, world: Any, whole: Findings, tmp_path: Path) -> None:
    assert_same(findings_of(world, harvest_of(world, tmp_path, shard_pairs)), whole)


def test_scores_in_files_are_those_in_memory(
    world: Any, whole: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = harvest_of(world, tmp_path, 600)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(files, "SCRATCH_BYTES", 0)
    scores = views.activity(read, [np.arange(4), np.arange(4, 9)])
    assert isinstance(scores.u, np.memmap)
    assert scores.u.flags.f_contiguous
    assert sorted(os.listdir(tmp_path)) == before  # a file without a name: a killed run leaves nothing
    assert_same(findings_of(world, read), whole)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(AnatomyError, match=r"no room for 0\.8 GB of scores .*No space left on device"):
        files.scratch_array((100_000, 1000), np.float64, tmp_path)
    assert files.scratch_array((10, 10), np.float64, tmp_path).sum() == 0


def test_the_size_of_blocks_changes_nothing(
    world: Any, whole: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "ROWS", 7)
    monkeypatch.setattr(views, "BLOCK_PAIRS", 23)
    monkeypatch.setattr(folder, "ROWS", 11)
    monkeypatch.setattr(stats, "BLOCK", 3)
    found = findings_of(world, harvest_of(world, tmp_path, 600))
    assert found.pairs.equals(whole.pairs)
    for name in ("hypotheses", "concepts"):
        for column in getattr(found, name).schema:
            ours, wanted = (getattr(x, name)[column.name].to_pylist() for x in (found, whole))
            if str(column.type) == "double":
                ours, wanted = np.array(ours, dtype=float), np.array(wanted, dtype=float)
                np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-12, err_msg=column.name)
            else:
                assert ours == wanted, column.name


def test_rows_read_alone_are_those_of_the_shard(world: Any, tmp_path: Path) -> None:
    read, rng = harvest_of(world, tmp_path, 500), np.random.default_rng(0)
    for shard in read.shards():
        for pairs in (np.flatnonzero(rng.random(len(shard.rows)) < 0.2), np.zeros(0, np.int64), np.array([3])):
            some = shard.select(pairs)
            np.testing.assert_array_equal(some.rows, shard.rows[pairs])
            for span in SPANS:
                for of in ("maximum", "count", "frequency"):
                    alone, together = getattr(some, of)(span), getattr(shard, of)(span)
                    assert alone.dtype == together.dtype
                    np.testing.assert_array_equal(alone.toarray(), together.toarray()[pairs])


def test_sums_over_clusters_equal_dense_ones() -> None:
    rng = np.random.default_rng(1)
    dense = rng.random((60, 40)) * (rng.random((60, 40)) < 0.2)
    dense[7] = 0
    groups = [np.array([0, 3, 5]), np.array([5, 9, 39]), np.zeros(0, np.int64), np.array([5, 0])]  # they overlap
    whole = sparse.csr_array(dense)
    for rows in (slice(0, 60), slice(3, 9), slice(7, 8)):  # each row by itself: the same to the last bit
        matrix = whole[rows]
        sums, ones = views.cluster_sums(matrix, groups, matrix.data, np.ones(matrix.nnz))
        np.testing.assert_array_equal(sums, views.cluster_sums(whole, groups, whole.data)[0][rows])
        for k, features in enumerate(groups):
            np.testing.assert_allclose(sums[:, k], dense[rows][:, features].sum(1), rtol=1e-12, atol=0)
            np.testing.assert_array_equal(ones[:, k], (dense[rows][:, features] > 0).sum(1))
    assert views.cluster_sums(sparse.csr_array(dense), [], np.ones(0))[0].shape == (60, 0)


def test_differences_of_a_shard_equal_dense_ones(world: Any, tmp_path: Path) -> None:
    read = harvest_of(world, tmp_path, 700)
    for pooling in ("freq", "max"):
        for shard in read.shards():
            of = shard.frequency if pooling == "freq" else shard.maximum
            chosen, rejected = (of(span).toarray().astype(np.float64) for span in ("chosen", "rejected"))
            delta = prompt_view._delta(shard, pooling)
            np.testing.assert_array_equal(delta.toarray(), chosen - rejected)
            seen = sparse.csr_array((np.ones(delta.nnz), delta.indices, delta.indptr), shape=delta.shape)
            np.testing.assert_array_equal(seen.toarray() > 0, (chosen > 0) | (rejected > 0))


def test_pairs_of_rare_and_of_almost_constant_features_keep_their_edges() -> None:
    """The single-precision bound must lose no edge, from features in 0.1 % to 99.9 % of the samples."""
    rng = np.random.default_rng(2)
    n, rates = 6000, np.repeat([0.002, 0.02, 0.3, 0.9, 0.99, 0.998], 8)
    fired = np.empty((n, len(rates)), bool)
    for k, rate in enumerate(rates):
        shared = np.random.default_rng(int(1e4 * rate)).random(n) < rate  # one coin for the features of a rate
        fired[:, k] = np.where(rng.random(n) < 0.3 * (k % 8) / 8, rng.random(n) < rate, shared)
    graph = clusters.cofiring_graph(sparse.csr_array(fired.astype(float)), np.arange(len(rates)), edge_share=1.0)
    both, count = fired.T.astype(float) @ fired, fired.sum(0).astype(float)
    information, value = clusters.binary_information(both, count[:, None], count[None], n)
    least = clusters.chi2.isf(0.01 / (len(rates) * (len(rates) - 1) / 2), 1)
    wanted = np.where((both * n > np.outer(count, count)) & (2 * n * information > least), value, 0)
    np.fill_diagonal(wanted, 0)
    np.testing.assert_allclose(graph.toarray(), wanted, atol=1e-11)
    assert (wanted[:8, :8] > 0).sum() > 8
    assert (wanted[-8:, -8:] > 0).sum() > 8


def test_communities_of_a_dense_harvest_come_from_fewer_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    fired = sparse.csr_array((np.random.default_rng(3).random((500, 80)) < 0.5).astype(float))
    assert clusters.affordable(fired) is fired
    monkeypatch.setattr(clusters, "COFIRING_WORK", 100 * 40**2 / 2)
    less = clusters.affordable(fired, seed=1)
    assert 90 <= less.shape[0] <= 110
    rows = {row.tobytes() for row in fired.toarray()}
    assert {row.tobytes() for row in less.toarray()} <= rows
    assert (np.square(np.diff(less.indptr)).sum() / 2) <= clusters.COFIRING_WORK


def test_kmeans_from_some_rows_groups_all_of_them() -> None:
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 6, 3000)
    x = np.maximum(np.abs(rng.normal(size=(6, 20)))[truth] + rng.normal(0, 0.1, (3000, 20)), 0).astype(np.float32)
    rows = np.flatnonzero(rng.random(3000) < 0.9)
    labels, centroids = clusters.spherical_kmeans(x, 6, seed=0, fit_rows=200, rows=rows)
    assert len(labels) == len(rows)
    assert adjusted_rand_score(truth[rows], labels) > 0.95
    np.testing.assert_array_equal(labels, (x[rows].astype(np.float64) @ centroids.T).argmax(1))
    same, _ = clusters.spherical_kmeans(x[rows], 6, seed=0, fit_rows=200)
    np.testing.assert_array_equal(labels, same)
