"""Which responses show a concept? Those in which more of its features fire than a split point of its own says.

The split point is that of both sides together, so it knows nothing of chosen and rejected.
"""

from itertools import pairwise

import numpy as np
from scipy import sparse

# Rows that are worked on at a time: they should stay in the cache.
ROWS = 4096
# Columns that hold rates: of a concept, and of a hypothesis inside and outside its context.
RATES = ("rate_chosen", "rate_rejected")
CONTEXT_RATES = ("rate_chosen_in", "rate_rejected_in", "rate_chosen_out", "rate_rejected_out")


def split_points(
    counts: tuple[np.ndarray, np.ndarray],
    sizes: np.ndarray,
    lengths: tuple[np.ndarray, np.ndarray],
    used: np.ndarray | None = None,
) -> np.ndarray:
    """Features of each concept that a response shows at most without showing the concept.

    The split of the counts of both sides into two groups whose means lie furthest apart for what varies within them
    (Otsu 1979); of equal ones the lowest. A concept of one feature is shown where that fires.

    Args:
        counts: of chosen and of rejected, (n, K): features of each concept that fire in a response.
        sizes: (K,) features of each concept.
        lengths: (n,) tokens of each response; one without tokens says nothing.
        used: (n,) bool, one pair of each set of copies; default no pair is a copy.
    Returns:
        (K,) int64, from 0 to the size less 1.
    """
    offset = np.r_[0, np.cumsum(sizes + 1)].astype(np.int64)
    tally = np.zeros(offset[-1], dtype=np.int64)
    for side, length in zip(counts, lengths, strict=True):
        told = length > 0 if used is None else (length > 0) & used
        for start in range(0, len(side), ROWS):
            block = side[start : start + ROWS][told[start : start + ROWS]]
            tally += np.bincount((block + offset[:-1]).ravel(), minlength=len(tally))
    return np.array([_otsu(tally[a:b]) for a, b in pairwise(offset)], dtype=np.int64)


def _otsu(tally: np.ndarray) -> int:
    """The value up to which the lower group goes; `tally` (m + 1,) counts the values 0 to m."""
    below = np.cumsum(tally)[:-1].astype(np.float64)
    total = np.cumsum(tally * np.arange(len(tally), dtype=np.float64))
    above = tally.sum() - below
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = (total[-1] - total[:-1]) / above - total[:-1] / below
        between = np.nan_to_num(below * above * apart**2, posinf=0.0)
    return int(np.argmax(np.round(between, 9))) if len(between) else 0


def shown_where(counts: np.ndarray, split: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(n, K) bool, written into `out`: whether more features of a concept fire than its split point."""
    for start in range(0, len(counts), ROWS):
        np.greater(counts[start : start + ROWS], split, out=out[start : start + ROWS])
    return out


def shown_by_share(activity: np.ndarray, sizes: np.ndarray, shown_above: np.ndarray) -> np.ndarray:
    """Which responses show each concept, by the share of its features that fire.

    Args:
        activity: (n, K) share of each concept's features that fire in a response.
        sizes: (K,) features of each concept.
        shown_above: (K,) share beyond which a response shows it, as an audit keeps it; NaN where it is not known.

    Returns:
        (n, K) of 0 and 1; NaN in the columns of which it is not known.
    """
    counts, split = np.rint(activity * sizes), np.rint(shown_above * sizes)
    return np.where(np.isnan(split), np.nan, counts > split)


def rates(shown: tuple[np.ndarray, np.ndarray], lengths: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(K,) share of the responses of each side that show each concept; NaN of a side that has no tokens at all."""
    found = tuple(
        side.mean(axis=0) if lengths[name].any() else np.full(side.shape[1], np.nan)
        for name, side in zip(("chosen", "rejected"), shown, strict=True)
    )
    return found[0], found[1]


def context_rates(
    shown: tuple[np.ndarray, np.ndarray],
    lengths: dict[str, np.ndarray],
    members: sparse.csr_array,
    pool: np.ndarray,
) -> dict[str, np.ndarray]:
    """Share of the responses that show a concept, by side, inside each context and in the rest of the pool.

    Args:
        members: (n_contexts, n) of ones and zeros, within the pool; pool: (n,) bool.
    Returns:
        Each of `CONTEXT_RATES` -> (n_contexts, K); NaN where there is no response.
    """
    n_in = members.sum(axis=1).astype(np.float64)[:, None]
    found = {}
    for name, side in zip(("chosen", "rejected"), shown, strict=True):
        n_concepts = side.shape[1]
        inside, every = np.empty((members.shape[0], n_concepts)), np.empty(n_concepts)
        for start in range(0, n_concepts, 64):
            block = side[:, start : start + 64].astype(np.float64)
            inside[:, start : start + 64], every[start : start + 64] = members @ block, pool @ block
        if not lengths[name].any():
            inside[:], every[:] = np.nan, np.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"rate_{name}_in"] = inside / n_in
            found[f"rate_{name}_out"] = (every - inside) / (pool.sum() - n_in)
    return found
