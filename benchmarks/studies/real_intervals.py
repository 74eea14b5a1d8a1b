"""How far a real training leaves the straight line of its pilot, and whether intervals that allow for it hold.

The shift of a training, seen in responses to half the held-out prompts, is taken as the pilot's, seen in the other
half, plus noise of both and an error in proportion to the shift. The proportion is that of greatest likelihood over all
sets but one; how many 95 % intervals hold the shifts of that one is recorded. `PATH_ERROR` of the product is that of
all sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import t

# A squared error beyond so many variances pulls no more: a few columns must not widen the intervals of all.
FARTHEST = 16.0
LEAST = 1e-5  # variance of a rate whose responses are all alike


@dataclass(frozen=True)
class Foretold:
    """Of K columns: shift by the pilot and its standard error, shift observed and its own; and prompts of a half."""

    shift: np.ndarray
    error: np.ndarray
    observed: np.ndarray
    noise: np.ndarray
    n_prompts: int


def by_prompts(values: np.ndarray, asked: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean over prompts of (n, K) values, its standard error, and how many prompts have any."""
    prompts = [values[rows & (asked == prompt)] for prompt in np.unique(asked[rows])]
    means = np.array([np.nanmean(of, axis=0) for of in prompts if np.isfinite(of).any()])
    return means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(len(means)), len(means)


def variance(told: Foretold, path: float) -> np.ndarray:
    return told.error**2 + told.noise**2 + (path * told.shift) ** 2 + LEAST


def path_error(told: Sequence[Foretold]) -> float:
    """Error in proportion to the shift, of greatest likelihood; each half counts alike."""

    def surprise(log_path: float) -> float:
        total = 0.0
        for one in told:
            of = variance(one, float(np.exp(log_path)))
            total += float(np.mean(np.log(of) + np.minimum((one.observed - one.shift) ** 2 / of, FARTHEST)))
        return total

    return float(np.exp(minimize_scalar(surprise, bounds=(-5, 2), method="bounded").x))


def covered(told: Foretold, path: float) -> float:
    half = t.ppf(0.975, told.n_prompts - 1) * np.sqrt(variance(told, path))
    return float(np.mean(np.abs(told.observed - told.shift) <= half))


def coverage(sets: Mapping[str, Sequence[Foretold]]) -> dict[str, Any]:
    """Of each set: the path's error over the other sets, and the share of shifts held without and with it.

    A shift is held where it lies within the interval once this is widened by the noise of what was observed.
    """
    every = [one for told in sets.values() for one in told]
    found: dict[str, Any] = {"path error of all sets": path_error(every)} if every else {}
    for name, told in sets.items():
        others = [one for other, of in sets.items() if other != name for one in of]
        if others and told:
            path = path_error(others)
            found[name] = {
                "path error of the others": path,
                "held by noise alone": float(np.mean([covered(one, 0.0) for one in told])),
                "held": float(np.mean([covered(one, path) for one in told])),
            }
    return found
