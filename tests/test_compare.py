import numpy as np
import pytest
from audit_world import make_audit, make_world

from trl_anatomy.checking.compare import _split_half_reliability, cheap_predictions, comparison_report


def test_reliability_matches_its_expectation():
    """With independent noise the reliability of the mean is var(truth) / (var(truth) + var(noise) / n)."""
    rng = np.random.default_rng(0)
    n, n_concepts, sigma = 400, 2000, 2.0
    truth = rng.normal(0, 0.1, n_concepts)
    u = truth + sigma * rng.normal(size=(n, n_concepts))
    expected = 0.1**2 / (0.1**2 + sigma**2 / n)
    assert _split_half_reliability(u, seed=0) == pytest.approx(expected, abs=0.03)
    assert _split_half_reliability(sigma * rng.normal(size=(n, n_concepts)), seed=0) < 0.1
    assert _split_half_reliability(u[:3], seed=0) is None


def test_report_names_every_model_and_hides_rules_that_never_hold():
    result = {
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
    }
    text = comparison_report(result)
    assert "+0.250" in text
    assert "0.350 ( 92%)" in text
    assert "emoji" not in text
    assert text.count("too few concepts") == 2


def test_cheap_predictions_without_the_pairs_are_by_length_alone(tmp_path):
    """What length explains is the mean disparity less what is left of it at equal length."""
    audit = make_audit(tmp_path / "audit", make_world(400))
    found = cheap_predictions(audit, None, None, {"bold": "x"})
    rows = audit.concepts.to_pylist()
    expected = [row["predicted"] - row["length_adjusted"] for row in rows]
    np.testing.assert_allclose(found["length"], expected, atol=1e-12)
    assert found["text rules"] is None
    assert found["likelihood"] is None
