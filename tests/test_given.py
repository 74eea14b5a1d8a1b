"""Structured concepts: residuals against closed forms, what a policy may say, and what training then leaves alone."""

from typing import Any

import numpy as np
import pytest
from test_plan import make_pairs

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.score import Scores
from trl_anatomy.shaping.given import residualised
from trl_anatomy.shaping.located import PolicyError
from trl_anatomy.shaping.plan import plan_policy
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import begin_policy

NAMES = ("child", "parent", "sibling")


def made(**given: list[str]) -> ConceptPolicy:
    concepts = {name: {"scorer": "text", "pattern": name} for name in NAMES}
    for name, others in given.items():
        concepts[name]["given"] = others  # type: ignore[assignment]
    return ConceptPolicy.load(
        {"concepts": concepts, "rules": [{"explain_away": "child", "with": "shape_reward", "strength": "auto"}]}
    )


def correlated(n: int = 500, seed: int = 0) -> Scores:
    """child = parent/2 + sibling/4 + its own; the data reward the parent, and the child only through it."""
    rng = np.random.default_rng(seed)
    parent, sibling = rng.normal(size=(2, n)) * 3 + [[1.5], [0.0]] + 7, rng.normal(size=(2, n))
    child = parent / 2 + sibling / 4 + rng.normal(size=(2, n))
    columns = {"child": child, "parent": parent, "sibling": sibling}
    return Scores(NAMES, *({name: columns[name][side] for name in NAMES} for side in range(2)))


def both(scores: Scores, name: str) -> np.ndarray:
    return np.concatenate([scores.chosen[name], scores.rejected[name]])


def test_the_residual_is_orthogonal_to_what_is_given() -> None:
    raw = correlated()
    found = residualised(made(child=["parent", "sibling"]), raw)
    design = np.column_stack([np.ones(1000), both(raw, "parent"), both(raw, "sibling")])
    y = both(raw, "child")
    slopes = np.linalg.solve(design.T @ design, design.T @ y)
    np.testing.assert_allclose(both(found, "child") - y.mean(), y - design @ slopes, atol=1e-10)
    for name in ("parent", "sibling"):
        assert abs(np.corrcoef(both(found, "child"), both(raw, name))[0, 1]) < 1e-12
        assert np.array_equal(both(found, name), both(raw, name))
    assert found.names == raw.names


def test_without_given_nothing_changes() -> None:
    raw = correlated()
    found = residualised(made(), raw)
    assert all(np.array_equal(both(found, name), both(raw, name)) for name in NAMES)


def test_siblings_may_name_each_other() -> None:
    """Each is taken as it was scored, in whatever order the policy lists them."""
    raw = correlated()
    policy = made(child=["sibling"], sibling=["child"])
    assert list(policy.used) == ["child", "sibling"]
    one = residualised(policy, raw)
    alone = residualised(made(child=["sibling"]), raw)
    assert np.array_equal(both(one, "child"), both(alone, "child"))
    assert abs(np.corrcoef(both(one, "sibling"), both(raw, "child"))[0, 1]) < 1e-12


def test_given_concepts_are_scored_though_no_rule_names_them() -> None:
    assert list(made(child=["parent"]).used) == ["child", "parent"]
    assert list(made().used) == ["child"]


def test_collinear_and_constant_parents() -> None:
    raw = correlated()
    for side in (raw.chosen, raw.rejected):
        side["sibling"] = 3 - 2 * side["parent"]
    found = residualised(made(child=["parent", "sibling"]), raw)  # two names for one thing
    alone = residualised(made(child=["parent"]), raw)
    np.testing.assert_allclose(both(found, "child"), both(alone, "child"), atol=1e-9)
    for side in (raw.chosen, raw.rejected):
        side["sibling"] = np.full(500, 4.0)
    found = residualised(made(child=["parent", "sibling"]), raw)
    np.testing.assert_allclose(both(found, "child"), both(alone, "child"), atol=1e-9)


def test_a_child_that_its_parents_explain_wholly_is_refused() -> None:
    raw = correlated()
    for side in (raw.chosen, raw.rejected):
        side["child"] = 2 * side["parent"] - side["sibling"] + 1
    with pytest.raises(PolicyError, match=r"concepts.child.given: the scores of 'child' are a linear function of"):
        residualised(made(child=["parent", "sibling"]), raw)


def test_the_fitted_strength_leaves_a_rewarded_parent_alone() -> None:
    """The data reward the parent alone. Without given, the child's offset takes much of the parent's pull away; with
    given, next to nothing: the offsets do not correlate with the parent."""
    raw = correlated(4000)
    pairs = make_pairs_of(4000)
    effect = {}
    for name, policy in (("plain", made()), ("given", made(child=["parent"]))):
        plan = plan_policy(policy, pairs, residualised(policy, raw))
        margin = plan.chosen_offset - plan.rejected_offset
        effect[name] = abs(np.corrcoef(margin, raw.gap("parent"))[0, 1] * margin.std())
    assert effect["plain"] > 0.3
    assert effect["given"] < effect["plain"] / 5


def make_pairs_of(n: int) -> Any:
    from datasets import Dataset

    raw = Dataset.from_dict({"prompt": [f"{i}" for i in range(n)], "chosen": ["yes"] * n, "rejected": ["no"] * n})
    return make_pairs(raw, np.arange(n))


@pytest.mark.parametrize("rule", [{"with": "steer", "strength": 1.0}, {"with": "mask_tokens"}])
def test_a_verb_that_does_not_act_on_scores_is_refused_before_any_score_is_read(rule: dict[str, Any]) -> None:
    direction = {"scorer": "direction", "path": "nowhere", "given": ["parent"]}
    policy = ConceptPolicy.load(
        {
            "concepts": {"child": direction, "parent": {"scorer": "text", "pattern": "a"}},
            "rules": [{"explain_away": "child", **rule}],
        }
    )
    with pytest.raises(AnatomyError, match=r"rules\[0\].with: found \w+, but 'child' has given"):
        begin_policy(policy, make_pairs_of(3), lambda: pytest.fail("the model was asked for"))


def test_policies_are_told_what_given_may_be() -> None:
    for given, message in (
        (["child"], "the concept itself"),
        (["nobody"], "'nobody'"),
        (["parent", "parent"], "A name occurs twice"),
        ("parent", "allowed: a list of names of concepts"),
        ([], "allowed: a list of names of concepts"),
        ([3], "allowed: a list of names of concepts"),
    ):
        with pytest.raises(PolicyError, match=message) as caught:
            made(child=given)  # type: ignore[arg-type]
        assert "concepts.child.given" in str(caught.value)
