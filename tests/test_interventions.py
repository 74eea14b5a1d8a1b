"""Each verb by itself, against its definition."""

from keyword import iskeyword
from typing import Any

import numpy as np
import pytest

from trl_anatomy.errors import AnatomyError
from trl_anatomy.shaping.interventions import (
    VERBS,
    AblateFeatures,
    FilterPairs,
    Inoculate,
    MaskTokens,
    ProjectOut,
    Residualize,
    ShapeReward,
    Steer,
)
from trl_anatomy.shaping.where import Where

STAGES = {
    "filter_pairs": "rows",
    "filter_rows": "rows",
    "mask_tokens": "tokens",
    "inoculate": "prompt",
    "reweight_pairs": "weight",
    "reweight_rows": "weight",
    "shape_reward": "margin",
    "residualize": "margin",
    "steer": "hidden",
    "ablate_features": "hidden",
    "project_out": "hidden",
}


def test_registration() -> None:
    assert {name: verb.stage for name, verb in VERBS.items()} == STAGES
    assert len(VERBS) == 11
    for name, verb in VERBS.items():
        assert verb.verb == name
        assert {f"{key}_" if iskeyword(key) else key for key in verb.keys} <= set(verb.__dataclass_fields__)


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        (FilterPairs, {"sign": "explain_away", "fraction": 0.0}),
        (FilterPairs, {"sign": "explain_away", "fraction": 1.0}),
        (FilterPairs, {"sign": "explain_away", "fraction": True}),
        (FilterPairs, {"sign": "away", "fraction": 0.5}),
        (FilterPairs, {"sign": "explain_away"}),
        (FilterPairs, {"sign": "explain_away", "fraction": 0.5, "above": 1}),
        (FilterPairs, {"sign": "explain_away", "fraction": 0.5, "side": "chosen"}),
        (FilterPairs, {"sign": "explain_away", "fraction": "all"}),
        (FilterPairs, {"sign": "explain_away", "fraction": "some"}),
        (FilterPairs, {"sign": "explain_away", "above": -1}),
        (FilterPairs, {"sign": "explain_away", "above": float("nan")}),
        (FilterPairs, {"sign": "explain_away", "side": "prompt"}),
        (ShapeReward, {"sign": "explain_away", "constant": 2}),
        (ShapeReward, {"sign": "explain_away", "constant": 2, "strength": 1, "where": Where(prompt="x")}),
        (ShapeReward, {"sign": "explain_away", "constant": 0, "where": Where(prompt="x")}),
        (MaskTokens, {"sign": "amplify"}),
        (MaskTokens, {"sign": "explain_away", "threshold": float("inf")}),
        (MaskTokens, {"sign": "explain_away", "chance": 0.1}),
        (MaskTokens, {"sign": "explain_away", "positions": "decided", "unit": "word"}),
        (MaskTokens, {"sign": "explain_away", "positions": "decided", "chance": 1.0}),
        (Inoculate, {"sign": "amplify", "instruction": "Be bold."}),
        (Inoculate, {"sign": "explain_away", "instruction": " "}),
        (Inoculate, {"sign": "explain_away", "instruction": "Be bold.", "side": "rejected"}),
        (Residualize, {"sign": "amplify", "instruction": "Be bold."}),
        (Residualize, {"sign": "explain_away", "steer": 0.0}),
        (Residualize, {"sign": "explain_away"}),
        (ShapeReward, {"sign": "explain_away", "strength": -1}),
        (ShapeReward, {"sign": "explain_away", "strength": float("nan")}),
        (ShapeReward, {"sign": "amplify"}),
        (ShapeReward, {"sign": "amplify", "strength": "auto"}),
        (ShapeReward, {"sign": "explain_away", "strength": "Auto"}),
        (Steer, {"sign": "explain_away", "strength": 0}),
        (Steer, {"sign": "explain_away", "strength": 1, "side": "left"}),
        (Steer, {"sign": "away", "strength": 1}),
        (Steer, {"sign": "explain_away", "strength": 1, "fraction": 1}),
        (AblateFeatures, {"sign": "explain_away", "strength": 1.1}),
        (AblateFeatures, {"sign": "explain_away", "keep": "yes"}),
        (AblateFeatures, {"sign": "amplify"}),
        (ProjectOut, {"sign": "explain_away", "from_": "weights"}),
        (ProjectOut, {"sign": "explain_away", "from_": "gradient"}),
        (ProjectOut, {"sign": "explain_away", "from_": "gradient", "weights": "(", "keep": True}),
        (ProjectOut, {"sign": "explain_away", "from_": "gradient", "weights": "o_proj", "keep": True}),
        (ProjectOut, {"sign": "amplify"}),
    ],
)
def test_built_in_python_with_bad_values(verb: Any, values: dict[str, Any]) -> None:
    with pytest.raises(AnatomyError, match="found"):
        verb(concept="bold", **values)


def test_filter_drops_the_largest_gaps_of_its_sign() -> None:
    gap = np.array([0.1, 3.0, -2.0, 1.0, 0.0, 2.0, -0.5, 0.2, 0.3, -9.0])
    rows, gate = np.arange(10), np.ones(10, bool)
    away = FilterPairs("c", "explain_away", 0.3).dropped(gap, 0 * gap, rows, gate)
    assert np.flatnonzero(away).tolist() == [1, 3, 5]
    more = FilterPairs("c", "amplify", 0.29).dropped(gap, 0 * gap, rows, gate)  # 2.9 pairs: whole pairs only
    assert np.flatnonzero(more).tolist() == [2, 9]


def test_filter_never_drops_a_pair_without_a_gap_of_its_sign() -> None:
    gap = np.array([1.0, 0.0, -1.0, 0.0])
    for sign, expected in (("explain_away", [0]), ("amplify", [2])):
        dropped = FilterPairs("c", sign, 0.99).dropped(gap, 0 * gap, np.arange(4), np.ones(4, bool))
        assert np.flatnonzero(dropped).tolist() == expected


def test_filter_takes_its_share_within_the_gate() -> None:
    gap = np.arange(20.0) + 1
    gate = np.arange(20) < 10
    dropped = FilterPairs("c", "explain_away", 0.2).dropped(gap, 0 * gap, np.arange(20), gate)
    assert np.flatnonzero(dropped).tolist() == [8, 9]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"above": 0}, [0, 1]),  # gap 2, 1
        ({"above": 1.0}, [0]),
        ({"sign": "amplify", "above": 1}, [3]),
        ({"side": "chosen"}, [0, 1, 4]),
        ({"side": "rejected"}, [1, 3, 4]),
        ({"side": "either"}, [0, 1, 3, 4]),
        ({"side": "either", "above": 2}, [1]),
        ({"side": "chosen", "above": -1}, [0, 1, 2, 4]),
        ({"sign": "amplify", "side": "chosen"}, [0, 1, 4]),  # the sign says why, the side says which
        ({"fraction": "all", "where": Where(prompt="x")}, [0, 1, 2, 3, 4]),
    ],
)
def test_filter_by_threshold_by_side_and_whole_gates(values: dict[str, Any], expected: list[int]) -> None:
    chosen = np.array([2.0, 3.0, 0.0, -1.0, 1.0, 9.0])
    rejected = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    gate = np.arange(6) < 5
    dropped = FilterPairs("c", **{"sign": "explain_away", **values}).dropped(chosen, rejected, np.arange(6), gate)
    assert np.flatnonzero(dropped).tolist() == expected


def test_filter_ties_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.choice(10**9, 1000, replace=False)
    gap, gate = rng.integers(-1, 2, 1000).astype(float), np.ones(1000, bool)
    rule = FilterPairs("c", "explain_away", 0.1)
    dropped = set(rows[rule.dropped(gap, 0 * gap, rows, gate)])
    assert len(dropped) == 100
    order = rng.permutation(1000)
    assert dropped == set(rows[order][rule.dropped(gap[order], 0 * gap, rows[order], gate)])
    # Neither the first rows nor those of another concept's filter
    ranks = rows.argsort().argsort()[np.isin(rows, list(dropped))]
    assert 400 < ranks.mean() < 600
    other = set(rows[FilterPairs("d", "explain_away", 0.1).dropped(gap, 0 * gap, rows, gate)])
    assert len(dropped & other) < 60


def test_shape_offsets_are_centred_and_gated() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(1, 2, 50), rng.normal(0, 1, 50)
    acts = rng.random(50) < 0.5
    plus, minus = ShapeReward.offsets(1.7, chosen, rejected, acts)
    assert (plus[~acts] == 0).all()
    assert (minus[~acts] == 0).all()
    np.testing.assert_allclose(plus.sum() + minus.sum(), 0, atol=1e-12)
    np.testing.assert_allclose((plus - minus)[acts], 1.7 * (chosen - rejected)[acts], rtol=1e-12)
    assert (ShapeReward.offsets(1.7, chosen, rejected, np.zeros(50, bool))[0] == 0).all()


def test_shape_sign() -> None:
    assert ShapeReward("c", "explain_away", 2).fixed == 2.0
    assert ShapeReward("c", "amplify", 2).fixed == -2.0
    assert ShapeReward("c", "explain_away").fixed is None
