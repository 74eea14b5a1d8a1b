"""The plan against closed forms, independent fits and float64 gradients of the loss that it stands for."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from audit_world import World, make_audit, make_world, raw_dataset
from datasets import Dataset
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from trl_anatomy.audit.folder import Audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.score import Scores, score_pairs
from trl_anatomy.reading.scorers.text import TextScorer
from trl_anatomy.reading.spans import Pairs
from trl_anatomy.shaping.bradley_terry import fit_strengths
from trl_anatomy.shaping.plan import PolicyPlan, plan_json, plan_policy, plan_report
from trl_anatomy.shaping.policy import ConceptPolicy

CONCEPTS = {name: {"scorer": "text", "pattern": name} for name in ("a", "b", "c")}


def make_pairs(raw: Dataset, rows: np.ndarray) -> Pairs:
    """Pairs whose tokens are the characters of their text."""
    ids = {
        f"{span}_ids": [[ord(c) for c in raw[int(r)][span]] for r in rows] for span in ("prompt", "chosen", "rejected")
    }
    tokens = Dataset.from_dict({**ids, "row": np.asarray(rows).tolist()})
    return Pairs(tokens, raw, None, "keep_start", 0, None, {"empty response": len(raw) - len(rows)})


def random_pairs(n: int = 400, seed: int = 0) -> tuple[Pairs, Scores]:
    """n pairs, on every other row of a dataset of 2n rows, and scores of three correlated concepts."""
    rng = np.random.default_rng(seed)
    raw = Dataset.from_dict(
        {
            "prompt": [f"{'poem' if i % 6 < 2 else 'sum'} {i}" for i in range(2 * n)],
            "chosen": ["yes"] * (2 * n),
            "rejected": ["no"] * (2 * n),
            "topic": rng.choice(["x", "y", "z"], 2 * n).tolist(),
            "flag": (rng.random(2 * n) < 0.5).tolist(),
        }
    )
    mixed = rng.normal(size=(2, n, 3)) @ np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 2.0]])
    mixed[0] += [0.5, 0.9, -0.8]
    names = tuple(CONCEPTS)
    scores = Scores(names, *({name: side[:, i] for i, name in enumerate(names)} for side in mixed))
    return make_pairs(raw, np.arange(0, 2 * n, 2)), scores


def plan(rules: list[dict[str, Any]], pairs: Pairs, scores: Scores, **kwargs: Any) -> PolicyPlan:
    return plan_policy(ConceptPolicy.load({"concepts": CONCEPTS, "rules": rules}), pairs, scores, **kwargs)


def standard(scores: Scores, name: str, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pooled = np.concatenate([scores.chosen[name][kept], scores.rejected[name][kept]])
    return tuple((side[name] - pooled.mean()) / pooled.std() for side in (scores.chosen, scores.rejected))  # type: ignore[return-value]


# The fit


def numeric_errors(gaps: np.ndarray, offset: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Standard errors from torch's own second derivatives of the likelihood."""
    x, o = torch.tensor(gaps), torch.tensor(offset)
    hessian = torch.autograd.functional.hessian(
        lambda b: torch.nn.functional.softplus(-(x @ b + o)).sum(), torch.tensor(at)
    )
    return torch.linalg.inv(hessian).diagonal().sqrt().numpy()


@pytest.mark.parametrize(("k", "seed"), [(1, 0), (2, 1), (3, 2), (6, 3)])
def test_fit_equals_logistic_regression_on_mirrored_pairs(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps = rng.normal(size=(500, k)) @ rng.normal(size=(k, k)) * rng.uniform(0.01, 100, k)
    truth = rng.normal(size=k) / np.abs(gaps).mean(axis=0)
    gaps *= np.where(rng.random(500) < expit(gaps @ truth), 1, -1)[:, None]
    fit = fit_strengths(gaps, [f"c{i}" for i in range(k)])
    scale = np.abs(gaps).mean(axis=0)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    model.fit(np.concatenate([gaps, -gaps]) / scale, [1] * 500 + [0] * 500)
    np.testing.assert_allclose(fit.strength * scale, model.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(expit(-(gaps @ fit.strength)) @ gaps / np.abs(gaps).sum(axis=0), 0, atol=1e-14)
    error = numeric_errors(gaps, np.zeros(500), fit.strength)
    np.testing.assert_allclose(fit.ci_high - fit.strength, 1.959964 * error, rtol=1e-5)
    np.testing.assert_allclose(fit.strength - fit.ci_low, 1.959964 * error, rtol=1e-5)


def test_fit_with_a_margin_that_is_there_already() -> None:
    rng = np.random.default_rng(0)
    gaps, offset = rng.normal(0.3, 1, (300, 2)), rng.normal(0, 2, 300)
    fit = fit_strengths(gaps, ["a", "b"], offset)
    best = minimize(lambda b: np.logaddexp(0, -(gaps @ b + offset)).sum(), np.zeros(2), tol=1e-10)
    np.testing.assert_allclose(fit.strength, best.x, atol=1e-4)
    np.testing.assert_allclose(expit(-(gaps @ fit.strength + offset)) @ gaps, 0, atol=1e-10)
    np.testing.assert_allclose(
        fit.ci_high - fit.strength, 1.959964 * numeric_errors(gaps, offset, fit.strength), rtol=1e-6
    )


@pytest.mark.parametrize(("up", "down"), [(700, 300), (999, 1), (1, 999), (5, 5)])
def test_fit_of_a_text_rule_is_the_log_odds(up: int, down: int) -> None:
    gaps = np.array([1.0] * up + [-1.0] * down + [0.0] * 100)[:, None]
    fit = fit_strengths(gaps, ["a"])
    error = math.sqrt(1 / up + 1 / down)
    assert fit.strength[0] == pytest.approx(math.log(up / down), abs=1e-10)
    assert fit.ci_low[0] == pytest.approx(math.log(up / down) - 1.959964 * error, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e9, 1e150])
def test_fit_knows_no_unit(scale: float) -> None:
    gaps = np.random.default_rng(0).normal(0.2, 1, (100, 2))
    np.testing.assert_allclose(
        fit_strengths(gaps * scale, ["a", "b"]).strength * scale, fit_strengths(gaps, ["a", "b"]).strength, rtol=1e-9
    )


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ([[1.0], [2.0], [0.0]], "the chosen one scores higher"),
        ([[-1.0], [-2.0], [0.0]], "the rejected one scores higher"),
        ([[0.0], [0.0]], "score alike"),
        ([[1.0, 0.0], [-1.0, 0.0]], "b: both responses score alike"),
        # Neither column separates, their sum does
        ([[2.0, -1.0], [-1.0, 2.0], [1.0, 1.0]], "a, b together: a sum of their scores"),
        # ... and only in part: zero everywhere but in one pair
        ([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [2.0, -1.0]], "a, b together: a sum of their scores"),
        ([[1.0, 2.0], [-1.0, -2.0], [3.0, 6.0]], "rise and fall as one"),
        ([[1.0]] * 100_000 + [[-1e-9]], "nearly all pairs point the same way"),
    ],
)
def test_no_finite_fit(gaps: list[list[float]], message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        fit_strengths(np.array(gaps), ["a", "b"][: len(gaps[0])])


# The plan


def test_the_empty_policy_touches_nothing() -> None:
    pairs, scores = random_pairs()
    found = plan_policy(ConceptPolicy.load(None), pairs, scores)
    assert found.keep.shape == (800,)
    assert found.keep.all()
    assert not found.chosen_offset.any()
    assert not found.rejected_offset.any()
    assert (found.rules, found.predicted) == ([], None)
    assert "TRL's own" in plan_report(found)


@pytest.mark.parametrize("rules", [["a"], ["a", "b"], ["c", "a", "b"]])
def test_auto_leaves_the_loss_without_pull_along_the_concepts(rules: list[str]) -> None:
    """d/dtheta of the mean of -log σ(β·D + offsets) is 0 at a policy that starts to follow the concepts."""
    pairs, scores = random_pairs()
    found = plan([{"explain_away": name, "with": "shape_reward"} for name in rules], pairs, scores)
    margin = torch.tensor((found.chosen_offset - found.rejected_offset)[pairs.rows])
    gaps = torch.tensor(np.stack([scores.gap(name) for name in rules], axis=1))
    theta = torch.zeros(len(rules), dtype=torch.float64, requires_grad=True)
    torch.nn.functional.softplus(-(0.1 * gaps @ theta + margin)).mean().backward()
    assert theta.grad is not None
    assert theta.grad.abs().max() < 1e-12
    for rule in found.rules:
        assert rule["ci_low"] < rule["strength"] < rule["ci_high"]
        assert (rule["rows"], rule["pairs"]) == (400, 400)


def test_auto_takes_fixed_rules_into_account() -> None:
    pairs, scores = random_pairs()
    rules = [
        {"amplify": "b", "with": "shape_reward", "strength": 1.5},
        {"explain_away": "a", "with": "shape_reward"},
    ]
    found = plan(rules, pairs, scores)
    margin = (found.chosen_offset - found.rejected_offset)[pairs.rows]
    assert abs(expit(-margin) @ scores.gap("a")) < 1e-9
    assert found.rules[0]["strength"] == -1.5
    assert found.rules[0]["ci_low"] is None
    alone = plan(rules[1:], pairs, scores)
    assert abs(alone.rules[0]["strength"] - found.rules[1]["strength"]) > 0.1


def test_a_punished_concept_gets_a_negative_strength_and_a_word() -> None:
    pairs, scores = random_pairs()
    [rule] = plan([{"explain_away": "c", "with": "shape_reward"}], pairs, scores).rules
    assert rule["strength"] < 0
    assert "punish" in rule["note"]


def test_offsets_are_the_standard_scores_times_the_strength() -> None:
    pairs, scores = random_pairs()
    found = plan([{"explain_away": "a", "with": "shape_reward", "strength": 3}], pairs, scores)
    chosen, rejected = standard(scores, "a", np.ones(400, bool))
    np.testing.assert_allclose(found.chosen_offset[pairs.rows], 3 * chosen, rtol=1e-12)
    np.testing.assert_allclose(found.rejected_offset[pairs.rows], 3 * rejected, rtol=1e-12)
    unscored = np.setdiff1d(np.arange(800), pairs.rows)
    assert not found.chosen_offset[unscored].any()
    assert found.keep.all()
    more = plan([{"amplify": "a", "with": "shape_reward", "strength": 3}], pairs, scores)
    np.testing.assert_array_equal(more.chosen_offset, -found.chosen_offset)


def test_rows_go_first_and_margins_see_the_pairs_that_stay() -> None:
    pairs, scores = random_pairs()
    rules = [
        {"explain_away": "a", "with": "shape_reward"},
        {"explain_away": "b", "with": "filter_pairs", "fraction": 0.2},
        {"amplify": "c", "with": "filter_pairs", "fraction": 0.1},
    ]
    found = plan(rules, pairs, scores)
    gone = {int(i) for i in np.argsort(-scores.gap("b"))[:80]} | {int(i) for i in np.argsort(scores.gap("c"))[:40]}
    kept = ~np.isin(np.arange(400), list(gone))
    np.testing.assert_array_equal(found.keep[pairs.rows], kept)
    chosen, rejected = standard(scores, "a", kept)
    fit = fit_strengths((chosen - rejected)[kept, None], ["a"])
    assert found.rules[0]["strength"] == pytest.approx(fit.strength[0], rel=1e-9)
    np.testing.assert_allclose(
        found.chosen_offset[pairs.rows], np.where(kept, fit.strength[0] * chosen, 0), rtol=1e-9, atol=1e-15
    )
    np.testing.assert_allclose((found.chosen_offset + found.rejected_offset).sum(), 0, atol=1e-9)
    # The order of the rules in the policy changes nothing but the order of the records
    again = plan(rules[::-1], pairs, scores)
    np.testing.assert_array_equal(again.keep, found.keep)
    np.testing.assert_allclose(again.chosen_offset, found.chosen_offset, rtol=1e-12)
    # Rows with an empty response train: these pairs leave them out, and that is said
    assert found.counts == {"rows": 800, "pairs": 400, "pairs_kept": int(kept.sum()), "untouched": 400}


GATES = {
    "column": ({"column": "topic", "equals": "x"}, lambda row: row["topic"] == "x"),
    "columns": ({"column": "topic", "in": ["x", "z"]}, lambda row: row["topic"] in "xz"),
    "bool": ({"column": "flag", "equals": True}, lambda row: row["flag"]),
    "prompt": ({"prompt": r"^poem \d"}, lambda row: row["prompt"].startswith("poem")),
}


@pytest.mark.parametrize("gate", GATES)
def test_outside_its_gate_a_rule_does_nothing(gate: str) -> None:
    pairs, scores = random_pairs()
    where, is_inside = GATES[gate]
    inside = np.array([is_inside(pairs.raw[int(row)]) for row in pairs.rows])
    assert 0.2 < inside.mean() < 0.8
    found = plan([{"explain_away": "a", "with": "shape_reward", "where": where}], pairs, scores)
    offsets = np.stack([found.chosen_offset, found.rejected_offset])[:, pairs.rows]
    assert not offsets[:, ~inside].any()
    np.testing.assert_allclose(offsets.sum(), 0, atol=1e-10)
    margin = offsets[0] - offsets[1]
    assert abs(expit(-margin[inside]) @ scores.gap("a")[inside]) < 1e-9
    assert found.rules[0]["pairs"] == found.rules[0]["rows"] == inside.sum()
    dropped = plan([{"explain_away": "a", "with": "filter_pairs", "fraction": 0.1, "where": where}], pairs, scores)
    gone = ~dropped.keep[pairs.rows]
    assert gone.sum() == math.floor(inside.sum() * 0.1)
    assert inside[gone].all()


def test_a_constant_is_half_on_each_side_of_every_pair_in_the_gate() -> None:
    pairs, scores = random_pairs()
    flat = Scores(scores.names, {**scores.chosen, "a": np.ones(400)}, {**scores.rejected, "a": np.ones(400)})
    inside = np.array([pairs.raw[int(row)]["topic"] == "x" for row in pairs.rows])
    where = {"column": "topic", "equals": "x"}
    for sign, size in (("explain_away", 2.0), ("amplify", -2.0)):
        rules = [{sign: "a", "with": "shape_reward", "constant": 2, "where": where}]
        found = plan(rules, pairs, flat)  # what the concept scores does not matter
        np.testing.assert_array_equal(found.chosen_offset[pairs.rows], np.where(inside, size / 2, 0))
        np.testing.assert_array_equal(found.rejected_offset[pairs.rows], np.where(inside, -size / 2, 0))
        [rule] = found.rules
        assert (rule["strength"], rule["mean_offset"], rule["scale"], rule["ci_low"]) == (size, size, None, None)
        assert rule["rows"] == inside.sum()
    # A fit starts from what the constant already says
    found = plan([*rules, {"explain_away": "b", "with": "shape_reward"}], pairs, scores)
    margin = (found.chosen_offset - found.rejected_offset)[pairs.rows]
    assert abs(expit(-margin) @ scores.gap("b")) < 1e-9


def test_whole_clusters_and_sides_can_be_dropped() -> None:
    pairs, scores = random_pairs()
    inside = np.array([pairs.raw[int(row)]["topic"] == "x" for row in pairs.rows])
    where = {"column": "topic", "equals": "x"}
    found = plan([{"explain_away": "a", "with": "filter_pairs", "fraction": "all", "where": where}], pairs, scores)
    np.testing.assert_array_equal(found.keep[pairs.rows], ~inside)
    assert found.rules[0]["rows"] == found.rules[0]["pairs"] == inside.sum()
    found = plan([{"explain_away": "a", "with": "filter_pairs", "side": "either", "above": 1}], pairs, scores)
    shows = np.maximum(scores.chosen["a"], scores.rejected["a"]) > 1
    np.testing.assert_array_equal(found.keep[pairs.rows], ~shows)
    found = plan([{"amplify": "a", "with": "filter_pairs", "above": 1}], pairs, scores)
    np.testing.assert_array_equal(found.keep[pairs.rows], scores.gap("a") >= -1)
    for rule, note in (
        ({"side": "chosen", "above": 99}, "no chosen response scores above 99"),
        ({"side": "either", "above": 99}, "neither response scores above 99"),
        ({"above": 99}, "the chosen response scores higher by more than 99 in no pair"),
    ):
        found = plan([{"explain_away": "a", "with": "filter_pairs", **rule}], pairs, scores)
        assert found.keep.all()
        assert note in found.rules[0]["note"]


def test_two_gates_of_one_concept_are_fitted_apart() -> None:
    pairs, scores = random_pairs()
    topics = np.array([pairs.raw[int(row)]["topic"] for row in pairs.rows])
    rule = {"explain_away": "a", "with": "shape_reward"}
    found = plan([{**rule, "where": {"column": "topic", "equals": t}} for t in "xy"], pairs, scores)
    margin = (found.chosen_offset - found.rejected_offset)[pairs.rows]
    for topic in "xy":
        assert abs(expit(-margin) @ np.where(topics == topic, scores.gap("a"), 0)) < 1e-9
    assert found.rules[0]["strength"] != pytest.approx(found.rules[1]["strength"], rel=1e-3)


@pytest.mark.parametrize(
    ("rules", "messages"),
    [
        (
            [{"explain_away": "a", "with": "shape_reward", "where": {"column": "subject", "equals": "x"}}],
            [r"rules\[0\]: where: the dataset has no column 'subject'; found: prompt, chosen"],
        ),
        (
            [
                {"explain_away": "a", "with": "shape_reward", "where": {"column": "topic", "equals": "q"}},
                {"explain_away": "b", "with": "shape_reward", "where": {"column": "flag", "equals": 1}},
                {"explain_away": "b", "with": "shape_reward", "where": {"prompt": "sonnet"}},
                {"explain_away": "c", "with": "shape_reward", "where": {"data": "B3"}},
                {"explain_away": "c", "with": "shape_reward", "where": {"prompts": "A3"}},
            ],
            [
                r"rules\[0\]: where: no pair has topic = q \(the column holds, for example, 'x', 'y', 'z'\)",
                r"rules\[1\]: where: no pair has flag = 1",
                r"rules\[2\]: where: no pair has prompt ~ sonnet",
                r"rules\[3\]: where: data: B3 is a context of an audit, and no audit was given",
                r"rules\[4\]: where: prompts: A3 is a context of an audit, and no audit was given",
            ],
        ),
        (
            [
                {"explain_away": "a", "with": "shape_reward", "where": {"prompt": "poem"}},
                {"amplify": "a", "with": "filter_pairs", "fraction": 0.1, "where": {"column": "topic", "equals": "x"}},
            ],
            [r"rules\[1\]: found amplify: a, but rules\[0\] says explain_away for \d+ of the same pairs"],
        ),
        (
            [{"explain_away": "a", "with": "shape_reward"}, {"explain_away": "a", "with": "shape_reward"}],
            [r"rules\[0\]: strength: auto cannot be fitted for 'a', 'a' together: their scores rise and fall as one"],
        ),
    ],
)
def test_what_cannot_be_planned_is_told_by_rule(rules: list[dict[str, Any]], messages: list[str]) -> None:
    pairs, scores = random_pairs()
    with pytest.raises(AnatomyError) as caught:
        plan(rules, pairs, scores)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.match(f"policy: {message}", line), line


def test_scores_that_cannot_be_used() -> None:
    pairs, scores = random_pairs(20)
    shape = [{"explain_away": "a", "with": "shape_reward", "strength": 1}]
    flat = Scores(scores.names, {**scores.chosen, "a": np.full(20, 0.3)}, {**scores.rejected, "a": np.full(20, 0.3)})
    with pytest.raises(AnatomyError, match=r"rules\[0\]: the concept 'a' scores 0.3 on every response"):
        plan(shape, pairs, flat)
    scores.chosen["a"][3] = np.nan
    with pytest.raises(AnatomyError, match="'a' hold NaN"):
        plan(shape, pairs, scores)


def test_a_policy_that_drops_every_pair() -> None:
    pairs, _ = random_pairs(40)
    rising = np.arange(1.0, 41)
    scores = Scores(("a", "b"), {"a": rising, "b": rising[::-1]}, {"a": np.zeros(40), "b": np.zeros(40)})
    rules = [{"explain_away": name, "with": "filter_pairs", "fraction": 0.99} for name in "ab"]
    assert plan(rules[:1], pairs, scores).keep[pairs.rows].sum() == 1
    with pytest.raises(AnatomyError, match="leave no pair"):
        plan(rules, pairs, scores)


def test_a_filter_too_small_for_one_pair_says_so() -> None:
    pairs, scores = random_pairs(40)
    found = plan([{"explain_away": "a", "with": "filter_pairs", "fraction": 0.02}], pairs, scores)
    assert found.keep.all()
    assert "less than one pair" in found.rules[0]["note"]


def test_gradient_shares_add_up_to_what_changes() -> None:
    pairs, scores = random_pairs()
    rules = [
        {"explain_away": "a", "with": "filter_pairs", "fraction": 0.1},
        {"explain_away": "b", "with": "shape_reward"},
        {"amplify": "c", "with": "shape_reward", "strength": 0.7, "where": {"column": "topic", "equals": "x"}},
        {"explain_away": "b", "with": "filter_pairs", "fraction": 0.1},
    ]
    found = plan(rules, pairs, scores)
    margin = (found.chosen_offset - found.rejected_offset)[pairs.rows]
    after = (expit(-margin) * found.keep[pairs.rows]).sum() / 200
    assert 1 + sum(rule["gradient_share"] for rule in found.rules) == pytest.approx(after, rel=1e-12)
    filtered = [found.rules[0], found.rules[3]]
    assert filtered[0]["gradient_removed"] == pytest.approx(0.1)
    both = np.isin(np.arange(400), np.argsort(-scores.gap("a"))[:40]).astype(int)
    both += np.isin(np.arange(400), np.argsort(-scores.gap("b"))[:40])
    assert filtered[1]["rows"] == 40
    assert filtered[1]["gradient_removed"] == pytest.approx(((both > 0).sum() - 40) / 400)
    assert all(rule["gradient_removed"] >= 0 <= rule["gradient_added"] for rule in found.rules)
    assert [rule["mean_offset"] is None for rule in found.rules] == [True, False, False, True]


# With an audit


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(600)


@pytest.fixture(scope="module")
def pairs(world: World) -> Pairs:
    return make_pairs(raw_dataset(world), world.rows)


@pytest.fixture(scope="module")
def audit(world: World, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    audit = make_audit(tmp_path_factory.mktemp("audit"), world)
    audit.info["data"]["fingerprint"] = pairs.fingerprint
    return audit


BOLD = {"concepts": {"bold": {"scorer": "text", "pattern": r"\*\*"}}}


def plan_bold(rule: dict[str, Any], pairs: Pairs, audit: Audit) -> PolicyPlan:
    policy = ConceptPolicy.load({**BOLD, "rules": [{"explain_away": "bold", **rule}]})
    scores = score_pairs(pairs, {"bold": TextScorer(r"\*\*")}, progress=False)
    return plan_policy(policy, pairs, scores, audit=audit)


def test_predicted_shift_under_the_policy(world: World, pairs: Pairs, audit: Audit) -> None:
    found = plan_bold({"with": "shape_reward"}, pairs, audit)
    assert found.predicted is not None
    u, names = audit.disparity()
    assert found.predicted["concept"].to_pylist() == names
    np.testing.assert_allclose(found.predicted["predicted"], audit.concepts["predicted"], atol=1e-12)
    gap = world.shown["chosen"]["bold"].astype(float) - world.shown["rejected"]["bold"]
    strength = math.log((gap > 0).sum() / (gap < 0).sum())
    np.testing.assert_allclose(
        found.predicted["predicted_under_policy"], (2 * expit(-strength * gap)) @ u / len(u), atol=1e-10
    )
    # The planted habit is a concept of the audit; it is predicted to move, and not to move under the policy.
    [bold] = [i for i in range(len(names)) if set(audit.features(names[i])) == {0, 1, 2, 3}]
    row = found.predicted.slice(bold, 1).to_pylist()[0]
    assert row["predicted"] > 0.3
    assert abs(row["predicted_under_policy"]) < 0.01


def test_predicted_shift_under_a_filter(pairs: Pairs, audit: Audit) -> None:
    found = plan_bold({"with": "filter_pairs", "fraction": 0.3}, pairs, audit)
    assert found.predicted is not None
    u, _ = audit.disparity()
    kept = found.keep[pairs.rows]
    assert kept.sum() == 420
    np.testing.assert_allclose(found.predicted["predicted_under_policy"], u[kept].mean(axis=0), atol=1e-12)


def test_predicted_shift_under_weights(pairs: Pairs, audit: Audit) -> None:
    found = plan_bold({"with": "reweight_pairs"}, pairs, audit)
    assert found.predicted is not None
    assert found.weight is not None
    u, names = audit.disparity()
    weight = found.weight[pairs.rows]
    assert weight.std() > 0.1
    np.testing.assert_allclose(found.predicted["predicted_under_policy"], weight @ u / len(u), atol=1e-12)
    [bold] = [i for i in range(len(names)) if set(audit.features(names[i])) == {0, 1, 2, 3}]
    row = found.predicted.slice(bold, 1).to_pylist()[0]
    assert row["predicted"] > 0.3
    assert abs(row["predicted_under_policy"]) < 0.05
    assert "count like" in plan_report(found)
    both = plan_policy(
        ConceptPolicy.load(
            {
                **BOLD,
                "rules": [
                    {"with": "reweight_pairs", "column": "w"},
                    {"explain_away": "bold", "with": "shape_reward", "strength": 1},
                ],
            }
        ),
        make_pairs(pairs.raw.add_column("w", [0.5] * len(pairs.raw)), pairs.rows),
        score_pairs(pairs, {"bold": TextScorer(r"\*\*")}, progress=False),
        audit=audit,
    )
    margin = (both.chosen_offset - both.rejected_offset)[pairs.rows]
    assert both.predicted is not None
    np.testing.assert_allclose(both.predicted["predicted_under_policy"], expit(-margin) @ u / len(u), atol=1e-12)
    assert "reweight_pairs" in plan_report(both)
    json.dumps(plan_json(both), allow_nan=False)


def test_gate_on_a_context_of_the_audit(pairs: Pairs, audit: Audit) -> None:
    rows = audit.rows_in("B2")
    assert 20 < len(rows) < 500
    found = plan_bold({"with": "shape_reward", "strength": 2, "where": {"data": "B2"}}, pairs, audit)
    assert set(np.flatnonzero(found.chosen_offset)) <= set(rows)
    assert found.rules[0]["pairs"] == len(rows)
    with pytest.raises(AnatomyError, match=r"policy: rules\[0\]: .*found context 'B99', allowed: B"):
        plan_bold({"with": "shape_reward", "where": {"data": "B99"}}, pairs, audit)


def test_gate_on_a_prompt_context_of_the_audit(pairs: Pairs, audit: Audit) -> None:
    rows = audit.rows_in("A1")
    assert 20 < len(rows) < 500
    found = plan_bold({"with": "shape_reward", "strength": 2, "where": {"prompts": "A1"}}, pairs, audit)
    assert set(np.flatnonzero(found.chosen_offset)) <= set(rows)
    assert found.rules[0]["pairs"] == len(rows)
    assert "prompts = A1" in plan_report(found)
    with pytest.raises(AnatomyError, match=r"policy: rules\[0\]: .*found context 'A99', allowed: A1"):
        plan_bold({"with": "shape_reward", "where": {"prompts": "A99"}}, pairs, audit)


def test_an_audit_of_other_pairs_is_refused(pairs: Pairs, audit: Audit) -> None:
    with pytest.raises(AnatomyError, match="made with other data"):
        plan_bold({"with": "shape_reward"}, make_pairs(pairs.raw, pairs.rows[1:]), audit)


def test_report_and_json(pairs: Pairs, audit: Audit) -> None:
    found = plan_bold({"with": "shape_reward", "where": {"data": "B1"}}, pairs, audit)
    text = plan_report(found)
    assert text.startswith("1200 rows, 600 pairs scored, 600 pairs trained on.\n")
    strength = f"{found.rules[0]['strength']:.3g} ({found.rules[0]['ci_low']:.3g} to {found.rules[0]['ci_high']:.3g})"
    for part in ("explain away", "bold", "shape_reward", "data = B1", strength, "How far the pairs lean", "T1"):
        assert part in text
    assert max(map(len, text.splitlines())) < 200
    content = json.loads(json.dumps(plan_json(found), allow_nan=False))
    assert content["rules"][0]["strength"] == found.rules[0]["strength"]
    counts = {"rows": 1200, "pairs": 600, "pairs_kept": 600, "untouched": 600}
    assert content["counts"] == {**counts, "left_out": {"empty response": 600}}
    assert "600 rows train untouched by any rule: empty response." in text
    assert len(content["predicted"]) == audit.concepts.num_rows


def test_labels_cannot_reach_the_terminal_raw(pairs: Pairs, audit: Audit) -> None:
    found = plan_bold({"with": "shape_reward"}, pairs, audit)
    assert found.predicted is not None
    evil = found.predicted.set_column(1, "label", [["\x1b[31mred\n"] * found.predicted.num_rows])
    text = plan_report(PolicyPlan(found.keep, found.chosen_offset, found.rejected_offset, found.rules, evil))
    assert "\x1b" not in text
    assert "[31mred" in text


def test_offsets_give_the_shaped_loss_in_float64() -> None:
    """-log σ(β·D + λ·(s̃+ − s̃−)) written out, against the plan's offsets added to the log-ratios."""
    pairs, scores = random_pairs(50)
    found = plan([{"explain_away": "b", "with": "shape_reward", "strength": 2.5}], pairs, scores)
    rng = np.random.default_rng(1)
    ratio = rng.normal(size=(2, 50))
    chosen, rejected = standard(scores, "b", np.ones(50, bool))
    explicit = np.logaddexp(0, -(0.1 * (ratio[0] - ratio[1]) + 2.5 * (chosen - rejected)))
    seam = [0.1 * r + o[pairs.rows] for r, o in zip(ratio, (found.chosen_offset, found.rejected_offset), strict=True)]
    np.testing.assert_allclose(np.logaddexp(0, -(seam[0] - seam[1])), explicit, rtol=1e-12)
