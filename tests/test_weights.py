"""Balanced weights against their definition and closed forms; weights of columns; fits under weights."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from test_plan import CONCEPTS as LETTERS
from test_plan import make_pairs, plan, random_pairs

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.score import Scores
from trl_anatomy.shaping.bradley_terry import fit_strengths
from trl_anatomy.shaping.interventions import ReweightPairs
from trl_anatomy.shaping.located import PolicyError
from trl_anatomy.shaping.plan import plan_policy
from trl_anatomy.shaping.policy import ConceptPolicy


def reference_weights(gaps: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """argmin Σ w log w over mean-one weights with the given mean gaps, by a general solver on the primal."""
    n = len(gaps)
    answer = minimize(
        lambda w: float((w * np.log(np.maximum(w, 1e-300))).sum() / n),
        np.ones(n),
        jac=lambda w: (np.log(np.maximum(w, 1e-300)) + 1) / n,
        bounds=[(1e-12, None)] * n,
        constraints=[
            {"type": "eq", "fun": lambda w: w.mean() - 1, "jac": lambda w: np.full(n, 1 / n)},
            {"type": "eq", "fun": lambda w: (w @ gaps) / n - targets, "jac": lambda w: gaps.T / n},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert answer.success, answer.message
    return answer.x


def test_weights_are_the_closest_to_uniform_that_balance() -> None:
    pairs, scores = random_pairs(60)
    found = plan([{"explain_away": "a", "with": "reweight_pairs"}], pairs, scores)
    gaps = np.stack([scores.gap(name) for name in "abc"], axis=1)
    wanted = reference_weights(gaps, np.array([0.0, gaps[:, 1].mean(), gaps[:, 2].mean()]))
    assert found.weight is not None
    np.testing.assert_allclose(found.weight[pairs.rows], wanted, atol=2e-5)
    assert (found.weight[np.setdiff1d(np.arange(120), pairs.rows)] == 1).all()


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ({"explain_away": "a"}, 0.0),
        ({"explain_away": "a", "strength": 0.25}, 0.75),
        ({"explain_away": "c"}, 0.0),  # punished: brought back to zero from below
        ({"amplify": "a", "strength": 0.4}, 1.4),
    ],
)
@pytest.mark.parametrize("hold", [None, ["b"], []])
def test_means_are_where_the_rule_wants_them(rule: dict[str, Any], factor: float, hold: list[str] | None) -> None:
    pairs, scores = random_pairs()
    [name] = [rule[key] for key in ("explain_away", "amplify") if key in rule]
    held = [other for other in "abc" if other != name] if hold is None else hold
    more = {} if hold is None else {"hold": hold}
    found = plan([{**rule, **more, "with": "reweight_pairs"}], pairs, scores)
    weight = found.weight[pairs.rows]  # type: ignore[index]
    assert (weight > 0).all()
    assert weight.mean() == pytest.approx(1, abs=1e-12)
    assert np.mean(weight * scores.gap(name)) == pytest.approx(factor * scores.gap(name).mean(), abs=1e-10)
    for other in held:
        assert np.mean(weight * scores.gap(other)) == pytest.approx(scores.gap(other).mean(), abs=1e-10)
    [record] = found.rules
    assert record["effective_pairs"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert record["strength"] == pytest.approx(1 - factor)
    assert (record["rows"], record["stage"], record["mean_offset"]) == (400, "weight", None)
    assert record["gradient_removed"] == pytest.approx(np.maximum(1 - weight, 0).mean())
    assert record["gradient_share"] == pytest.approx(0, abs=1e-12)
    assert all(other in record["note"] for other in held)


def test_a_text_rule_has_closed_form_weights() -> None:
    """Gaps +1, −1, 0 from 30, 10, 60 of 100 pairs: e^-θ·30 = e^θ·10, so e^θ = √3, over the mean."""
    gap = np.repeat([1.0, -1.0, 0.0], [30, 10, 60])
    pairs, _ = random_pairs(100)
    scores = Scores(("a",), {"a": gap}, {"a": np.zeros(100)})
    found = plan_only_a([{"explain_away": "a", "with": "reweight_pairs"}], pairs, scores)
    mean = (30 / 3**0.5 + 10 * 3**0.5 + 60) / 100
    expected = np.repeat([3**-0.5, 3**0.5, 1.0], [30, 10, 60]) / mean
    np.testing.assert_allclose(found.weight[pairs.rows], expected, rtol=1e-10)


def plan_only_a(rules: list[dict[str, Any]], pairs: Any, scores: Scores) -> Any:
    return plan_policy(ConceptPolicy.load({"concepts": {"a": LETTERS["a"]}, "rules": rules}), pairs, scores)


def test_rules_with_one_gate_are_solved_jointly_and_count_once() -> None:
    pairs, scores = random_pairs()
    rules = [{"explain_away": name, "with": "reweight_pairs"} for name in "ab"]
    found = plan(rules, pairs, scores)
    weight = found.weight[pairs.rows]  # type: ignore[index]
    assert np.abs([np.mean(weight * scores.gap(name)) for name in "ab"]).max() < 1e-10
    assert np.mean(weight * scores.gap("c")) == pytest.approx(scores.gap("c").mean(), abs=1e-10)
    assert found.rules[0]["rows"] == 400
    assert found.rules[1]["rows"] == 0
    assert "together with rule 1" in found.rules[1]["note"]
    again = plan(rules[::-1], pairs, scores)
    np.testing.assert_allclose(again.weight, found.weight, rtol=1e-8)


def test_gates_that_overlap_agree() -> None:
    pairs, scores = random_pairs()
    poem = np.array([pairs.raw[int(row)]["prompt"].startswith("poem") for row in pairs.rows])
    flag = np.array([pairs.raw[int(row)]["flag"] for row in pairs.rows])
    rules: list[dict[str, Any]] = [
        {"explain_away": "a", "with": "reweight_pairs", "where": {"prompt": "^poem"}},
        {"explain_away": "b", "with": "reweight_pairs", "where": {"column": "flag", "equals": True}},
    ]
    found = plan(rules, pairs, scores)
    weight = found.weight[pairs.rows]  # type: ignore[index]
    for gate, name in ((poem, "a"), (flag, "b")):
        assert abs(np.mean((weight * scores.gap(name))[gate])) < 1e-10
        assert np.mean(weight[gate]) == pytest.approx(1, abs=1e-10)
        assert np.mean((weight * scores.gap("c"))[gate]) == pytest.approx(scores.gap("c")[gate].mean(), abs=1e-10)
    assert (weight[~poem & ~flag] == 1).all()
    assert 1 + sum(rule["gradient_share"] for rule in found.rules) == pytest.approx(weight.mean(), abs=1e-12)


def test_weights_see_the_pairs_that_stay_and_the_fit_sees_the_weights() -> None:
    pairs, scores = random_pairs()
    rules = [
        {"explain_away": "a", "with": "shape_reward"},
        {"explain_away": "b", "with": "reweight_pairs", "hold": []},
        {"explain_away": "c", "with": "filter_pairs", "fraction": 0.1},
    ]
    found = plan(rules, pairs, scores)
    kept = found.keep[pairs.rows]
    weight = found.weight[pairs.rows]  # type: ignore[index]
    assert kept.sum() == 360
    assert abs(np.mean((weight * scores.gap("b"))[kept])) < 1e-10
    margin = (found.chosen_offset - found.rejected_offset)[pairs.rows]
    assert abs(np.sum((weight * expit(-margin) * scores.gap("a"))[kept])) < 1e-9
    assert found.rules[0]["strength"] != pytest.approx(plan(rules[::2], pairs, scores).rules[0]["strength"], rel=1e-3)
    after = (weight * expit(-margin) * kept).sum() / 200
    assert 1 + sum(rule["gradient_share"] for rule in found.rules) == pytest.approx(after, rel=1e-12)
    # What the weights took away, no offset has to
    both = plan([{"explain_away": "b", "with": "shape_reward"}, rules[1]], pairs, scores)
    assert both.rules[0]["strength"] == pytest.approx(0, abs=1e-9)


def test_weighted_fit() -> None:
    """Whole weights are repeated pairs; the unit of the weights does not matter; weight 0 is a pair left out."""
    rng = np.random.default_rng(0)
    gaps, offset = rng.normal(0.3, 1, (200, 2)), rng.normal(size=200)
    count = rng.integers(0, 4, 200)
    fit = fit_strengths(gaps, ["a", "b"], offset, count * 0.1)
    repeated = fit_strengths(np.repeat(gaps, count, axis=0), ["a", "b"], np.repeat(offset, count))
    np.testing.assert_allclose(fit.strength, repeated.strength, rtol=1e-9)
    left = fit_strengths(gaps[count > 0], ["a", "b"], offset[count > 0])
    same = fit_strengths(gaps, ["a", "b"], offset, (count > 0).astype(float))
    for part in ("strength", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(same, part), getattr(left, part), rtol=1e-9)


def test_the_interval_of_a_weighted_fit_covers() -> None:
    """Over 400 draws of the labels, 95 % intervals hold the truth about that often; counts would give a lower share."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1))
    weight = rng.choice([0.1, 4.0], 300)
    hits = 0
    for _ in range(400):
        label = np.where(rng.random(300) < expit(x[:, 0]), 1, -1)
        fit = fit_strengths(x * label[:, None], ["a"], None, weight)
        hits += int(fit.ci_low[0] <= 1 <= fit.ci_high[0])
    assert 0.92 < hits / 400 < 0.98


# --- columns ---


def column_pairs(values: list[Any]) -> tuple[Any, Scores]:
    pairs, scores = random_pairs(len(values) // 2)
    return make_pairs(pairs.raw.add_column("weight", values), pairs.rows), scores


def test_a_column_is_used_as_it_is() -> None:
    values = np.random.default_rng(0).uniform(0, 5, 80)
    pairs, scores = column_pairs(values.tolist())
    rule: dict[str, Any] = {"with": "reweight_pairs", "column": "weight"}
    found = plan([rule], pairs, scores)
    np.testing.assert_array_equal(found.weight, values)  # rows that were not scored included
    assert (found.rules[0]["concept"], found.rules[0]["sign"], found.rules[0]["strength"]) == (None, None, None)
    twice = plan([rule, rule], pairs, scores)
    np.testing.assert_allclose(twice.weight, values**2)
    gated = plan([{**rule, "where": {"prompt": "^poem"}}], pairs, scores)
    poem = np.array([row["prompt"].startswith("poem") for row in pairs.raw]) & np.isin(np.arange(80), pairs.rows)
    np.testing.assert_array_equal(gated.weight, np.where(poem, values, 1))
    # Balanced weights on top balance the product, closest to the column
    both = plan([rule, {"explain_away": "a", "with": "reweight_pairs"}], pairs, scores)
    weight = both.weight[pairs.rows]  # type: ignore[index]
    base = values[pairs.rows]
    assert abs(weight @ scores.gap("a")) / len(weight) < 1e-9
    assert weight.sum() == pytest.approx(base.sum())
    assert weight @ scores.gap("b") == pytest.approx(base @ scores.gap("b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.5], r"holds -0.5 in row 1 \(10 such rows\), allowed: finite weights of at least 0"),
        ([1.0, None], r"holds None in row 1"),
        ([1.0, float("nan")], r"holds nan in row 1"),
        ([1.0, float("inf")], r"holds inf in row 1"),
        (["1", "2"], r"holds something else than numbers"),
        ([[1.0], [2.0]], r"holds something else than numbers"),
        ([0.0, 0.0], r"every pair that is kept weighs 0"),
    ],
)
def test_columns_that_are_no_weights(values: list[Any], message: str) -> None:
    pairs, scores = column_pairs(values * 10)
    with pytest.raises(AnatomyError, match=message):
        plan([{"with": "reweight_pairs", "column": "weight"}], pairs, scores)


# --- what cannot be ---

AWAY = {"explain_away": "a", "with": "reweight_pairs"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"explain_away": "a", "strength": 1.5}, "found 1.5 with explain_away, allowed: a number above 0, at most 1"),
        ({"amplify": "a"}, "found no strength with amplify"),
        ({"explain_away": "a", "hold": ["a"]}, "found 'a', the rule's own concept, in hold"),
        ({"explain_away": "a", "hold": ["d"]}, r"rules\[0\].hold: found the concept 'd', allowed: a, b, c"),
        ({"explain_away": "a", "hold": "b"}, "found 'b', allowed: a list of names"),
        ({"explain_away": "a", "hold": ["b", "b"]}, "A name occurs twice"),
        ({"explain_away": "a", "column": "w"}, r"rules\[0\].column: found explain_away or amplify beside column"),
        ({"column": "w", "strength": 0.5}, "found strength beside column"),
        ({"column": "w", "hold": []}, "found hold beside column"),
        ({}, "neither explain_away nor amplify"),
    ],
)
def test_keys_that_do_not_go_together(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        ConceptPolicy.load({"concepts": LETTERS, "rules": [{**rule, "with": "reweight_pairs"}]})


def test_other_verbs_still_need_a_concept() -> None:
    with pytest.raises(PolicyError, match="neither explain_away nor amplify"):
        ConceptPolicy.load({"concepts": LETTERS, "rules": [{"with": "filter_pairs", "column": "w"}]})
    with pytest.raises(AnatomyError, match="found no concept"):
        ReweightPairs(sign="explain_away")


def test_what_no_weights_reach() -> None:
    pairs, scores = random_pairs(100)
    zero = np.zeros(100)
    shown = (np.arange(100) < 30).astype(float)
    one_sided = Scores(("a", "b", "c"), {"a": shown, "b": zero, "c": zero}, dict.fromkeys("abc", zero))
    with pytest.raises(PolicyError, match=r"'a' from 0.3 to 0: in all 30 pairs .* chosen .* strength below 1, or drop"):
        plan([AWAY], pairs, one_sided)
    assert plan([{**AWAY, "strength": 0.9}], pairs, one_sided).weight is not None
    with pytest.raises(PolicyError, match=r"from 0.3 to 1.2: .* from 0 to 1. Give a smaller strength"):
        plan([{"amplify": "a", "with": "reweight_pairs", "strength": 3}], pairs, one_sided)
    with pytest.raises(PolicyError, match="the pairs punish 'c'"):
        plan([{"amplify": "c", "with": "reweight_pairs", "strength": 1}], pairs, scores)
    twins = Scores(
        ("a", "b", "c"), {**scores.chosen, "b": scores.chosen["a"]}, {**scores.rejected, "b": scores.rejected["a"]}
    )
    with pytest.raises(
        PolicyError, match=r"no weights take the mean gap of 'a' .* while 'b', 'c' stay.*hold: \[\.\.\.\]"
    ):
        plan([AWAY], pairs, twins)
    gap = np.where(np.arange(100) < 2, 60.0, -1.0 + 2 * (np.arange(100) % 2))
    rare = Scores(("a", "b", "c"), {"a": gap, "b": zero, "c": zero}, dict.fromkeys("abc", zero))
    with pytest.raises(PolicyError, match=r"the weights rest on \d\.\d of 100 pairs"):
        plan([{"amplify": "a", "with": "reweight_pairs", "strength": 40}], pairs, rare)
    with pytest.raises(PolicyError, match=r"rules\[1\]: found a second reweight_pairs rule for 'a'"):
        plan([AWAY, {**AWAY, "strength": 0.5}], pairs, scores)
    with pytest.raises(PolicyError, match=r"rules\[0\]: found 'b' in hold, and another"):
        plan([{**AWAY, "hold": ["b"]}, {"explain_away": "b", "with": "reweight_pairs"}], pairs, scores)


def test_a_concept_without_gaps_touches_nothing() -> None:
    pairs, scores = random_pairs(20)
    flat = Scores(scores.names, {**scores.chosen, "a": np.ones(20)}, {**scores.rejected, "a": np.ones(20)})
    found = plan([AWAY], pairs, flat)
    np.testing.assert_allclose(found.weight, 1)
