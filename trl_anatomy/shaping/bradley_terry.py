"""What preferences say about concepts: a Bradley-Terry (logistic, no intercept) fit with Wald intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.special import expit

from ..errors import AnatomyError

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_GIVE_A_NUMBER = "Give this rule a number as strength."


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, (K,) each: the estimate and its 95 % Wald interval."""

    strength: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray


def fit_strengths(  # noqa: C901
    gaps: np.ndarray,
    names: Sequence[str],
    offset: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    copies: np.ndarray | None = None,
) -> Fit:
    """Maximum likelihood of P(chosen preferred) = σ(gaps · λ + offset), pair i counting w_i times.

    At the maximum Σ_i w_i · σ(−m_i) · gaps_i = 0 with m = gaps · λ + offset: a policy at the start model feels no pull
    along any of the concepts.

    Args:
        gaps: (n_pairs, K) score of chosen minus rejected; a pair outside a rule's gate has 0 in its column.
        names: what the K columns are called in errors.
        offset: (n_pairs,) a margin that is there already; None for 0.
        weight: (n_pairs,) of at least 0; None for 1. Pairs of weight 0 are left out. The interval takes the weights as
            given, not as counts: variance H⁻¹ · Σ w²p(1 − p)xx' · H⁻¹ with H = Σ w·p(1 − p)xx'.
        copies: (n_pairs,) the same number for identical pairs, which are one of their summed weight in the interval;
            None where none are.

    Raises:
        AnatomyError: no finite maximum (the gaps never point the other way: separation), or one that hardly any pair
            pins down; a column of zeros; columns that cannot be separated.

    Source: method.md section 12, calibrated strength.

    Example:
        >>> fit = fit_strengths(np.array([[1.0]] * 3 + [[-1.0]]), ["bold"])  # three to one: λ = log 3
        >>> round(float(fit.strength[0]), 6), round(float(np.log(3)), 6)
        (1.098612, 1.098612)
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    offset = np.zeros(len(gaps)) if offset is None else np.asarray(offset, dtype=np.float64)
    weight = np.ones(len(gaps)) if weight is None else np.asarray(weight, dtype=np.float64)
    used = weight > 0
    copies = np.arange(int(used.sum())) if copies is None else np.unique(copies[used], return_inverse=True)[1]
    gaps, offset, weight = gaps[used], offset[used], weight[used]
    weight = weight / weight.mean()  # the answer knows no unit of the weights; the stopping rule below does
    n_pairs, k = gaps.shape
    scale = np.abs(gaps).max(axis=0, initial=0.0)
    for name, column, largest in zip(names, gaps.T, scale, strict=True):
        if largest == 0:
            raise AnatomyError(
                f"strength: auto cannot be fitted for {name}: both responses score alike in every pair it acts on. "
                "Drop the rule."
            )
        if column.min() >= 0 or column.max() <= 0:
            side = "chosen" if column.max() > 0 else "rejected"
            raise AnatomyError(
                f"strength: auto cannot be fitted for {name}: in all {int((column != 0).sum())} pairs where the two "
                f"responses differ, the {side} one scores higher, so the fit has no end. {_GIVE_A_NUMBER}"
            )
    x = gaps / scale
    spectrum = np.linalg.eigvalsh(x.T @ x)
    if spectrum[0] <= 1e-12 * spectrum[-1]:
        raise AnatomyError(
            f"strength: auto cannot be fitted for {', '.join(names)} together: their scores rise and fall as one. Keep "
            "one of the rules, or give all but one a number as strength."
        )
    if k > 1 and _separated(x):
        raise AnatomyError(
            f"strength: auto cannot be fitted for {', '.join(names)} together: a sum of their scores never prefers the "
            "rejected response, so the fit has no end. Give one of them a number as strength."
        )
    beta = np.zeros(k)
    for _ in range(200):
        p, curvature = _force(x, beta, offset, weight)
        pull = x.T @ (weight * p)
        try:
            step = np.linalg.solve(curvature, pull)
        except np.linalg.LinAlgError:
            break
        decrement = float(pull @ step)
        if not np.isfinite(decrement) or np.abs(beta).max() > 1e6:
            break
        length = 1.0
        if decrement > 1e-6:  # below, the loss is too flat for a comparison and the full step is right
            before = _loss(x, beta, offset, weight)
            while (
                _loss(x, beta + length * step, offset, weight) > before - 1e-4 * length * decrement and length > 1e-12
            ):
                length /= 2
        beta = beta + length * step
        if decrement < 1e-20 * n_pairs or (decrement < 1e-12 and np.abs(step).max() <= 1e-13 * np.abs(beta).max()):
            bread = np.linalg.inv(_force(x, beta, offset, weight)[1])
            together = np.bincount(copies, weight)[copies]
            error = np.sqrt(np.diag(bread @ _force(x, beta, offset, weight * together)[1] @ bread))
            if ((np.abs(beta) > 20) & (error > np.abs(beta))).any():  # a huge margin that rests on next to no pair
                break
            return Fit(beta / scale, (beta - _Z * error) / scale, (beta + _Z * error) / scale)
    raise AnatomyError(
        f"strength: auto cannot be fitted for {', '.join(names)}: nearly all pairs point the same way. {_GIVE_A_NUMBER}"
    )


def _loss(x: np.ndarray, beta: np.ndarray, offset: np.ndarray, weight: np.ndarray) -> float:
    return float(weight @ np.logaddexp(0, -(x @ beta + offset)))


def _force(x: np.ndarray, beta: np.ndarray, offset: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """σ(−margin) of each pair, and the curvature of the weighted loss."""
    p = expit(-(x @ beta + offset))
    return p, (x * (weight * p * (1 - p))[:, None]).T @ x


def _separated(x: np.ndarray) -> bool:
    """Whether some direction b != 0 has x · b >= 0 for every pair and > 0 for some (a linear program)."""
    x = np.unique(x, axis=0)
    answer = linprog(-x.mean(axis=0), A_ub=-x, b_ub=np.zeros(len(x)), bounds=[(-1, 1)] * x.shape[1], method="highs")
    return bool(answer.status == 0 and (x @ answer.x).max() > 1e-6)
