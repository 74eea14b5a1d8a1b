"""Balanced weights of pairs, and how many pairs they rest on."""

import numpy as np


def effective_size(weight: np.ndarray, copies: np.ndarray) -> tuple[float, int]:
    """Effective sample size (Σw)² / Σw² of pairs of which identical ones are one of their summed weight.

    Args:
        weight: (n,) of at least 0.
        copies: (n,) the same number for identical pairs.

    Returns:
        It, and the number of distinct pairs.

    >>> effective_size(np.ones(6), np.array([0, 0, 1, 1, 2, 2]))
    (3.0, 3)
    """
    together = np.bincount(np.unique(copies, return_inverse=True)[1], weight)
    return float(together.sum() ** 2 / max(np.square(together).sum(), 1e-300)), len(together)


def balanced_weights(x: np.ndarray, totals: np.ndarray, base: np.ndarray) -> np.ndarray | None:
    """Coefficients of the weights closest to `base` whose sums over the columns of x are `totals`.

    With η the result, w = base · exp(x · η) solves x' w = totals and has the smallest generalised Kullback-Leibler
    divergence Σ w·log(w/base) − w + base of all that do (its convex dual, by Newton's method).

    Args:
        x: (n, K).
        totals: (K,).
        base: (n,) above 0.

    Returns:
        (K,); None where no weights above 0 do it. Columns that say the same share what they need.

    Source: method.md section 12, balanced weights (entropy balancing).

    Example:
        >>> x = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])  # three up, one down: balance, keep the sum
        >>> eta = balanced_weights(x, np.array([4.0, 0.0]), np.ones(4))
        >>> np.exp(x @ eta).round(6).tolist()
        [0.666667, 0.666667, 0.666667, 2.0]
    """
    size = base.sum()
    eta = np.zeros(x.shape[1])

    def dual(at: np.ndarray) -> float:
        with np.errstate(over="ignore"):
            return float(base @ np.exp(x @ at) - totals @ at)

    for _ in range(200):
        weight = base * np.exp(x @ eta)
        force = totals - x.T @ weight
        if np.abs(force).max() <= 1e-13 * size:
            break
        step = np.linalg.lstsq((x * weight[:, None]).T @ x, force, rcond=1e-13)[0]
        gain, length = float(force @ step), 1.0
        if not gain > 1e-24 * size:  # as near as rounding lets it come
            break
        if gain > 1e-8 * size:  # below, the dual is too flat for a comparison and the full step is right
            before = dual(eta)
            while not dual(eta + length * step) <= before - 1e-4 * length * gain and length > 1e-12:
                length /= 2
        if np.abs(x @ (eta + length * step)).max() > 500:
            return None
        eta = eta + length * step
    missed = np.abs(totals - x.T @ (base * np.exp(x @ eta))).max()
    return eta if missed <= 1e-8 * size else None
