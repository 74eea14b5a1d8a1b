"""The margin at the end of a training against the differential equation it solves; the way to it on known paths."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from trl_anatomy.checking.margin_curve import (
    MAX_EVALUATIONS,
    TOLERANCE,
    alpha_for_margin,
    expected_margin,
    margin_after,
)

SCHEDULES = {
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "cosine with warm-up": lambda t: t / 0.1 if t < 0.1 else 0.5 * (1 + np.cos(np.pi * (t - 0.1) / 0.9)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pull", [-2.0, 0.3, 4.0, 900.0])
def test_the_closed_form_solves_the_equation(schedule: str, pull: float) -> None:
    """dm/dt = c·rate(t)·σ(−m), integrated numerically, for rates that warm up and fall."""
    rate = SCHEDULES[schedule]

    def slope(t: float, m: np.ndarray) -> np.ndarray:
        return pull * rate(t) / (1 + np.exp(m))

    ends = [0.1, 0.5, 1.0]
    solved = solve_ivp(slope, (0, 1), [0.0], t_eval=ends, rtol=1e-10, atol=1e-12, max_step=0.01).y[0]
    grids = [np.linspace(0, end, 20_001) for end in ends]
    sums = [np.trapezoid([rate(t) for t in grid], grid) for grid in grids]
    np.testing.assert_allclose(margin_after(pull, np.array(sums)), solved, rtol=1e-5)


def test_the_margin_of_large_and_of_no_steps() -> None:
    assert abs(margin_after(3.0, 0.0)) < 1e-15
    m = float(margin_after(1.0, 1e6))
    assert m + np.exp(m) == pytest.approx(1e6 + 1)
    assert margin_after(2.0, 3.0, logistic=False) == 3.0
    for logistic in (True, False):  # both begin with half the pull
        assert margin_after(2.0, 1e-6, logistic=logistic) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("logistic", [True, False])
def test_the_pull_is_found_again(logistic: bool) -> None:
    s = np.arange(6) * 0.02
    margins = margin_after(20.0, s, logistic=logistic)
    found = expected_margin(s, margins, [8] * 5 + [64], spread=0.5, s_end=1.0, logistic=logistic)
    assert found.pull == pytest.approx(20.0, rel=1e-6)
    assert found.margin == pytest.approx(float(margin_after(20.0, 1.0, logistic=logistic)), rel=1e-6)
    assert found.low < found.margin < found.high


def test_its_interval_covers() -> None:
    """Margins of pairs drawn about the curve: the interval of the end holds the end in about 95 % of the draws."""
    rng = np.random.default_rng(0)
    s, n = np.arange(8) * 0.05, np.array([8] * 7 + [64])
    truth, end = margin_after(15.0, s), float(margin_after(15.0, 3.0))
    held = 0
    for _ in range(400):
        found = expected_margin(s, truth + rng.normal(size=8) * 0.6 / np.sqrt(n), n.tolist(), spread=0.6, s_end=3.0)
        held += found.low <= end <= found.high
    assert 0.92 < held / 400 < 0.98


def test_a_margin_like_noise_says_nothing_about_the_end() -> None:
    assert not expected_margin([0.0, 1.0, 2.0], [0.0, 0.01, -0.02], [8, 8, 16], spread=0.5, s_end=10.0).known
    assert expected_margin([0.0, 1.0, 2.0], [0.0, 0.3, 0.6], [8, 8, 16], spread=0.1, s_end=10.0).known


PATHS: dict[str, Callable[[float], float]] = {
    "straight": lambda a: 0.3 * a,
    "flattens": lambda a: 4 * (1 - np.exp(-0.1 * a)),
    "steepens": lambda a: 0.05 * a + 0.04 * a**2,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [0.04, 1.0, 2.5])
def test_the_way_to_a_margin(path: str, target: float) -> None:
    asked: list[float] = []

    def margin_at(alpha: float) -> float:
        asked.append(alpha)
        return PATHS[path](alpha)

    found = alpha_for_margin(margin_at, target, cap=20.0, at_one=PATHS[path](1.0))
    assert abs(found.margin - target) <= TOLERANCE * target
    assert found.margin == pytest.approx(PATHS[path](found.alpha))
    assert len(asked) <= MAX_EVALUATIONS
    assert not found.capped
    derivative = (PATHS[path](found.alpha + 1e-4) - PATHS[path](found.alpha - 1e-4)) / 2e-4
    assert found.slope == pytest.approx(derivative, rel=0.8)


def test_a_margin_beyond_the_cap_is_said_to_be() -> None:
    found = alpha_for_margin(lambda a: 0.1 * a, 5.0, cap=10.0, at_one=0.1)
    assert (found.alpha, found.margin, found.capped) == (10.0, 1.0, True)


@pytest.mark.parametrize("peak", [1.7, 5.0, 9.5])
def test_a_margin_that_sinks_again_is_taken_near_its_height(peak: float) -> None:
    """A straight line may leave the region in which it was learned: the largest margin of those measured is taken."""

    def margin_at(alpha: float) -> float:
        return 0.5 * (alpha / peak) * (2 - alpha / peak)

    found = alpha_for_margin(margin_at, 5.0, cap=10.0, at_one=margin_at(1.0))
    assert found.capped
    assert found.margin >= 0.8 * 0.5
    assert found.margin == pytest.approx(margin_at(found.alpha))
