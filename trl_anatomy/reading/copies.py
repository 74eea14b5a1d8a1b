"""Which pairs are copies of one another, as the model reads them, and which rows belong together."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Copies:
    """Copies among pairs, by their tokens after truncation.

    Attributes:
        group: (n_pairs,) int64: pairs of the same prompt and the same two responses share it, whichever is chosen.
        side: (n_pairs,) int64, 1 or -1: pairs of a group with the same side have the same response chosen.
    """

    group: np.ndarray
    side: np.ndarray

    @property
    def n_distinct(self) -> int:
        """Pairs that are left when copies, reversed ones too, count once."""
        return len(np.unique(self.group))

    @property
    def identical(self) -> np.ndarray:
        """(n_pairs,) int64: the same number for pairs that are alike as they are."""
        return 2 * self.group + (self.side < 0)

    def counts(self) -> dict[str, int]:
        """What to tell of them.

        Returns:
            `distinct` pairs; `identical`, pairs that repeat an earlier one; `reversed`, pairs whose chosen and rejected
            stand the other way round in as many others, so that they teach nothing.
        """
        size = int(self.group.max(initial=-1)) + 1
        as_is, swapped = (np.bincount(self.group[self.side == side], minlength=size) for side in (1, -1))
        repeated = np.maximum(as_is - 1, 0) + np.maximum(swapped - 1, 0)
        return {
            "distinct": self.n_distinct,
            "identical": int(repeated.sum()),
            "reversed": int(2 * np.minimum(as_is, swapped).sum()),
        }


def joined(groups: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """(n,) int64: rows that are in one group by any of several groupings, numbered by the least of the first.

    Args:
        groups: (n,) any integers, kept where no other grouping joins two of them.
        others: (n,) any integers each.

    >>> joined(np.array([5, 5, 7, 8]), np.array([0, 1, 2, 1])).tolist()
    [5, 5, 7, 5]
    """
    number, first = np.unique(groups, return_inverse=True)
    links, n_nodes = [], len(number)
    for other in others:  # a graph of groups, linked where they share a row
        of = np.unique(other, return_inverse=True)[1]
        links.append(np.stack([first, n_nodes + of]))
        n_nodes += int(of.max(initial=-1)) + 1
    edges = np.concatenate([*links, np.zeros((2, 0), np.int64)], axis=1)
    graph = sparse.coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(n_nodes, n_nodes))
    component = connected_components(graph, directed=False)[1][: len(number)]
    least = np.full(len(number), np.iinfo(np.int64).max)
    np.minimum.at(least, component, number.astype(np.int64))
    return least[component][first]
