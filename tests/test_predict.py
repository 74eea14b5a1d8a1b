"""Predicted and observed shifts, and their agreement, against scipy and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from audit_world import HABITS, make_world
from scipy import sparse
from scipy import stats as reference

from trl_anatomy.audit import predict, views
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.checking.responses import activities

COMMUNITIES = [np.array(h["features"]) for h in HABITS.values()]


@pytest.fixture(scope="module")
def world():
    return make_world()


def test_weights_scale_the_pull_of_pairs():
    u = np.random.default_rng(0).normal(size=(50, 3))
    np.testing.assert_allclose(predict.predicted_shift(u), u.mean(0), atol=1e-15)
    weights = np.random.default_rng(1).random(50)
    np.testing.assert_allclose(predict.predicted_shift(u, weights), (weights[:, None] * u).sum(0) / 50, atol=1e-15)
    np.testing.assert_allclose(predict.predicted_shift(u, np.ones(50)), u.mean(0), atol=1e-15)
    assert np.isnan(predict.predicted_shift(u[:0])).all()


def test_tilted_shift_of_independent_concepts_is_their_logistic_one():
    """Independent binary concepts with coefficient w shift from p to sigmoid(logit p + w), prompt by prompt or not."""
    rng = np.random.default_rng(0)
    p, w = np.array([0.2, 0.5, 0.9, 0.4]), np.array([1.5, -1.0, 1.0, 0.0])
    logit = np.log(p / (1 - p))
    n = 60_000
    chosen, rejected = (rng.random((n, 4)) < 1 / (1 + np.exp(-(logit + side * w / 2))) for side in (1, -1))
    u = chosen.astype(float) - rejected
    before = (rng.random((n, 4)) < p).astype(float)
    expected = 1 / (1 + np.exp(-(logit + w))) - p
    np.testing.assert_allclose(predict.tilted_shift(u, before), expected, atol=0.015)
    np.testing.assert_allclose(
        predict.tilted_shift(u, before, np.repeat(np.arange(n // 300), 300)), expected, atol=0.015
    )
    # One response to each prompt leaves nothing to tilt within a prompt: all together then.
    np.testing.assert_array_equal(predict.tilted_shift(u, before, np.arange(n)), predict.tilted_shift(u, before))


def test_tilt_within_a_prompt_leaves_alone_what_the_prompt_decides():
    """A concept that comes with the prompt is rewarded across prompts only by accident; training can not add it."""
    prompts = np.repeat(np.arange(50), 20)
    before = np.stack([(prompts % 2).astype(float), np.random.default_rng(1).random(1000) < 0.5], axis=1)
    u = np.tile([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], (100, 1))
    shift = predict.tilted_shift(u, before, prompts)
    assert shift[0] == pytest.approx(0, abs=1e-12)
    assert shift[1] > 0.1
    assert predict.tilted_shift(u, before)[0] > 0.1


def test_tilted_shift_without_pairs_or_responses_is_none():
    assert predict.tilted_shift(np.zeros((0, 3)), np.ones((5, 3))).tolist() == [0, 0, 0]
    assert predict.tilted_shift(np.ones((5, 3)), np.zeros((0, 3))).tolist() == [0, 0, 0]


def test_odds_shift_of_independent_features_is_their_logistic_one():
    """The sides at logit p ± w/2: the start model's log-odds move by w, from p or from any other rate."""
    rng = np.random.default_rng(2)
    p, w = np.array([0.2, 0.5, 0.9, 0.4]), np.array([1.5, -1.0, 1.0, 0.0])
    logit, n = np.log(p / (1 - p)), 400_000
    sides = [rng.binomial(n, 1 / (1 + np.exp(-(logit + side * w / 2)))) for side in (1, -1)]
    for start in (p, np.array([0.3, 0.1, 0.5, 0.9])):
        expected = 1 / (1 + np.exp(-(np.log(start / (1 - start)) + w))) - start
        np.testing.assert_allclose(predict.odds_shift(*sides, n, start), expected, atol=0.01)


def test_odds_shift_stays_within_what_rates_can_do():
    never, always = np.zeros(3), np.full(3, 50.0)
    start = np.array([0.0, 0.4, 1.0])
    for sides in ((never, always), (always, never), (never, never), (always, always)):
        after = start + predict.odds_shift(*sides, 50, start)
        assert ((after >= 0) & (after <= 1)).all()
    assert predict.odds_shift(always, never, 50, start)[1] == pytest.approx(0.6, abs=0.01)
    np.testing.assert_allclose(predict.concept_means(np.arange(4.0), [np.array([0, 3]), np.array([1])]), [1.5, 1.0])


def test_what_every_pair_says_alike_is_no_lack_of_evidence(world):
    """A mark that a pipeline leaves in every chosen response and in no other: the clearest habit that there can be."""
    one = {"u": np.ones((world.n_pairs, 1)), "support": np.array([5]), "shown": None, "shown_above": None}
    scores = replace(views.activity(world, COMMUNITIES), **one)
    for side, verdict in ((1.0, "rises"), (-0.25, "falls"), (0.0, "too few pairs to tell")):
        shown = side * scores.u
        told = replace(scores, u=shown, by_count=shown, v=shown)
        (row,) = predict.concept_table(told, COMMUNITIES[:1], AuditConfig(bootstrap=100)).to_pylist()
        assert (row["verdict"], row["predicted"]) == (verdict, side)


def test_concept_table_says_what_was_planted(world):
    scores = views.activity(world, COMMUNITIES)
    table = predict.concept_table(scores, COMMUNITIES, AuditConfig(bootstrap=500)).to_pylist()
    assert [row["verdict"] for row in table] == ["rises", "falls", "no evidence", "rises"]
    for m, row in enumerate(table):
        u = scores.u[:, m]
        assert row["predicted"] == pytest.approx(u.mean(), abs=1e-12)
        assert row["p"] == pytest.approx(reference.ttest_1samp(u, 0).pvalue, rel=1e-9)
        half = 1.96 * reference.sem(u)
        assert [row["ci_low"], row["ci_high"]] == pytest.approx([u.mean() - half, u.mean() + half], abs=0.2 * half)
        # lengths were drawn without regard to habits
        assert row["length_adjusted"] == pytest.approx(u.mean(), abs=0.02)
        assert row["detectable"] == pytest.approx(2.8016 * reference.sem(u), rel=1e-3)
        assert row["differ"] == (u != 0).sum()
        planted = world.shown["chosen"][list(HABITS)[m]].mean() - world.shown["rejected"][list(HABITS)[m]].mean()
        assert row["predicted"] == pytest.approx(planted, abs=0.05)  # features also fire by chance
        at = {int(r): i for i, r in enumerate(scores.rows)}
        side = 1 if row["predicted"] > 0 else -1
        others = np.abs(scores.u).sum(1) - np.abs(u)
        for telling in row["telling_rows"]:
            assert u[at[telling]] == side
            assert others[at[telling]] <= np.sort(others[u == side])[2] + 0.5
    q = reference.false_discovery_control([row["p"] for row in table])
    np.testing.assert_allclose([row["q"] for row in table], q, rtol=1e-12)


def test_pairs_of_one_prompt_count_as_one_observation(world):
    """Every pair four times: by prompt, nothing is surer than with each pair once; by pair, all looks twice as sure."""
    scores = views.activity(world, COMMUNITIES)
    four = views.Disparity(
        rows=np.tile(scores.rows, 4),
        u=np.tile(scores.u, (4, 1)),
        log_ratio=np.tile(scores.log_ratio, 4),
        lengths={span: np.tile(x, 4) for span, x in scores.lengths.items()},
        support=4 * scores.support,
    )
    config = AuditConfig(bootstrap=2000)
    once, grouped, apart = (
        predict.concept_table(s, COMMUNITIES, config, groups=groups).to_pydict()
        for s, groups in ((scores, None), (four, np.tile(np.arange(world.n_pairs), 4)), (four, None))
    )
    np.testing.assert_allclose(grouped["p"], once["p"], rtol=1e-9)
    np.testing.assert_allclose(grouped["detectable"], once["detectable"], rtol=1e-9)
    for low, high in (("ci_low", "ci_high"), ("length_adjusted_low", "length_adjusted_high")):
        width = [np.subtract(table[high], table[low]) for table in (once, grouped, apart)]
        np.testing.assert_allclose(width[1], width[0], rtol=1e-3)
        np.testing.assert_allclose(width[2], width[0] / 2, rtol=0.15)


def test_few_pairs_are_too_few_to_tell():
    world = make_world(n=20)
    rows = predict.concept_table(views.activity(world, COMMUNITIES), COMMUNITIES, AuditConfig()).to_pylist()
    assert {row["verdict"] for row in rows} == {"too few pairs to tell"}


def test_no_concepts_give_an_empty_table(world):
    table = predict.concept_table(views.activity(world, []), [], AuditConfig())
    assert table.num_rows == 0
    assert table.schema == predict.CONCEPTS


def test_observed_disparity_is_in_the_unit_of_u(world):
    """What `compare` observes, with chosen for "after" and rejected for "before", must be what was predicted."""
    scores = views.activity(world, COMMUNITIES)
    sides = [views.concept_activity(world.frequency(side), COMMUNITIES) for side in ("chosen", "rejected")]
    observed = np.subtract(*sides)
    np.testing.assert_allclose(observed, scores.u, atol=1e-12)
    assert np.array_equal(np.subtract(*activities(world, COMMUNITIES, AuditConfig().tau)), observed)  # shard by shard
    np.testing.assert_allclose(observed.mean(axis=0), predict.predicted_shift(scores.u), atol=1e-12)
    before = sparse.csr_array(np.array([[0.5, 0.005, 0.0]], np.float32))
    after = sparse.csr_array(np.array([[0.5, 0.02, 0.0]], np.float32))
    shares = [views.concept_activity(of, [np.array([0, 1]), np.array([2])], 0.01) for of in (after, before)]
    np.testing.assert_allclose(np.subtract(*shares), [[0.5, 0.0]])


def test_agreement_equals_scipy():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 0.2, 40)
    y = 0.6 * x + rng.normal(0, 0.08, 40)
    result = predict.agreement(np.r_[x, np.nan], np.r_[y, 1.0], seed=1)
    assert result.n == 40
    assert result.r2 == pytest.approx(reference.pearsonr(x, y).statistic ** 2, rel=1e-9)
    assert result.spearman == pytest.approx(reference.spearmanr(x, y).statistic, rel=1e-9)
    assert result.r2_identity == pytest.approx(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-9)
    assert result.r2_low < result.r2 < result.r2_high
    assert result.spearman_low < result.spearman < result.spearman_high
    assert result.r2_identity_low < result.r2_identity < result.r2_identity_high
    assert result.p == pytest.approx(1 / 10_001)
    assert result == predict.agreement(np.r_[x, np.nan], np.r_[y, 1.0], seed=1)


def test_agreement_by_chance_and_agreement_of_the_wrong_sign():
    rng = np.random.default_rng(3)
    p = [predict.agreement(*rng.normal(size=(2, 12)), n_bootstrap=50, n_permutations=400).p for _ in range(200)]
    assert reference.kstest(p, "uniform").pvalue > 0.001
    x = np.linspace(-1, 1, 12)
    wrong = predict.agreement(x, -x, n_permutations=1000)
    assert wrong.r2 == pytest.approx(1)
    assert wrong.pearson == pytest.approx(-1)
    assert wrong.p > 0.99


def test_agreement_without_enough_concepts_is_missing_not_zero():
    result = predict.agreement(np.array([0.1, 0.2]), np.array([0.1, 0.2]))
    assert result.n == 2
    assert np.isnan(result.r2)
    assert result.to_dict()["r2"] is None
    assert np.isnan(predict.agreement(np.ones(5), np.arange(5.0)).p)
