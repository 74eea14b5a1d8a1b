import html
import re

import numpy as np
import pytest
from audit_world import make_audit, make_world

from trl_anatomy.checking.compare import cheap_predictions, comparison_report, split_half_reliability
from trl_anatomy.checking.report import render_comparison


def test_reliability_matches_its_expectation():
    """With independent noise the reliability of the mean is var(truth) / (var(truth) + var(noise) / n)."""
    rng = np.random.default_rng(0)
    n, n_concepts, sigma = 400, 2000, 2.0
    truth = rng.normal(0, 0.1, n_concepts)
    u = truth + sigma * rng.normal(size=(n, n_concepts))
    expected = 0.1**2 / (0.1**2 + sigma**2 / n)
    assert split_half_reliability(u, seed=0) == pytest.approx(expected, abs=0.03)
    assert split_half_reliability(sigma * rng.normal(size=(n, n_concepts)), seed=0) < 0.1
    assert split_half_reliability(u[:3], seed=0) is None


def comparison() -> dict:
    return {
        "audit": "audits/run1",
        "before": "models/start",
        "sampling": {"n_prompts": 10, "max_new_tokens": 5, "seed": 0},
        "after": {"dpo": "a", "policy": "b"},
        "concepts": [
            {
                "concept": "T1",
                "label": "bold",
                "predicted": 0.25,
                "ci_low": 0.2,
                "ci_high": 0.3,
                "observed": {"dpo": (0.5, 0.4, 0.6), "policy": (0.1, 0.0, 0.2)},
            }
        ],
        "agreement": {
            name: {
                "r2": None,
                "n": 1,
                "n_prompts": 10,
                "noise_ceiling_r2": None,
                "random_clusters_r2": None,
                "tilt_r2": None,
                "baselines_r2": {"length": None, "text rules": None, "likelihood": None},
            }
            for name in ("dpo", "policy")
        },
        "rates": [
            {
                "rule": "bold",
                "rates": {"before": (0.3, 0.2, 0.4), "dpo": (0.9, 0.8, 1.0), "policy": (0.35, 0.3, 0.4)},
                "recovery": {"policy": 11 / 12},
            },
            {
                "rule": "emoji",
                "rates": {"before": (0.0, 0.0, 0.1), "dpo": (0.0, 0.0, 0.1), "policy": (0.0, 0.0, 0.1)},
                "recovery": {"policy": None},
            },
        ],
        "words": {"before": (20.0, 19.0, 21.0), "dpo": (31.25, 30.0, 32.5), "policy": (22.0, 21.0, 23.0)},
    }


def test_report_names_every_model_and_hides_rules_that_never_hold():
    text = comparison_report(comparison())
    assert "+0.250" in text
    assert "0.350 ( 92%)" in text
    assert "emoji" not in text
    assert text.count("too few concepts") == 2
    assert "Words per response: before 20.0, dpo 31.2, policy 22.0." in text


def test_cheap_predictions_without_the_pairs_are_by_length_alone(tmp_path):
    """What length explains is the mean disparity less what is left of it at equal length."""
    audit = make_audit(tmp_path / "audit", make_world(400))
    found = cheap_predictions(audit, None, None, {"bold": "x"})
    rows = audit.concepts.to_pylist()
    expected = [row["predicted"] - row["length_adjusted"] for row in rows]
    np.testing.assert_allclose(found["length"], expected, atol=1e-12)
    assert found["text rules"] is None
    assert found["likelihood"] is None


def page_text(result: dict) -> str:
    page = render_comparison(result).split("<script")[0]
    return " ".join(html.unescape(re.sub("<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)).split())


def test_page_says_what_came_and_what_was_recovered():
    result = comparison()
    (first,) = result["concepts"]
    against = {"dpo": (-0.1, -0.2, -0.05), "policy": (0.0, -0.1, 0.1)}
    unforeseen = dict.fromkeys(against, (0.3, 0.2, 0.4))
    result["concepts"].append({**first, "concept": "T2", "observed": against})
    result["concepts"].append({**first, "concept": "T3", "observed": unforeseen, "ci_low": -0.1})
    text = page_text(result)
    assert "dpo : of 2 predicted shifts, 1 came and 1 went the other way." in text
    assert "policy : of 2 predicted shifts, 0 came and 0 went the other way." in text
    assert "Too few concepts (1) to say how well sizes agree" in text
    assert "T2 bold +25.0 +20.0 … +30.0 −10.0 −20.0 … −5.0 the other way 0.0 −10.0 … +10.0 did not come" in text
    assert "+30.0 +20.0 … +40.0 not predicted" in text
    assert "bold 30.0 20.0 … 40.0 90.0 80.0 … 100.0 35.0 30.0 … 40.0 92 %" in text
    assert "1 rule holds in no response" in text
    assert "emoji" not in text


def test_page_gives_no_recovery_where_training_hardly_moved():
    result = comparison()
    result["rates"][0]["rates"]["dpo"] = (0.33, 0.25, 0.41)
    assert "hardly moved" in page_text(result)
    assert "92 %" not in page_text(result)


def test_page_shows_figures_that_are_not_known():
    result = comparison()
    result["concepts"][0]["observed"] = {name: (0.5, float("nan"), float("nan")) for name in result["after"]}
    result["agreement"]["dpo"] |= {
        "baselines_r2": {"length": 0.25},
        "r2": 0.5,
        "r2_low": 0.25,
        "r2_high": 0.75,
        "p": 0.01,
    }
    result["agreement"]["policy"]["baselines_r2"] = {"length": None}
    text = page_text(result)
    assert "+50.0 n/a … n/a unknown" in text
    assert "Sizes agree with R² 0.50 0.25 … 0.75 ; how much could be seen is unknown." in text
    assert "by length" in text
