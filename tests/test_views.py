"""The feature-conditioned view against dense loops and planted answers."""

import numpy as np
import pytest
from audit_world import HABITS, TOPICS, checked_test, make_world
from scipy import stats as reference

from trl_anatomy.audit import communities, views
from trl_anatomy.audit.clusters import cofiring_communities
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.errors import AnatomyError

CONFIG = AuditConfig(n_contexts=4, bootstrap=200)
COMMUNITIES = [np.array(h["features"]) for h in HABITS.values()]


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def view(world):
    return views.feature_view(world, COMMUNITIES, CONFIG, min_concept=2)


def test_scores_equal_the_formulas(world, view):
    chosen, rejected = (world.frequency(side).toarray().astype(np.float64) for side in ("chosen", "rejected"))
    for m, features in enumerate(COMMUNITIES):
        c, r = chosen[:, features], rejected[:, features]
        u = ((c > 0.01).astype(float) - (r > 0.01)).sum(1) / len(features)
        np.testing.assert_allclose(view.activity.u[:, m], u, rtol=0, atol=1e-12)
        np.testing.assert_allclose(view.activity.s[:, m], (c + r).sum(1), atol=1e-6)
        np.testing.assert_allclose(view.activity.v[:, m], (c - r).sum(1), atol=1e-6)
        assert view.activity.support[m] == ((c > 0.01).any(1) | (r > 0.01).any(1)).sum()
    ratio = np.log(world.lengths["chosen"] / world.lengths["rejected"])
    np.testing.assert_allclose(view.activity.log_ratio, ratio, atol=1e-12)
    np.testing.assert_array_equal(view.activity.rows, world.rows)


def test_tau_is_a_strict_threshold_on_the_share_of_tokens(world):
    scores = views.activity(world, COMMUNITIES, tau=0.05)
    chosen = world.frequency("chosen").toarray()[:, COMMUNITIES[0]]
    rejected = world.frequency("rejected").toarray()[:, COMMUNITIES[0]]
    expected = (chosen > np.float32(0.05)).mean(1) - (rejected > np.float32(0.05)).mean(1)
    np.testing.assert_allclose(scores.u[:, 0], expected, atol=1e-12)
    assert not np.allclose(scores.u, views.activity(world, COMMUNITIES, tau=0.01).u)


def test_silent_pairs_are_the_least_active_and_are_not_tested(view):
    norm = np.linalg.norm(view.activity.s.astype(float), axis=1)
    cut = np.percentile(norm, 5)
    np.testing.assert_array_equal(view.contexts == 0, (norm < cut) | (norm == 0))
    assert set(np.unique(view.contexts)) == {0, 1, 2, 3, 4}
    assert "B0" not in view.hypotheses["context"].to_pylist()


def test_hypotheses_equal_scipy(view):
    table = view.hypotheses.to_pylist()
    assert len(table) == 4 * len(COMMUNITIES)
    parity = view.activity.rows % 2
    for row in table:
        k, m = int(row["context"][1:]), int(row["concept"][1:]) - 1
        u, active = view.activity.u[:, m], view.contexts > 0
        inside, outside = u[view.contexts == k], u[active & (view.contexts != k)]
        found = [row[name] for name in ("z", "p", "ci_low", "ci_high")]
        np.testing.assert_allclose(found, checked_test(inside, outside), rtol=1e-9, atol=1e-12)
        halves = [
            u[(view.contexts == k) & (parity == h)].mean() - u[active & (view.contexts != k) & (parity == h)].mean()
            for h in (0, 1)
        ]
        np.testing.assert_allclose([row["delta_a"], row["delta_b"]], halves, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([row["mean_in"], row["mean_out"]], [inside.mean(), outside.mean()], atol=1e-12)
        assert (row["n_in"], row["n_out"]) == (len(inside), len(outside))
        # Kept asks for evidence since it means what a reader would keep; two cells were kept by their halves alone.
        agrees = halves[0] * halves[1] > 0 and min(map(abs, halves)) > 1e-6 and len(inside) >= 25
        assert row["differs"] == (agrees and row["q"] <= 0.05)
        assert row["kept"] == (row["differs"] and row["folded_under"] is None)
        assert row["adjusted"] is None  # no habits were counted
        assert row["lean"] == ("chosen" if row["delta"] > 0 else "rejected")
    p = np.array([row["p"] for row in table])
    np.testing.assert_allclose([row["q"] for row in table], reference.false_discovery_control(p))


def test_ranks_count_each_side_from_one_by_the_chosen_measure(world):
    for rank_by in ("delta_min", "z"):
        config = AuditConfig(n_contexts=4, rank_by=rank_by)
        table = views.feature_view(world, COMMUNITIES, config, min_concept=2).hypotheses.to_pylist()
        for lean in ("chosen", "rejected"):
            kept = sorted((row for row in table if row["kept"] and row["lean"] == lean), key=lambda row: row["rank"])
            assert [row["rank"] for row in kept] == list(range(1, len(kept) + 1))
            size = [abs(row[rank_by]) for row in kept]
            assert size == sorted(size, reverse=True)
        assert all(row["rank"] is None for row in table if not row["kept"])


def test_pairs_tied_at_the_percentile_are_not_silent():
    """Below the percentile is silent: where nearly all pairs are equally active, none of them is."""
    s = np.tile([[1.0, 0.0], [0.0, 1.0]], (100, 1)).astype(np.float32)
    s[:4] = 0
    s[4:8] *= 0.5
    for percentile, silent in ((2.0, 4), (3.0, 4), (5.0, 8), (0.0, 4)):
        contexts, _ = views.find_contexts(s, AuditConfig(silent_percentile=percentile))
        assert np.flatnonzero(contexts == 0).tolist() == list(range(silent)), percentile


def test_published_concept_size_drops_small_concepts(world):
    table = views.feature_view(world, COMMUNITIES, CONFIG).hypotheses
    assert table.num_rows > 0
    assert not any(table["kept"].to_pylist())


def test_a_habit_rewarded_in_one_topic_is_found_in_its_context(world):
    """Grouped by what is active (topic features included), the planted cell comes first."""
    communities = [*COMMUNITIES, np.arange(20, 24), np.arange(24, 28)]
    result = views.feature_view(world, communities, CONFIG, min_concept=2)
    top = next(r for r in result.hypotheses.to_pylist() if r["rank"] == 1 and r["lean"] == "chosen")
    assert top["concept"] == "T4"
    inside = result.contexts == int(top["context"][1:])
    assert (world.topic[inside] == HABITS["recipe"]["topic"]).mean() > 0.95
    assert top["q"] < 1e-6


def test_swapped_labels_give_no_discoveries():
    world = make_world(seed=5, null=True)
    table = views.feature_view(world, COMMUNITIES, CONFIG, min_concept=2).hypotheses
    assert np.min(table["q"].to_numpy()) > 0.05


def test_communities_of_a_small_sae_are_the_planted_habits(world):
    fired = communities.fired_responses(world, 0.01, max_pairs=10_000)
    assert fired.shape == (2 * world.n_pairs, world.d_sae)
    sizes = communities.sizes_for(world.d_sae, AuditConfig())
    assert (sizes.min_community, sizes.min_concept) == (1, 1)
    assert "setting 10" in sizes.notes[0]
    found = {tuple(c) for c in cofiring_communities(fired, min_size=2, resolution=sizes.resolution)}
    planted = [h["features"] for h in HABITS.values()] + [t["features"] for t in TOPICS]
    assert found == set(planted)
    assert communities.fired_responses(world, 0.01, max_pairs=100).shape[0] == 200


def test_sizes_of_a_large_sae_are_the_settings():
    sizes = communities.sizes_for(30_000, AuditConfig())
    assert (sizes.min_community, sizes.min_concept, sizes.notes) == (4, 10, ())
    assert communities.sizes_for(2048, AuditConfig()).min_concept == 5


def test_contexts_are_scaled_to_the_data():
    world = make_world(n=400)
    view = views.feature_view(world, COMMUNITIES, AuditConfig(), min_concept=2)
    assert view.settings_used["n_contexts"] == (view.contexts > 0).sum() // 50
    assert "too few for 512" in view.notes[0]


def test_tiny_data_and_no_concepts_do_not_fail():
    world = make_world(n=30)
    view = views.feature_view(world, COMMUNITIES, AuditConfig())
    assert view.hypotheses.num_rows == 0
    assert any("too few" in note for note in view.notes)
    none = views.feature_view(world, [], AuditConfig())
    assert none.hypotheses.num_rows == 0
    assert none.activity.u.shape == (30, 0)


def test_settings_out_of_range_are_refused():
    with pytest.raises(AnatomyError, match="rank_by: found 'size', allowed"):
        AuditConfig(rank_by="size")
    with pytest.raises(AnatomyError, match="tau"):
        AuditConfig(tau=1.5)
