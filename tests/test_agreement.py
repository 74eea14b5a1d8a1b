"""Communities whose members agree, against dense references and planted groups."""

from itertools import pairwise

import numpy as np
import pytest
from audit_world import HABITS, TOPICS, make_world, save_harvest
from scipy import sparse

from trl_anatomy.audit import agreement
from trl_anatomy.audit.agreement import (
    agreeing_communities,
    agreeing_groups,
    agreement_graph,
    n_returned,
    told_by_others,
)
from trl_anatomy.audit.communities import find_communities
from trl_anatomy.audit.config import PUBLISHED, AuditConfig


def planted(n: int, sizes: tuple[int, ...], noise: float = 0.1, lone: int = 3, seed: int = 0) -> sparse.csr_array:
    """Groups of latents that fire together but for noise, then latents that fire by themselves."""
    rng = np.random.default_rng(seed)
    columns = [(rng.random((n, 1)) < 0.3) ^ (rng.random((n, size)) < noise) for size in sizes]
    return sparse.csr_array(np.concatenate([*columns, rng.random((n, lone)) < 0.3], axis=1).astype(np.float64))


def groups_of(found: agreement.Agreeing) -> set[tuple[int, ...]]:
    return {tuple(features.tolist()) for features in found.features}


def test_links_are_correlations_beyond_chance_and_the_bound() -> None:
    fired = planted(400, (5, 4), noise=0.1)
    live = np.arange(fired.shape[1])
    graph = agreement_graph(fired, live).toarray()
    phi = np.corrcoef(fired.toarray().T)
    np.fill_diagonal(phi, 0.0)
    linked = graph > 0
    np.testing.assert_allclose(graph[linked], phi[linked], atol=1e-11)
    assert linked[:5, :5].sum() == 20
    assert phi[~linked].max() < agreement.LEAST_PHI
    few = agreement_graph(fired[:30], live).toarray()  # 30 responses: only strong agreement is beyond chance
    assert few[few > 0].min() > 0.5 > agreement.LEAST_PHI


@pytest.mark.parametrize("sizes", [(6, 5, 2), (30, 3), (2, 2, 2, 2)])
def test_planted_groups_are_found_whatever_their_size(sizes: tuple[int, ...]) -> None:
    fired = planted(1000, sizes)
    found = agreeing_communities(fired, np.arange(1000))
    bounds = np.cumsum((0, *sizes))
    expected = {tuple(range(a, b)) for a, b in pairwise(bounds)}
    assert groups_of(found) == expected | {(int(bounds[-1]) + k,) for k in range(3)}
    assert [len(c) for c in found.features] == [*sorted(sizes, reverse=True), 1, 1, 1]
    assert found.bound in agreement.BOUNDS
    assert found.returned == (len(sizes), len(sizes))


def test_a_loose_community_is_split_and_a_stranger_leaves() -> None:
    """Two groups that share a third of their responses are one community of the published kind."""
    rng = np.random.default_rng(1)
    common, own = rng.random((2000, 1)) < 0.15, rng.random((2000, 2)) < 0.3
    columns = [(common | own[:, [k]]) ^ (rng.random((2000, 6)) < 0.03) for k in (0, 1)]
    stranger = (common | (rng.random((2000, 1)) < 0.4)) ^ (rng.random((2000, 1)) < 0.05)
    fired = sparse.csr_array(np.concatenate([*columns, stranger], axis=1).astype(np.float64))
    found = agreeing_communities(fired, np.arange(2000))
    assert {tuple(range(6)), tuple(range(6, 12))} <= groups_of(found)


def test_every_member_agrees_with_the_others_by_the_bound() -> None:
    rng = np.random.default_rng(2)
    latent = rng.normal(size=(600, 5)) @ rng.normal(size=(5, 80)) + 2.0 * rng.normal(size=(600, 80))
    fired = sparse.csr_array((latent > 1).astype(np.float64))
    graph = agreement_graph(fired, np.arange(80))
    for bound in agreement.BOUNDS:
        labels = agreeing_groups(graph, bound)
        for label in np.unique(labels):
            inside = graph[labels == label][:, labels == label].toarray()
            if len(inside) > 1:
                assert (inside.sum(axis=1) / (len(inside) - 1)).min() >= bound * (1 - 1e-6)
        np.testing.assert_array_equal(labels, agreeing_groups(graph, bound))


def test_communities_tell_their_members_as_a_dense_reference_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    fired = rng.random((300, 12)) < (0.2 + 0.4 * rng.random((300, 1)))
    fired[:, 11] = False
    live, labels = np.array([0, 1, 2, 4, 5, 7, 9, 11]), np.array([1, 1, 1, 0, 0, 2, 3, 3])
    expected = 0.0
    for k, latent in enumerate(live):
        others = live[(labels == labels[k]) & (live != latent)]
        count = fired[:, others].sum(axis=1)
        if count.std() > 0 and fired[:, latent].std() > 0:
            expected += max(0.0, np.corrcoef(fired[:, latent], count)[0, 1]) ** 2
    table = sparse.csr_array(fired.astype(np.float64))
    assert told_by_others(table, live, labels) == pytest.approx(expected)
    monkeypatch.setattr(agreement, "BLOCK_CELLS", 40)  # ten samples at a time
    assert told_by_others(table, live, labels) == pytest.approx(expected)
    assert told_by_others(table, live[:0], labels[:0]) == 0.0


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.3])
def test_groups_that_are_joined_or_split_tell_less(noise: float) -> None:
    fired = planted(2000, (6, 6), noise=noise, lone=0, seed=6)
    live = np.arange(12)
    told = {
        name: told_by_others(fired[1000:], live, np.array(labels))
        for name, labels in {"right": [0] * 6 + [1] * 6, "joined": [0] * 12, "split": [0, 1] * 3 + [2, 3] * 3}.items()
    }
    assert told["right"] > max(told["joined"], told["split"])


def test_communities_have_returned_if_they_share_more_than_half() -> None:
    live = np.arange(8), np.array([0, 1, 2, 3, 4, 5, 6, 9])
    first = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    assert n_returned((first, np.array([0, 0, 0, 1, 1, 1, 2, 2])), live) == (
        2,
        3,
    )  # {3, 4} of {3, 4, 5}; {6, 7}: a third
    assert n_returned((first, np.arange(8)), live) == (0, 3)
    assert n_returned((first, first), (live[0], live[0])) == (3, 3)


def test_swapping_sides_and_the_order_of_responses_change_nothing() -> None:
    fired = planted(1000, (6, 4, 3), noise=0.2)
    order = np.random.default_rng(3).permutation(1000)
    one = agreeing_communities(fired, np.arange(1000) // 2)
    two = agreeing_communities(fired[order], (np.arange(1000) // 2)[order])
    assert groups_of(one) == groups_of(two)
    assert one.bound == two.bound


def test_concepts_are_bounded_communities_first_then_what_fires_most_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    lone = rng.random((1000, 6)) < np.array([0.02, 0.1, 0.5, 0.9, 0.97, 0.3])
    fired = sparse.csr_array(np.concatenate([planted(1000, (4, 3), lone=0).toarray(), lone], axis=1))
    every = agreeing_communities(fired, np.arange(1000), min_lone=50)
    lone_ones = {features for features in groups_of(every) if len(features) == 1}
    assert lone_ones == {(8,), (9,), (10,), (12,)}  # 7 and 11 hardly ever fire, or are hardly ever silent
    monkeypatch.setattr(agreement, "MOST_CONCEPTS", 4)
    some = agreeing_communities(fired, np.arange(1000), min_lone=50)
    assert [features.tolist() for features in some.features] == [[0, 1, 2, 3], [4, 5, 6], [9], [12]]
    assert (some.n_left, every.n_left) == (2, 0)


def test_a_large_sae_takes_the_usual_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST_TRIED", 5)
    found = agreeing_communities(planted(500, (6, 4)), np.arange(500))
    assert (found.bound, found.returned) == (agreement.USUAL_BOUND, None)
    nothing = agreeing_communities(sparse.csr_array((100, 20)), np.arange(100))
    assert nothing.features == []


def test_an_audit_finds_the_planted_habits_whole(tmp_path) -> None:
    world = make_world(n=1000)
    read = save_harvest(world, tmp_path / "harvest")
    config = AuditConfig()
    found = find_communities(read, config, None, np.arange(1000))
    large = {tuple(features.tolist()) for features in found.features if len(features) > 1}
    assert large == {h["features"] for h in HABITS.values()} | {t["features"] for t in TOPICS}
    assert found.bound is not None
    assert (found.sizes.min_community, found.sizes.min_concept) == (1, 1)
    counts = np.concatenate([world.frequency(side).toarray() > 0.01 for side in ("chosen", "rejected")]).sum(axis=0)
    least = min(counts[features[0]] for features in found.features if len(features) == 1)
    assert least >= 2 * config.min_context
    assert find_communities(read, AuditConfig(concepts=PUBLISHED)).bound is None
