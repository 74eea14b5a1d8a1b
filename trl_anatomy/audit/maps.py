"""Where contexts and concepts lie on the page's two maps: flat pictures of likeness, part of no test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from . import stats
from .views import ROWS, row_norms

if TYPE_CHECKING:
    from .prompt_view import PromptView
    from .views import FeatureView


def plane(gram: np.ndarray) -> np.ndarray:
    """The two axes along which points differ most: principal components, from inner products alone.

    The largest coordinate is 1 in size, and the largest of each axis is positive, so the picture is the same each time.

    Args:
        gram: (n, n) inner products of n points.
    Returns:
        (n, 2) coordinates in [-1, 1]; zeros where the points do not differ.

    >>> plane(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 0.0], [-1.0, 0.0]]
    """
    n = len(gram)
    if n < 2:
        return np.zeros((n, 2))
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    # Rounding leaves tiny values in place of zeros; their axes would be noise.
    strong = np.where(values[::-1][:2] > 1e-9 * max(1e-30, values[-1]), values[::-1][:2], 0.0)
    found = vectors[:, ::-1][:, :2] * np.sqrt(strong)
    for axis in found.T:
        axis *= 1.0 if axis[np.argmax(np.abs(np.round(axis, 9)))] >= 0 else -1.0
    largest = np.abs(found).max()
    if largest > 0:
        found = np.round(found / largest, 4) + 0.0
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _products(blocks: list[np.ndarray]) -> np.ndarray:
    """Inner products of all columns of (n, K) arrays of equally many rows, together (sum of K, sum of K) float64.

    Rows are multiplied in single precision, `ROWS` at a time, and added in double: enough for a picture.
    """
    n_columns = sum(block.shape[1] for block in blocks)
    found = np.zeros((n_columns, n_columns))
    for start in range(0, len(blocks[0]), ROWS):
        rows = np.concatenate([block[start : start + ROWS] for block in blocks], axis=1).astype(np.float32)
        found += rows.T @ rows
    return found


def map_places(view: FeatureView, prompts: PromptView) -> dict[str, list[float]]:
    """Places of all concepts (T, R) on one map and of all contexts (B, A) on another.

    Concepts: by the correlation of their scores over pairs; close means that the same pairs favour both. Contexts: by
    the mean share of each concept in a pair's activity; close means that their pairs show the same concepts.

    Returns:
        Name -> [x, y]; see `plane`.
    """
    blocks = [view.activity.u, prompts.scores.u]
    n = max(1, len(blocks[0]))
    mean = np.concatenate([u.mean(axis=0) if len(u) else np.zeros(u.shape[1]) for u in blocks])
    products = _products(blocks) / n - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(products), 0))
    spread[spread < 1e-12] = np.inf
    concepts = plane(products / np.outer(spread, spread))

    s = view.activity.s
    unit = sparse.diags_array(1 / np.maximum(row_norms(s), 1e-12))
    data = stats.one_hot(view.contexts, int(view.contexts.max(initial=0)) + 1)
    members = sparse.csr_array(sparse.vstack([data, prompts.members], format="csr"))
    shares = members @ unit
    (total,) = stats.in_blocks(s, lambda block: (shares @ block,))
    centres = total / np.maximum(1, members.sum(axis=1))[:, None]
    contexts = plane(centres @ centres.T)

    names = [f"T{k + 1}" for k in range(blocks[0].shape[1])] + [f"R{k + 1}" for k in range(blocks[1].shape[1])]
    names += [f"B{k}" for k in range(data.shape[0])] + [f"A{k + 1}" for k in range(prompts.members.shape[0])]
    return dict(zip(names, [*concepts.tolist(), *contexts.tolist()], strict=True))
