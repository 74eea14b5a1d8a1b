"""The shift that a pilot predicts, its interval, how reliable it is, and what may be said of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

from ..audit.stats import mean_test, split_half_reliability

# Below it two halves of the prompts agree too little for a statement on any single concept.
RELIABLE = 0.5
# Standard error of a shift over the shift, because training does not follow the straight line of its first steps:
# what makes 95 % intervals hold the shifts of real trainings (benchmarks/studies/real_intervals.py, each set by the
# factor of the others).
PATH_ERROR = 0.68
MORE, LESS = "more", "less"


@dataclass(frozen=True, eq=False)
class Shifts:
    """Shift of each of C quantities from the start model's responses to other ones.

    Attributes:
        shift, low, high: (C,) mean over prompts with its 95 % interval.
        by_prompt: (P, C) of each prompt; rows of NaN where one of the sets has no response.
    """

    shift: np.ndarray
    low: np.ndarray
    high: np.ndarray
    by_prompt: np.ndarray

    def interval(self, k: int) -> tuple[float, float, float]:
        return float(self.shift[k]), float(self.low[k]), float(self.high[k])


def prompt_means(values: np.ndarray, prompts: np.ndarray, n_prompts: int) -> np.ndarray:
    """(n_prompts, C) mean over the responses to each prompt; NaN where there is none.

    Args:
        values: (n, C).
        prompts: (n,) number of each response's prompt.
    """
    count = np.bincount(prompts, minlength=n_prompts).astype(np.float64)
    total = np.zeros((n_prompts, values.shape[1]))
    np.add.at(total, prompts, values)
    with np.errstate(invalid="ignore"):
        return total / count[:, None]


def shift_between(start: np.ndarray, after: np.ndarray, relative_error: float = 0.0) -> Shifts:
    """Shift with its interval: the noise of both sets of responses, and that of how far the pilot is carried on.

    The variance of a shift is that of its mean over prompts (differences within a prompt, so that random numbers in
    common cancel) plus (relative_error · shift)².

    Args:
        start, after: (P, C) mean over the responses to each prompt, NaN where there is none.
        relative_error: standard error of the factor by which the way is gone, over the factor.
    """
    difference = after - start
    there = _there(difference)
    mean, error, _ = mean_test(there)
    whole = np.sqrt(error**2 + (relative_error * mean) ** 2)
    half = t_distribution.ppf(0.975, max(1, len(there) - 1)) * whole
    return Shifts(mean, mean - half, mean + half, difference)


def reliability(shifts: Shifts, seed: int) -> float | None:
    """Correlation over the C quantities of halves of the prompts, stepped up (Spearman-Brown); None where unknown."""
    return split_half_reliability(_there(shifts.by_prompt), seed)


def _there(by_prompt: np.ndarray) -> np.ndarray:
    """Rows of the prompts that have responses in both sets."""
    return by_prompt[~np.isnan(by_prompt).all(axis=1)]


def statement(
    interval: tuple[float, float, float], reliable: float | None, reason: str | None
) -> tuple[str | None, str]:
    """What may be said: more, less, or None, and why not.

    Args:
        interval: shift, low, high.
        reliable: of all shifts together, as `reliability` gives it; None where it is not known.
        reason: why nothing may be said of any.

    >>> statement((0.2, 0.1, 0.3), 0.9, None), statement((0.2, -0.1, 0.5), 0.9, None)
    (('more', ''), (None, 'the interval holds zero'))
    """
    _, low, high = interval
    if reason is not None:
        return None, reason
    if reliable is None:
        return None, "too few prompts or concepts to say how reliable it is"
    if reliable < RELIABLE:
        return None, f"two halves of the prompts agree too little (reliability {reliable:.2f})"
    if not (low > 0 or high < 0):
        return None, "the interval holds zero"
    return (MORE if low > 0 else LESS), ""
