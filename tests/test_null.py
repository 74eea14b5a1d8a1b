"""Shuffled labels: nothing may be found more often than the false discovery rate allows.

The rate is meant to be 5 %. A hundred runs cannot tell 5 % from 8 %, so they are held to what a true rate of 5 %
exceeds once in a hundred times; `benchmarks/studies/null.py` counts many runs, and its result is the figure to quote.
"""

import numpy as np
import pytest
from audit_world import HABITS, TOPICS, make_world
from scipy.stats import binom

from trl_anatomy.audit import stats
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.predict import concept_table
from trl_anatomy.audit.prompt_view import prompt_view
from trl_anatomy.audit.views import feature_view

RUNS = 100
MOST = int(binom.ppf(0.99, RUNS, 0.05))
COMMUNITIES = [np.array(group["features"]) for group in (*HABITS.values(), *TOPICS)]
CONFIG = AuditConfig(n_contexts=6, bootstrap=100, min_context=25, permutations=99)


@pytest.fixture(scope="module")
def runs():
    """Of small worlds in which chosen and rejected were swapped at random in every pair: all tables of both views."""
    found = []
    for seed in range(RUNS):
        world = make_world(n=500, seed=seed, null=True)
        view = feature_view(world, COMMUNITIES, CONFIG, min_concept=2)
        prompts = prompt_view(world, CONFIG)
        concepts = concept_table(view.activity, COMMUNITIES, CONFIG)
        found.append({"feature": view.hypotheses, "prompt": prompts.hypotheses, "shift": concepts})
    return found


@pytest.mark.parametrize("name", ["feature", "prompt", "shift"])
def test_hardly_any_run_reports_anything(runs, name):
    reported, least, swapped = 0, [], 0
    for run in runs:
        rows = run[name].to_pylist()
        assert rows
        if name == "shift":
            reported += any(row["verdict"] in ("rises", "falls") for row in rows)
        else:
            reported += any(row["kept"] and row["q"] < 0.05 for row in rows)
            swapped += min(row["p_permutation"] for row in rows if row["p_permutation"] is not None) < 0.05
        least.append(min(row["q"] for row in rows))
    assert reported <= MOST
    assert swapped <= MOST
    assert np.min(least) < 0.9  # there was something to be found by chance


def test_swapped_p_values_of_shifts_are_uniform(runs):
    p = np.concatenate([run["shift"]["p_permutation"].to_numpy() for run in runs])
    assert 0.4 < p.mean() < 0.6
    assert (p <= 0.05).mean() < 0.1


def test_a_real_effect_is_found_by_the_same_tests():
    """The rule above is not kept by finding nothing ever."""
    world = make_world(n=500, seed=100)
    view = feature_view(world, COMMUNITIES, CONFIG, min_concept=2)
    rows = concept_table(view.activity, COMMUNITIES, CONFIG).to_pylist()
    assert [row["verdict"] for row in rows][:3] == ["rises", "falls", "no evidence"]
    assert rows[0]["p_permutation"] == pytest.approx(0.01)
    best = min(view.hypotheses.to_pylist(), key=lambda row: row["p"])
    assert best["concept"] == "T4"
    assert best["q"] < 0.01
    assert best["p_permutation"] == pytest.approx(0.01)
    assert stats.family_wise_p(np.array([0.0]), np.ones(9)) == 1
