import json
import sys
from types import ModuleType
from typing import Any

import evaluate
import numpy as np
import pytest

from trl_anatomy import AnatomyError
from trl_anatomy.checking.rates import (
    TEXT_RULES,
    ConceptRate,
    ResponseLength,
    off_target,
    off_target_table,
    rate_interval,
    recovery,
    rule_hits,
)
from trl_anatomy.checking.suites import run_suites
from trl_anatomy.reading.habits import HABITS

# What these rules found before they became habits of the library, whose own test has more.
EXAMPLES = {
    "bold": ("a **b** c", "a * b"),
    "bullet": ("x\n- item", "well-known"),
    "numbered": ("1. first", "in 1990 we"),
    "header": ("## Title", "#hashtag"),
    "table": ("| a | b |", "a | b"),
    "horizontal_rule": ("x\n---\ny", "a --- b"),
    "code_fence": ("```py", "`x`"),
    "link": ("see https://a.b", "see a.b"),
    "emoji": ("nice 😀", "nice :)"),
    "em_dash": ("so — yes", "so - yes"),
    "exclamation": ("yes!", "yes."),
    "refusal": ("I'm sorry, but no", "The sorry tale"),
    "flattery": ("Great question. It is", "The great wall"),
    "hedging": ("it is perhaps so", "it is so"),
}


def test_every_rule_has_an_example_that_hits_and_one_that_does_not():
    assert set(EXAMPLES) <= set(TEXT_RULES)
    for name, (yes, no) in EXAMPLES.items():
        assert rule_hits([yes, no], {name: TEXT_RULES[name]})[name].tolist() == [True, False], name


def test_rules_are_the_rates_of_the_library():
    assert dict(TEXT_RULES) == {name: habit for name, habit in HABITS.items() if habit.kind == "rate"}


def test_a_rule_may_be_an_expression_or_a_habit():
    code = "```\n**a**\n```"
    hits = rule_hits([code, "**a**"], {"pattern": r"[*][*]a", "habit": HABITS["bold"]})
    assert {name: found.tolist() for name, found in hits.items()} == {"pattern": [True, True], "habit": [False, True]}
    with pytest.raises(AnatomyError, match="is not a regular expression"):
        rule_hits(["a"], {"open": "("})


def test_measurement_counts(tmp_path):
    rate = ConceptRate({"bang": "!", "dot": r"\."}, cache_dir=str(tmp_path))
    assert rate.compute(data=["a!", "b.", "c!."]) == {"bang": pytest.approx(2 / 3), "dot": pytest.approx(2 / 3)}


def test_length_and_rates_combine(tmp_path):
    """`evaluate.combine` takes loaded modules: neither asks a hub."""
    both = evaluate.combine(
        [ConceptRate({"bang": "!"}, cache_dir=str(tmp_path)), ResponseLength(cache_dir=str(tmp_path))]
    )
    texts = ["one two three!", "one", "one\ntwo"]
    assert both.compute(data=texts) == {"bang": pytest.approx(1 / 3), "mean_words": 2.0, "median_words": 2.0}


def test_wilson_interval_closed_form():
    hits = np.array([True] * 7 + [False] * 13)
    rate, low, high = rate_interval(hits)
    n, p, z = 20, 0.35, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rate == pytest.approx(0.35)
    assert (low, high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert all(np.isnan(rate_interval(hits[:0])))


def test_interval_of_several_responses_to_a_prompt():
    hits = np.array([True] * 7 + [False] * 13)
    prompts = np.arange(20)
    assert rate_interval(hits, groups=prompts) == rate_interval(hits)
    # The same responses four times over, prompt by prompt, tell nothing more; drawn anew for each they would.
    four = rate_interval(np.repeat(hits, 4), groups=np.repeat(prompts, 4))
    assert four[0] == pytest.approx(0.35)
    # 20 prompts with the correction G/(G-1) of the variance between them: 19 by themselves.
    n, p, z = 19, 0.35, 1.959963984540054
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (four[2] - four[1]) / 2 == pytest.approx(half)
    mixed = rate_interval(np.tile(hits, 4), groups=np.repeat(np.arange(40), 2))
    assert mixed[2] - mixed[1] < 0.7 * (four[2] - four[1])
    low, high = rate_interval(np.ones(40, bool), groups=np.repeat(np.arange(10), 4))[1:]
    assert (low, high) == pytest.approx(rate_interval(np.ones(10, bool))[1:])


def test_recovery():
    assert recovery(0.3, 0.9, 0.9) == 0
    assert recovery(0.3, 0.9, 0.3) == pytest.approx(1)
    assert recovery(0.3, 0.9, 0.6) == pytest.approx(0.5)
    assert np.isnan(recovery(0.3, 0.3, 0.4))


def test_off_target_matrix():
    start, trained = {"a": 0.2, "b": 0.5}, {"a": 0.6, "b": 0.5}
    shaped = {"a": {"a": 0.3, "b": 0.4}, "none": {"a": 0.6, "b": 0.5}}
    matrix = off_target(start, trained, shaped)
    assert matrix["a"]["a"] == {"recovery": pytest.approx(0.75), "change": pytest.approx(-0.3)}
    assert matrix["a"]["b"]["change"] == pytest.approx(-0.1)
    assert np.isnan(matrix["a"]["b"]["recovery"])
    assert {effect["change"] for effect in matrix["none"].values()} == {0.0}
    assert off_target_table(matrix).splitlines()[2] == "| a | -30.0 | -10.0 |"


def test_suites_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AnatomyError, match="pip install lm-eval"):
        run_suites({"before": "m"}, ["gsm8k"])
    with pytest.raises(AnatomyError, match="0 models and 1 tasks"):
        run_suites({}, ["gsm8k"])


def test_suites_put_models_side_by_side(monkeypatch, tmp_path):
    """lm-evaluation-harness is not among the packages of the tests; this stands in the form of its results."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        value = {"m": 0.5, "out": 0.25}[arguments["model_args"]["pretrained"]]
        return {
            "results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict": value, "exact_match_stderr,strict": "N/A"}}
        }

    stand_in = ModuleType("lm_eval")
    monkeypatch.setattr(stand_in, "simple_evaluate", simple_evaluate, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    found = run_suites({"before": "m", "dpo": "out"}, ["gsm8k"], out=tmp_path, limit=5)
    assert found == {"gsm8k": {"exact_match,strict": {"before": 0.5, "dpo": 0.25}}}
    assert [call["limit"] for call in asked] == [5, 5]
    assert json.loads((tmp_path / "suites.json").read_text()) == {
        "models": {"before": "m", "dpo": "out"},
        "tasks": found,
    }
