import html
import json
import re

import numpy as np
import pytest
from audit_world import make_audit, make_world, save_harvest

from trl_anatomy.audit.views import concept_activity
from trl_anatomy.checking.compare import (
    _by_start_model,
    cheap_predictions,
    comparison_report,
    fired_counts,
    split_half_reliability,
)
from trl_anatomy.checking.report import render_comparison
from trl_anatomy.checking.responses import prompts_for
from trl_anatomy.errors import AnatomyError


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


def test_predictions_by_the_start_model_share_no_response_with_what_they_are_held_against():
    """Noise that prediction and shift would share counts for nothing: here there is nothing but noise."""
    rng = np.random.default_rng(1)
    groups, start = np.repeat(np.arange(100), 3), rng.normal(size=(300, 500))
    shift = rng.normal(size=start.shape) - start
    assert np.corrcoef(-start.mean(axis=0), shift.mean(axis=0))[0, 1] ** 2 > 0.4
    assert _by_start_model(lambda rows: -start[rows].mean(axis=0), shift, groups) < 0.05
    truth = rng.normal(size=500)
    assert _by_start_model(lambda rows: 2 * truth, truth + 0 * shift, groups) == pytest.approx(1)
    assert _by_start_model(lambda rows: truth[:2], shift[:, :2], groups) is None
    assert _by_start_model(lambda rows: truth, shift[:3], groups[:3]) is None


def test_fired_counts_are_those_of_concepts_of_one_latent(tmp_path):
    read, tau = save_harvest(make_world(300), tmp_path), 0.03
    single = [np.array([latent]) for latent in range(read.d_sae)]
    expected = concept_activity(read.frequency("chosen"), single, tau).sum(axis=0)
    np.testing.assert_array_equal(fired_counts(read, "chosen", tau), expected)
    assert 0 < expected.min() < (read.frequency("chosen") > 0).sum(axis=0).max()


def comparison() -> dict:
    return {
        "audit": "audits/run1",
        "before": "models/start",
        "sampling": {"n_prompts": 10, "n_responses": 10, "max_new_tokens": 5, "seed": 0},
        "after": {"dpo": "a", "policy": "b"},
        "concepts": [
            {
                "concept": "T1",
                "label": "bold",
                "verdict": "rises",
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
                "n_responses": 10,
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
    assert text.startswith("Too few prompts to tell: 10 different prompts, at least 20 are needed")
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
    assert "Too few prompts to tell: 10 different prompts" in page
    return " ".join(html.unescape(re.sub("<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)).split())


def test_page_says_what_came_and_what_was_recovered():
    result = comparison()
    (first,) = result["concepts"]
    against = {"dpo": (-0.1, -0.2, -0.05), "policy": (0.0, -0.1, 0.1)}
    unforeseen = dict.fromkeys(against, (0.3, 0.2, 0.4))
    result["concepts"].append({**first, "concept": "T2", "observed": against})
    result["concepts"].append({**first, "concept": "T3", "observed": unforeseen, "verdict": "no evidence"})
    text = page_text(result)
    assert "dpo : of 2 predicted shifts, 1 came and 1 went the other way." in text
    assert "policy : of 2 predicted shifts, 0 came and 0 went the other way." in text
    assert "Too few concepts (1) to say how well sizes agree" in text
    assert "T2 bold +25.0 +20.0 … +30.0 −10.0 −20.0 … −5.0 the other way 0.0 −10.0 … +10.0 did not come" in text
    assert "+30.0 +20.0 … +40.0 not predicted" in text
    assert "bold 30.0 20.0 … 40.0 90.0 80.0 … 100.0 35.0 30.0 … 40.0 92 %" in text
    assert "1 rule holds in no response" in text
    assert "emoji" not in text


def test_page_calls_predicted_what_the_audit_reports():
    """An interval by itself leaves zero out for one concept in twenty where nothing is to be found."""
    result = comparison()
    (first,) = result["concepts"]
    first["verdict"] = "no evidence"
    result["concepts"].append(
        {**first, "concept": "T2", "observed": dict.fromkeys(("dpo", "policy"), (0.0, -0.1, 0.1))}
    )
    text = page_text(result)
    assert "dpo : no shift was predicted." in text
    assert "T1 bold +25.0 +20.0 … +30.0 +50.0 +40.0 … +60.0 not predicted +10.0" in text
    assert "T2 bold +25.0 +20.0 … +30.0 0.0 −10.0 … +10.0 none predicted, none seen" in text


def test_page_tells_what_did_not_come_from_what_can_not_be_told():
    """An interval that holds nothing and all that was predicted says neither."""
    result = comparison()
    result["concepts"][0]["observed"] = {"dpo": (0.1, -0.1, 0.3), "policy": (0.1, -0.05, 0.24)}
    text = page_text(result)
    assert (
        "dpo : of 1 predicted shift, 0 came and 0 went the other way; for 1 there are too few prompts to tell." in text
    )
    assert "policy : of 1 predicted shift, 0 came and 0 went the other way. " in text
    assert "+10.0 −10.0 … +30.0 too few prompts to tell +10.0 −5.0 … +24.0 did not come" in text


def test_responses_and_prompts_are_two_numbers():
    result = comparison()
    figures = {"r2": 0.5, "r2_low": 0.25, "r2_high": 0.75, "spearman": -0.001, "p": 0.1, "noise_ceiling_r2": 0.75}
    result["agreement"]["dpo"] |= {**figures, "n_responses": 40, "odds_r2": None}
    result["agreement"]["dpo"]["prompt_view"] = result["agreement"]["policy"]["prompt_view"] = {"reason": "none"}
    result["sampling"]["n_responses"] = 40
    text = page_text(result)
    assert "40 responses of each to 10 prompts, 5 tokens at most" in text
    assert "0.75 is the most that could be seen with 40 responses to 10 prompts" in text
    assert "at most 0.75 can be seen with 40 responses to 10 prompts;" in comparison_report(result)
    result["sampling"]["n_responses"] = result["agreement"]["dpo"]["n_responses"] = 10
    assert "one response of each to 10 prompts" in page_text(result)
    assert "could be seen with 10 prompts" in page_text(result)
    assert "can be seen with 10 prompts;" in comparison_report(result)


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


def test_prompts_are_drawn_from_those_that_differ(tmp_path):
    """Repeated and empty prompts count once and not at all; the draw is of the others, in the order of the file."""
    turns = [[{"role": "user", "content": f"say {i % 7}"}] for i in range(40)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "other": 1}) + "\n" for prompt in [*turns, []]))
    audit = make_audit(tmp_path / "audit", make_world(400))
    assert prompts_for(audit, str(file), 100, 0) == turns[:7]
    drawn = np.random.default_rng(3).permutation(7)[:4]
    assert prompts_for(audit, str(file), 4, 3) == [turns[i] for i in sorted(drawn)]
    file.write_text('{"prompt": ""}\n')
    with pytest.raises(AnatomyError, match="holds no prompt"):
        prompts_for(audit, str(file), 4, 3)


def test_prompt_view_is_told_with_its_reason_or_its_figures():
    result = comparison()
    figures = dict.fromkeys(("r2_low", "r2_high", "spearman", "p", "noise_ceiling_both_r2", "shrunk_r2")) | {"n": 7}
    view = {"reason": None, "n_contexts": 9, "n_contexts_seen": 8, "prompts_per_context": 12.0}
    for what, r2 in (("inside", 0.875), ("difference", 0.625)):
        of = {**figures, "r2": r2, "noise_ceiling_r2": 0.9375, "without_context_r2": 0.25}
        view[what] = {"reported": of, "tested": {**of, "random_prompts_r2": 0.125, "random_responses_r2": None}}
    result["agreement"]["dpo"] |= {"prompt_view": view, "r2": 0.5, "r2_low": 0.25, "r2_high": 0.75, "p": 0.01}
    result["agreement"]["dpo"] |= {"spearman": 0.5, "odds_r2": 0.75}
    result["agreement"]["policy"]["prompt_view"] = {"reason": "the audit has no prompt-conditioned view"}
    text = page_text(result)
    assert "8 of 9 prompt contexts are among the rollouts, each with 12 prompts (median)" in text
    assert "shift in A, all tested 0.88 0.94 unknown unknown 0.25 0.12 unknown" in text
    assert "what A adds: shift in A less elsewhere, reported 0.62 0.94" in text
    assert "policy : not known, the audit has no prompt-conditioned view." in text
    told = comparison_report(result)
    assert "over 7 reported hypotheses R² 0.88 (at most 0.94 can be seen; without knowing the prompt 0.25)" in told
    assert "by log-odds: 0.75" in told
