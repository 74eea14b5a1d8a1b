import numpy as np
import pytest

from trl_anatomy.checking.rates import TEXT_RULES, ConceptRate, rate_interval, recovery, rule_hits

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
    assert set(EXAMPLES) == set(TEXT_RULES)
    for name, (yes, no) in EXAMPLES.items():
        assert rule_hits([yes, no], {name: TEXT_RULES[name]})[name].tolist() == [True, False], name


def test_measurement_counts(tmp_path):
    rate = ConceptRate({"bang": "!", "dot": r"\."}, cache_dir=str(tmp_path))
    assert rate.compute(data=["a!", "b.", "c!."]) == {"bang": pytest.approx(2 / 3), "dot": pytest.approx(2 / 3)}


def test_wilson_interval_closed_form():
    hits = np.array([True] * 7 + [False] * 13)
    rate, low, high = rate_interval(hits)
    n, p, z = 20, 0.35, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rate == pytest.approx(0.35)
    assert (low, high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert all(np.isnan(rate_interval(hits[:0])))


def test_recovery():
    assert recovery(0.3, 0.9, 0.9) == 0
    assert recovery(0.3, 0.9, 0.3) == pytest.approx(1)
    assert recovery(0.3, 0.9, 0.6) == pytest.approx(0.5)
    assert np.isnan(recovery(0.3, 0.3, 0.4))
