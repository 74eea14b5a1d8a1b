"""What is left of a difference between a context and the rest beyond other columns, such as named habits."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy import stats as distributions

from . import stats

# Share of a direction's size below which it is rounding; of a context's variance below which nothing is left of it.
RANK, LEAST_LEFT = 1e-8, 1e-6


@dataclass(frozen=True)
class Beyond:
    """Differences beyond other columns; each array is (n_contexts, n_columns), NaN where unknown."""

    delta: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    p: np.ndarray


def beyond(
    values: np.ndarray,
    columns: np.ndarray,
    members: sparse.csr_array,
    pool: np.ndarray,
    others: np.ndarray,
    groups: np.ndarray | None = None,
    level: float = 0.95,
) -> Beyond:
    """Difference between each context and the rest of the pool in what `others` leave of the values.

    `delta` is the coefficient of "inside" in the least-squares fit of a column on (1, inside, others): what is left of
    the column, pair by pair, compared between both sides, over the share of the context's own variance that the others
    leave. Its error is that of this comparison, robust to shared prompts and never below that of a context drawn at
    random, with as many degrees of freedom fewer as the others take.

    Args:
        values: (n, n_values); columns: (n_columns,) those to compare.
        members: (n_contexts, n) of ones and zeros, within the pool; pool: (n,) bool.
        others: (n, n_others).
        groups: (n,) prompt of each row; default every row its own.
    Source: method.md section 5.
    """
    rows = np.flatnonzero(pool)
    basis = _basis(others[rows])
    n, n_fitted = basis.shape
    shape = (members.shape[0], len(columns))
    found = Beyond(*(np.full(shape, np.nan) for _ in range(4)))
    own = None if groups is None else groups[rows]
    n_groups = n if own is None else len(np.unique(own))
    if n_groups <= n_fitted + 1:
        return found
    inside = sparse.csr_array(members[:, rows])
    n_in = inside.sum(axis=1).astype(np.float64)
    variance = n_in * (n - n_in) / n
    explained = np.square(inside @ basis).sum(axis=1) - n_in**2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        left = 1 - explained / variance
    left = np.where(left > LEAST_LEFT, left, np.nan)[:, None]
    lost = np.sqrt((n - 1) / (n - n_fitted))
    every, halves = np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64)
    for start in range(0, len(columns), stats.BLOCK):
        block = slice(start, start + stats.BLOCK)
        u = np.asarray(values[rows][:, columns[block]], dtype=np.float64)
        u -= basis @ (basis.T @ u)
        welch = stats.compare_members(u, inside, every, halves)[0]
        if own is not None:
            welch = stats.welch_of_groups(welch, u, inside, every, own)
        welch = stats.no_surer_than_a_draw(welch, u, every, own)
        with np.errstate(invalid="ignore", divide="ignore"):
            delta, error = welch.delta / left, welch.error * lost / left
            df = np.clip(welch.df, 1.0, n_groups - n_fitted)
            found.p[:, block] = 2 * distributions.t.sf(np.abs(delta / np.where(error > 0, error, np.nan)), df)
            half = distributions.t.ppf(0.5 + level / 2, df) * error
        found.delta[:, block], found.ci_low[:, block], found.ci_high[:, block] = delta, delta - half, delta + half
    return found


def _basis(others: np.ndarray) -> np.ndarray:
    """(n, n_fitted) orthonormal columns that span a constant and `others`."""
    design = np.column_stack([np.ones(len(others)), others - others.mean(axis=0)])
    size = np.sqrt(np.square(design).sum(axis=0))
    design = design[:, size > 0] / size[size > 0]
    left, strength, _ = np.linalg.svd(design, full_matrices=False)
    return np.asarray(left[:, strength > RANK * strength.max(initial=0.0)])
