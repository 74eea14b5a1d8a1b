"""The prompt-conditioned view against dense loops, and a habit planted in one topic."""

from types import SimpleNamespace

import numpy as np
import pytest
from audit_world import HABITS, TOPICS, checked_test, make_world
from scipy import sparse
from scipy import stats as reference

from trl_anatomy.audit import prompt_view
from trl_anatomy.audit.config import AuditConfig

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


class Matrices:
    """A harvest in memory: random sparse values with ties, empty rows, latents of every kind."""

    def __init__(self, n=900, d=70, seed=0, shard=250):
        rng = np.random.default_rng(seed)
        topic = rng.integers(0, 7, n)
        fired = {span: rng.random((n, d)) < 0.06 for span in ("prompt", "chosen", "rejected")}
        fired["prompt"] |= (topic[:, None] == np.arange(d) % 9) & (rng.random((n, d)) < 0.7)
        fired["chosen"] |= (topic[:, None] == np.arange(d) % 5) & (rng.random((n, d)) < 0.3)
        fired["rejected"] |= (rng.random((n, 1)) < 0.2) & (np.arange(d) % 4 == 1)
        for span in fired:
            fired[span][rng.random(n) < 0.05] = False  # silent spans
        fired["prompt"][:30] = fired["chosen"][:30] = fired["rejected"][:30] = False  # silent pairs
        fired["chosen"][:, 3] = fired["rejected"][:, 3]  # differences that cancel, and none at all below
        fired["chosen"][:, 5] = fired["rejected"][:, 5] = False
        value = {span: rng.integers(1, 4, (n, d)) / 8 for span in fired}  # few values: ties
        value["chosen"][:, 3] = value["rejected"][:, 3]
        self.dense = {span: np.where(fired[span], value[span], 0).astype(np.float32) for span in fired}
        self.n_pairs, self.d_sae, self.shard = n, d, shard
        self.rows = np.sort(rng.choice(3 * n, n, replace=False))
        self.lengths = {span: rng.integers(5, 40, n).astype(np.int32) for span in fired}

    def shards(self):
        for start in range(0, self.n_pairs, self.shard):
            yield self.part(np.arange(start, min(start + self.shard, self.n_pairs)))

    def part(self, pairs):
        return SimpleNamespace(
            rows=self.rows[pairs],
            lengths={span: x[pairs] for span, x in self.lengths.items()},
            frequency=lambda span: sparse.csr_array(self.dense[span][pairs]),
            maximum=lambda span: sparse.csr_array(3 * self.dense[span][pairs]),
            select=lambda some: self.part(pairs[some]),
        )


@pytest.fixture(scope="module", params=[("freq", "fired"), ("max", "raw")], ids=" ".join)
def case(request):
    harvest = Matrices()
    config = AuditConfig(pooling=request.param[0], prompt_score=request.param[1], min_context=5, n_top=40)
    return harvest, config, prompt_view.prompt_view(harvest, config)


def test_clusters_hold_the_retained_features(case):
    harvest, config, view = case
    factor = 1 if config.pooling == "freq" else 3
    dense = {span: factor * x.astype(np.float64) for span, x in harvest.dense.items()}
    delta = dense["chosen"] - dense["rejected"]
    seen = ((dense["chosen"] > 0) | (dense["rejected"] > 0)).sum(0)
    least = max(5, round(200 * harvest.n_pairs / 20_000))
    assert view.settings_used["min_seen"] == least
    kept = np.flatnonzero((seen >= least) & (delta.std(0) >= 1e-3) & (np.abs(delta).mean(0) >= 1e-4))
    assert not {3, 5} & set(kept)
    np.testing.assert_array_equal(np.sort(np.concatenate(view.geometry.responses)), kept)
    kept = np.flatnonzero((dense["prompt"] > 0).sum(0) >= least)
    np.testing.assert_array_equal(np.sort(np.concatenate(view.geometry.prompts)), kept)
    assert any("setting 512" in note for note in view.notes)


def explicit(harvest, config, prompts, responses):
    """Scores of method.md section 5 as it writes them, dense, in float64."""
    factor = 1 if config.pooling == "freq" else 3
    dense = {span: factor * x.astype(np.float64) for span, x in harvest.dense.items()}
    value = (dense["prompt"] > 0).astype(float) if config.prompt_score == "fired" else dense["prompt"]
    delta = dense["chosen"] - dense["rejected"]
    standard = (delta - delta.mean(0)) / np.maximum(delta.std(0), 1e-6)
    c = np.column_stack([value[:, features].mean(1) for features in prompts])
    return c, np.column_stack([standard[:, features].mean(1) for features in responses])


def by_count(harvest, config, responses):
    """Scores with firing tokens as a share of the shorter response of a pair, dense, in float64."""
    dense = {span: x.astype(np.float64) for span, x in harvest.dense.items()}
    shorter = np.minimum(harvest.lengths["chosen"], harvest.lengths["rejected"])
    sides = {side: dense[side] * (harvest.lengths[side] / shorter)[:, None] for side in ("chosen", "rejected")}
    if config.pooling == "max":
        sides = {side: 3 * dense[side] for side in sides}
    scale = np.maximum((3 if config.pooling == "max" else 1) * (dense["chosen"] - dense["rejected"]).std(0), 1e-6)
    delta = (sides["chosen"] - sides["rejected"]) / scale
    return np.column_stack([delta[:, features].mean(1) for features in responses])


def test_the_highest_scoring_pairs_make_a_context(case):
    harvest, config, view = case
    c, _ = explicit(harvest, config, view.geometry.prompts, view.geometry.responses)
    for k in range(c.shape[1]):
        inside = np.zeros(harvest.n_pairs, bool)
        inside[view.members[[k]].indices] = True
        assert inside.sum() == min(40, (c[:, k] > 0).sum())
        assert (c[inside, k] > 0).all()
        assert c[inside, k].min() >= c[~inside, k].max() - 1e-6
        ties = np.abs(c[:, k] - c[inside, k].min()) < 1e-6
        if ties[~inside].any() and ties.sum() > 20:  # neither the first rows nor the last ones win
            assert 0.1 < np.flatnonzero(ties & inside).mean() / harvest.n_pairs < 0.9


def test_hypotheses_equal_an_explicit_reference(case):
    harvest, config, view = case
    _, u = explicit(harvest, config, view.geometry.prompts, view.geometry.responses)
    np.testing.assert_allclose(view.scores.u - view.scores.u.mean(0), u, **TOLERANCE)
    np.testing.assert_array_equal(view.scores.rows, harvest.rows)
    counted = by_count(harvest, config, view.geometry.responses)
    table = view.hypotheses.to_pylist()
    assert len(table) == len(view.geometry.prompts) * len(view.geometry.responses)
    ratio = np.log(harvest.lengths["chosen"] / harvest.lengths["rejected"])
    for row in table:
        k, m = int(row["context"][1:]) - 1, int(row["concept"][1:]) - 1
        assert (row["view"], row["context"][0], row["concept"][0]) == ("prompt", "A", "R")
        inside = np.zeros(harvest.n_pairs, bool)
        inside[view.members[[k]].indices] = True
        a, b = u[inside, m], u[~inside, m]
        z, p_value, low, high = checked_test(a, b)
        pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(u) - 2))
        found = [row[name] for name in ("delta", "z", "p", "d", "ci_low", "ci_high")]
        delta = a.mean() - b.mean()
        expected = [delta, z, p_value, delta / pooled, low, high]
        np.testing.assert_allclose(found, expected, **TOLERANCE)
        halves = []
        for half in (0, 1):
            mine = harvest.rows % 2 == half
            halves.append(u[inside & mine, m].mean() - u[~inside & mine, m].mean())
        np.testing.assert_allclose([row["delta_a"], row["delta_b"]], halves, **TOLERANCE)
        # Counted on the length of the shorter response, half of the difference or more has to be left.
        left = counted[inside, m].mean() - counted[~inside, m].mean()
        agrees = halves[0] * halves[1] > 0 and min(map(abs, halves)) > 1e-6
        same_length = left * np.sign(delta) >= 0.5 * abs(delta)
        # Kept asks for evidence too, since it means what a reader would keep.
        assert row["differs"] == (agrees and same_length and len(a) >= 5 and row["q"] <= 0.05)
        assert row["kept"] == (row["differs"] and row["folded_under"] is None)
        design = np.column_stack([np.ones(len(u)), inside, ratio])
        adjusted = np.linalg.lstsq(design, u[:, m], rcond=None)[0][1]
        np.testing.assert_allclose(row["delta_length_adjusted"], adjusted, **TOLERANCE)
        assert (row["n_in"], row["n_out"]) == (len(a), len(b))
    p = np.array([row["p"] for row in table])
    np.testing.assert_allclose([row["q"] for row in table], reference.false_discovery_control(p), **TOLERANCE)


def test_single_member_and_empty_clusters_equal_the_reference():
    """Clusters given by hand: one latent, a latent that never fires in a prompt, one that no response shows."""
    harvest, config = Matrices(seed=1), AuditConfig(min_context=2, n_top=30)
    harvest.dense["prompt"][:, 10] = 0
    harvest.dense["prompt"][:, 11] = 0
    harvest.dense["prompt"][77, 11] = 0.5
    prompts = [np.array([0]), np.array([10]), np.array([11]), np.arange(20, 40)]
    responses = [np.array([7]), np.array([5]), np.array([1, 9, 12])]
    scores = prompt_view.response_scores(harvest, responses, "freq")
    members = prompt_view.top_pairs(prompt_view.prompt_scores(harvest, prompts, config), 30)
    assert np.diff(members.indptr).tolist() == [30, 0, 1, 30]
    assert scores.support.tolist()[1] == 0
    _, u = explicit(harvest, config, prompts, responses)
    table = prompt_view.hypothesis_table(scores, members, np.ones(900, bool), config, names=("prompt", "A", "R"))
    cells = {(row["context"], row["concept"]): row for row in table.to_pylist()}
    # an empty context has no test, nor one of a single pair, nor a response cluster that never varies
    assert set(cells) == {(a, r) for a in ("A1", "A4") for r in ("R1", "R3")}
    for (context, concept), row in cells.items():
        inside = np.zeros(900, bool)
        inside[members[[int(context[1:]) - 1]].indices] = True
        m = int(concept[1:]) - 1
        np.testing.assert_allclose([row["z"], row["p"]], checked_test(u[inside, m], u[~inside, m])[:2], **TOLERANCE)


def test_shards_and_seeds():
    config = AuditConfig(min_context=5, n_top=40)
    one = prompt_view.prompt_view(Matrices(shard=900), config)
    many = prompt_view.prompt_view(Matrices(shard=130), config)
    assert [c.tolist() for c in one.geometry.responses] == [c.tolist() for c in many.geometry.responses]
    np.testing.assert_array_equal(one.members.toarray(), many.members.toarray())
    np.testing.assert_allclose(one.scores.u, many.scores.u, atol=1e-12)
    assert one.hypotheses["context"].to_pylist() == many.hypotheses["context"].to_pylist()
    again = prompt_view.prompt_view(Matrices(shard=130), config)
    assert again.hypotheses.equals(many.hypotheses)
    drawn = prompt_view.find_geometry(Matrices(), AuditConfig(min_context=5, geometry_rows=300))
    kept = np.sort(np.concatenate(drawn.responses))
    np.testing.assert_array_equal(kept, np.sort(np.concatenate(one.geometry.responses)))


def test_a_habit_rewarded_in_one_topic_is_the_first_hypothesis():
    """The habit's cluster leans to chosen in its own topic and away from it in the other."""
    world = make_world(n=4000)
    view = prompt_view.prompt_view(world, AuditConfig(n_geometry=10, n_top=1000))
    found = sorted((row for row in view.hypotheses.to_pylist() if row["q"] < 0.05), key=lambda row: row["p"])
    assert len(found) >= 2
    for row in found[:2]:
        assert set(HABITS["recipe"]["features"]) <= set(view.geometry.responses[int(row["concept"][1:]) - 1])
        k = int(row["context"][1:]) - 1
        topic = 1 if row["lean"] == "chosen" else 0
        assert set(TOPICS[topic]["features"]) <= set(view.geometry.prompts[k])
        assert (world.topic[view.members[[k]].indices] == topic).mean() > 0.95
    assert {row["lean"] for row in found[:2]} == {"chosen", "rejected"}


def test_published_thresholds_on_large_data_and_none_on_tiny_data():
    tiny = prompt_view.prompt_view(make_world(n=20), AuditConfig())
    assert tiny.hypotheses.num_rows == 0
    assert tiny.members.shape == (0, 20)
    assert sum("no prompt-conditioned view" in note for note in tiny.notes) == 2
    large = Matrices(n=20_000, d=12, shard=7000)
    view = prompt_view.prompt_view(large, AuditConfig())
    assert view.settings_used["min_seen"] == 200
    assert view.settings_used["n_top"] == 250
