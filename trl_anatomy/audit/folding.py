"""Near-copies among hypotheses: those that say the same of almost the same pairs are folded under the first."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

# |Correlation| from which on two contexts, or two concepts, are the same to a reader.
SAME = 0.5
# Rows that are worked on at a time.
ROWS = 4096


def context_correlations(members: sparse.csr_array, pool: np.ndarray) -> np.ndarray:
    """(K, K) correlation of belonging to one context and to another, over the pool.

    Args:
        members: (K, n) of ones and zeros, within the pool; pool: (n,) bool.
    Returns:
        Ones on the diagonal; 0 with a context of no pair or of all.
    """
    n = float(pool.sum())
    size = members.sum(axis=1).astype(np.float64)
    overlap = np.asarray((members @ members.T).todense(), dtype=np.float64)
    spread = np.sqrt(np.maximum(size * (n - size), 0.0))
    both = np.outer(spread, spread)
    found = np.divide(n * overlap - np.outer(size, size), both, out=np.zeros_like(both), where=both > 0)
    np.fill_diagonal(found, 1.0)
    return found


def side_correlations(values: np.ndarray, columns: np.ndarray, pool: np.ndarray | None = None) -> np.ndarray:
    """(J, J) correlation of columns over both directions of all pairs, which swapping sides does not change.

    The means over both directions are zero, so this is the cosine.

    Args:
        values: (n, M) chosen minus rejected; columns: (J,) of them; pool: (n,) bool, default all rows.
    Returns:
        Ones on the diagonal; 0 with a column that never varies.
    """
    rows = np.arange(len(values)) if pool is None else np.flatnonzero(pool)
    products = np.zeros((len(columns), len(columns)))
    for start in range(0, len(rows), ROWS):
        block = np.asarray(values[rows[start : start + ROWS]][:, columns], dtype=np.float64)
        products += block.T @ block
    size = np.sqrt(np.diag(products))
    both = np.outer(size, size)
    found = np.divide(products, both, out=np.zeros_like(both), where=both > 0)
    np.fill_diagonal(found, 1.0)
    return found


def fold(
    contexts: Sequence[int], concepts: Sequence[int], signs: Sequence[float], alike: np.ndarray, same: np.ndarray
) -> np.ndarray:
    """Which earlier hypothesis each says the same as.

    Two say the same where contexts and concepts both correlate by `SAME` or more, and the signs of correlations and of
    differences agree: less of it outside a context is more of it inside.

    Args:
        contexts, concepts: (N,) numbers into `alike` and `same`, the hypothesis to be kept first.
        signs: (N,) of the differences.
        alike: (K, K) correlation of contexts; same: (J, J) of concepts.
    Returns:
        (N,) place of the hypothesis that it is folded under, -1 for one that says something new.

    >>> fold([0, 0], [0, 1], [1, 1], np.eye(1), np.array([[1, 0.8], [0.8, 1]])).tolist()
    [-1, 0]
    """
    under = np.full(len(contexts), -1, dtype=np.int64)
    lines = np.empty((3, len(contexts)), dtype=np.int64)
    n = 0
    for i, (k, m, sign) in enumerate(zip(contexts, concepts, signs, strict=True)):
        place, of_context, of_concept = lines[:, :n]
        across, between = alike[k, of_context], same[m, of_concept]
        agrees = across * between * sign * np.sign(np.asarray(signs)[place]) > 0
        close = agrees & (np.abs(across) >= SAME) & (np.abs(between) >= SAME)
        if close.any():
            under[i] = place[np.argmax(np.where(close, np.abs(across * between), -1.0))]
        else:
            lines[:, n] = i, k, m
            n += 1
    return under
