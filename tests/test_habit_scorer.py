"""A named habit as a concept of a policy: read, scored, masked, weighed, planned, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model

from trl_anatomy import AnatomyError, ConceptPolicy, ConceptReward
from trl_anatomy.cli import main
from trl_anatomy.reading.habits import ALSO, HABITS
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers import HabitScorer, TextScorer, shown_above
from trl_anatomy.reading.spans import Pairs, read_pairs
from trl_anatomy.shaping.located import PolicyError
from trl_anatomy.shaping.resolve import check_policy
from trl_anatomy.shaping.settle import settle_policy

CHOSEN = ["1. air\n2. cat", "It is **air**.\n- cat\n- sky", "I am sorry, but I cannot help.", "Once! `**x**` # a"]
REJECTED = ["It is air.", "No — cat", "Sure! It is **cat**.", "1. sky\n2. cat"]


@pytest.fixture(scope="module", params=["text", "conversation"])
def pairs(request: pytest.FixtureRequest) -> Pairs:
    rows = []
    for i in range(24):
        good, bad = CHOSEN[i % 4], REJECTED[i % 4] if i % 3 else "No."
        good, bad = (bad, good) if i % 5 == 0 else (good, bad)
        sides = {"prompt": f"Why {i}?", "chosen": good, "rejected": bad}
        if request.param == "conversation":
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            rows.append({key: [{"role": roles[key], "content": text}] for key, text in sides.items()})
        else:
            rows.append({**sides, "prompt": sides["prompt"] + "\n"})
    return read_pairs(Dataset.from_list(rows), build_tokenizer())


def policy(rule: dict[str, Any], **habit: Any) -> ConceptPolicy:
    return ConceptPolicy.load(
        {"concepts": {"h": {"scorer": "habit", **habit}}, "rules": [{"explain_away": "h", **rule}]}
    )


@pytest.mark.parametrize("name", [name for name in (*HABITS, *ALSO) if name != "tokens"])
def test_scores_are_the_habit_of_what_is_trained_on(name: str, pairs: Pairs) -> None:
    scores = score_pairs(pairs, {"h": HabitScorer(name)}, progress=False)
    habit = HABITS[ALSO.get(name, name)]
    for side, found in ((1, scores.chosen["h"]), (2, scores.rejected["h"])):
        assert found.tolist() == [habit.value(pairs.texts(i)[side]) for i in range(len(pairs))]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("em_dash", "—"), ("numbered_list", r"(?m)^\d\. "), ("apology", "sorry"), ("bullet", "(?m)^- ")],
)
@pytest.mark.parametrize(
    "rule",
    [
        {"with": "mask_tokens"},
        {"with": "mask_tokens", "unit": "token"},
        {"with": "shape_reward", "strength": 2.0},
        {"with": "filter_pairs", "fraction": 0.2},
        {"with": "reweight_pairs"},
    ],
)
def test_a_habit_acts_as_the_text_rule_that_finds_the_same(
    name: str, pattern: str, rule: dict[str, Any], pairs: Pairs
) -> None:
    if name == "apology" and rule["with"] == "mask_tokens":
        pattern = "I am sorry"
    plans = []
    for concept in ({"scorer": "habit", "name": name}, {"scorer": "text", "pattern": pattern}):
        given = ConceptPolicy.load({"concepts": {"h": concept}, "rules": [{"explain_away": "h", **rule}]})
        plans.append(settle_policy(given, pairs, lambda: pytest.fail("no model is needed")))
    one, other = plans
    assert one.rules[0]["rows"] == other.rules[0]["rows"]
    assert json.dumps(one.rules, default=str) == json.dumps(other.rules, default=str)
    assert [row["unit"] for row in one.concepts] == ["share"]


def test_mask_takes_what_the_habit_marks_and_leaves_code(pairs: Pairs) -> None:
    plan = settle_policy(policy({"with": "mask_tokens", "unit": "token"}, name="bold"), pairs, lambda: None)
    masked = plan.kept_tokens
    assert masked
    for i in range(len(pairs)):
        texts = pairs.texts(i)[1:]
        shows = [bool(HABITS["bold"].value(text)) for text in texts]
        flags = masked.get(int(pairs.rows[i]))
        assert [bool((side == 0).any()) for side in flags] == shows if flags is not None else not any(shows)


def test_amounts_are_scored_and_shaped_but_not_masked(pairs: Pairs) -> None:
    plan = settle_policy(policy({"with": "shape_reward", "strength": 1.0}, name="length"), pairs, lambda: None)
    assert plan.rules[0]["strength"] == 1.0
    assert [row["unit"] for row in plan.concepts] == ["sd"]
    for name in ("words", "repetition", "other_language"):
        with pytest.raises(PolicyError, match=r"rules\[0\]: found mask_tokens with 'h', a habit without places"):
            check_policy(policy({"with": "mask_tokens"}, name=name))
    with pytest.raises(PolicyError, match=r"found no key 'above'"):
        check_policy(policy({"with": "inoculate", "instruction": "Be long."}, name="words"))
    check_policy(policy({"with": "inoculate", "instruction": "Use bold."}, name="bold"))
    assert (shown_above(HabitScorer("bold")), shown_above(HabitScorer("words"))) == (0.0, None)


@pytest.mark.parametrize(
    ("concept", "told"),
    [
        (
            {"name": "bolt"},
            r"concepts\.h\.name: found 'bolt', allowed: a habit of the library: bold, .*Did you mean 'bold'",
        ),
        ({"name": "tokens"}, r"Tokens are no habit of a text; words are"),
        ({"name": 3}, r"found 3, allowed: a habit"),
        ({}, r"found no key 'name', allowed: a habit"),
        ({"name": "bold", "pattern": "x"}, r"'pattern'"),
        ({"name": "bold", "layer": 3}, r"'layer'"),
    ],
)
def test_habits_that_there_are_not(concept: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        policy({"with": "shape_reward"}, **concept)
    with pytest.raises(AnatomyError):
        HabitScorer("tokens")


def test_residualising_along_a_habit_is_refused_as_along_a_text_rule() -> None:
    given = policy({"with": "residualize", "steer": 1.0}, name="bold")
    with pytest.raises(PolicyError, match=r"found a concept of the scorer habit, allowed: direction, probe or"):
        check_policy(given)


def test_keys_tell_habits_apart() -> None:
    keys = [json.dumps(HabitScorer(name).key(), sort_keys=True) for name in HABITS if name != "tokens"]
    assert len({*keys}) == len(keys)
    assert HabitScorer("numbered").key() == HabitScorer("numbered_list").key()
    assert HabitScorer("em_dash").key() != TextScorer("—").key()


def test_a_reward_of_a_habit_needs_no_model() -> None:
    reward = ConceptReward(policy({"with": "shape_reward", "strength": 2.0}, name="bold"))
    assert reward(prompts=["a", "a"], completions=["**b**", "`**b**`"]) == [-2.0, 0.0]


def test_plan_of_an_audit_of_habits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    file, out, rules = tmp_path / "pairs.jsonl", tmp_path / "audit", tmp_path / "policy.yaml"
    rows = [{"prompt": f"Why {i}?", "chosen": CHOSEN[i % 4], "rejected": REJECTED[i % 4]} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert (
        main(["audit", "--dataset", str(file), "--model", str(tmp_path / "model"), "--sae", "none", "--out", str(out)])
        == 0
    )
    rules.write_text(
        "concepts:\n  lists: {scorer: habit, name: bullet_list}\n"
        "rules:\n  - {explain_away: lists, with: filter_pairs, fraction: 0.1}\n"
    )
    capsys.readouterr()
    assert main(["plan", "--audit", str(out), "--policy", str(rules), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rules"][0]["rows"] == 4
    rules.write_text(
        "concepts:\n  c: {scorer: features, cluster: T1}\nrules:\n  - {explain_away: c, with: shape_reward}\n"
    )
    assert main(["plan", "--audit", str(out), "--policy", str(rules)]) == 2
    assert "counted habits without an SAE" in capsys.readouterr().err
