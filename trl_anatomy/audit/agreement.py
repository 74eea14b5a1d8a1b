"""Communities whose members agree: groups of latents that fire in the same responses, and lone latents beside them.

Two latents agree by the correlation phi of their firing over responses. A community is a group whose members agree
with each other by more than a bound on average, whatever its size (the constant Potts model, by Leiden). The bound is
the one whose communities, found in one half of the prompts, tell their members best in the other half.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.stats import chi2

from .clusters import (
    BLOCK_CELLS,
    CHANCE,
    COFIRING_WORK,
    affordable,
    fired_together,
    firing_tables,
    live_features,
    seed_libc,
    strongest,
)

# Bounds that are tried, and the one that is taken where trying them costs too much or tells nothing.
BOUNDS, USUAL_BOUND = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7), 0.3
# Live latents up to which bounds are tried, on as many responses as a quarter of the usual work allows.
MOST_TRIED, TRIED_WORK = 4096, COFIRING_WORK / 4
# A community has come back if it shares more than this of all latents of both (Jaccard): no two can be its like.
RETURNED = 0.5
# Links of a weaker agreement, and more than so many (or `edge_share` of all pairs, if that is more), are left out.
LEAST_PHI, MOST_LINKS = 0.2, 2_000_000
# Concepts at most, communities before lone latents: what tests and tables cost grows with their number.
MOST_CONCEPTS = 1024


@dataclass(frozen=True)
class Agreeing:
    """Concepts that `agreeing_communities` found.

    Attributes:
        features: arrays of feature ids (ascending), largest first, ties by smallest id.
        bound: mean agreement that a community's members exceed.
        returned: at that bound, communities of one half of the prompts that came back in the other, and how many it
            had; None where no bound was tried.
        n_left: communities and lone latents beyond `MOST_CONCEPTS`.
    """

    features: list[np.ndarray]
    bound: float
    returned: tuple[int, int] | None
    n_left: int


def agreement_graph(fired: sparse.csr_array, live: np.ndarray, edge_share: float = 0.01) -> sparse.csr_matrix:
    """Pairs of live features that fire in the same responses, weighted by the correlation phi of their firing.

    Linked are pairs with phi of at least `LEAST_PHI` and beyond chance: n·phi² against chi-squared with one degree of
    freedom, Bonferroni over all pairs. Of more than `MOST_LINKS` and `edge_share` of all, the strongest are taken.

    Args:
        fired: (n_samples, d_sae), a stored non-zero means that the feature fired in the sample.
        live: (L,) feature ids.
    Returns:
        Symmetric (L, L) float64, diagonal empty.
    """
    n, size = fired.shape[0], len(live)
    n_pairs = size * (size - 1) / 2
    least = max(LEAST_PHI, float(np.sqrt(chi2.isf(CHANCE / max(1.0, n_pairs), 1) / n)))
    wanted = max(MOST_LINKS, int(np.ceil(edge_share * n_pairs)))
    table, by_feature = firing_tables(fired, live)
    count = np.diff(by_feature.indptr).astype(np.float64)
    spread = np.sqrt(count * (n - count))
    odds, scale = (count / spread).astype(np.float32), (1 / spread).astype(np.float32)
    step = max(1, BLOCK_CELLS // max(1, size))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    held, rest, first = 0, table, 0
    for start in range(0, size, step):
        if start - first > (size - first) // 8:  # columns that are done are left out, now and then
            rest, first = table[:, start:], start
        both = fired_together(by_feature[start : start + step], rest)
        rows = slice(start, start + len(both))
        # In single precision first: most pairs are far below.
        rough = both * (np.float32(n) * scale[rows, None])
        rough *= scale[first:]
        rough -= np.multiply.outer(odds[rows], odds[first:])
        row, col = np.nonzero(rough >= least - 0.01)
        upper = row + start < col + first
        row, col = row[upper], col[upper]
        i, j = row + start, col + first
        phi = np.round((both[row, col].astype(np.float64) * n - count[i] * count[j]) / (spread[i] * spread[j]), 12)
        keep = phi >= least
        parts.append((i[keep].astype(np.int32), j[keep].astype(np.int32), phi[keep]))
        held += int(keep.sum())
        if held > 2 * wanted:
            parts = [strongest(parts, wanted)]
            held, least = len(parts[0][2]), float(parts[0][2].min())
    i, j, phi = strongest(parts, wanted)
    return sparse.csr_matrix((np.r_[phi, phi], (np.r_[i, j], np.r_[j, i])), shape=(size, size))


def agreeing_groups(graph: sparse.csr_matrix, bound: float, seed: int = 0) -> np.ndarray:
    """(L,) group of each feature: within a group every member agrees with the others by `bound` or more on average.

    The groups make the sum of `phi - bound` over all pairs inside them large: the constant Potts model (Traag, Van
    Dooren and Nesterov 2011), by Leiden. Members that then agree less leave, and are groups of their own.

    Args:
        graph: of `agreement_graph`; a pair that it does not link counts as 0.
    """
    from sknetwork.clustering import Leiden

    size = graph.shape[0]
    labels = np.arange(size)
    linked = np.flatnonzero(np.diff(graph.indptr))
    if not len(linked):
        return labels
    inner = graph[linked][:, linked]
    # scikit-network compares the share of the weight with resolution / n² for each pair of nodes.
    resolution = bound * len(linked) ** 2 / inner.data.sum()
    how = {"shuffle_nodes": True, "random_state": seed, "return_probs": False, "return_aggregate": False}
    leiden = Leiden(resolution, "potts", tol_optimization=1e-5, tol_aggregation=1e-5, **how)
    seed_libc(seed)
    labels[linked] = size + leiden.fit_predict(inner)
    row, column = graph.nonzero()
    while True:
        _, labels, members = np.unique(labels, return_inverse=True, return_counts=True)
        inside = labels[row] == labels[column]
        agreed = np.bincount(row[inside], graph.data[inside], size)
        others = members[labels] - 1
        leave = (others > 0) & (agreed < bound * others * (1 - 1e-9))
        if not leave.any():
            return labels
        labels[leave] = len(members) + np.flatnonzero(leave)


def n_returned(labels: tuple[np.ndarray, np.ndarray], live: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
    """Communities of the first grouping that came back in the second (see `RETURNED`), and how many it has.

    Args:
        labels: of each grouping, the group of each of its live features; live: the ids of these.
    """
    width = int(max(ids.max(initial=-1) for ids in live)) + 1
    groups = []
    for label, ids in zip(labels, live, strict=True):
        n_groups = int(label.max(initial=-1)) + 1
        groups.append(sparse.csr_array((np.ones(len(ids)), (label, ids)), shape=(n_groups, width)))
    common = sparse.coo_array(groups[0] @ groups[1].T)
    size, other = (np.asarray(group.sum(axis=1)).ravel() for group in groups)
    alike = common.data / (size[common.row] + other[common.col] - common.data) > RETURNED
    large = size >= 2
    return int(np.sum(large[common.row[alike]])), int(large.sum())


def told_by_others(fired: sparse.csr_array, live: np.ndarray, labels: np.ndarray) -> float:
    """How well communities tell their members: summed squared correlation of each with the number of others that fire.

    A latent whose community fires against it, or that is alone, is not predicted: it adds 0. So a community that is too
    large adds less than its parts, and one that is too small leaves out others that would tell.

    Args:
        fired: (n_samples, d_sae), samples in which the communities were not found.
        live: (L,) feature ids; labels: (L,) group of each.
    """
    n, n_groups = fired.shape[0], int(labels.max(initial=-1)) + 1
    place = np.full(fired.shape[1], -1)
    place[live] = np.arange(len(live))
    one, own, both, squares = np.zeros(len(live)), np.zeros(n_groups), np.zeros(len(live)), np.zeros(n_groups)
    step = max(1, BLOCK_CELLS // max(1, n_groups))
    for start in range(0, n, step):
        block = fired[start : start + step]
        row, at = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr)), place[block.indices]
        row, at = row[at >= 0], at[at >= 0]
        cell = row * n_groups + labels[at]
        together = np.bincount(cell, minlength=block.shape[0] * n_groups).astype(np.float64)
        one += np.bincount(at, minlength=len(live))
        both += np.bincount(at, together[cell], len(live))
        together = together.reshape(block.shape[0], n_groups)
        own += together.sum(axis=0)
        squares += np.square(together).sum(axis=0)
    # Of a member x with S the number of its community that fire, and S - x that of the others
    mean, total = one / n, own[labels] / n
    spread = mean * (1 - mean)
    with_all = both / n - mean * total
    others = squares[labels] / n - total**2 - 2 * with_all + spread
    usable = (spread > 0) & (others > 1e-12)
    r = np.zeros(len(live))
    r[usable] = (with_all - spread)[usable] / np.sqrt(spread[usable] * others[usable])
    return float(np.square(np.maximum(r, 0.0)).sum())


def stable_bound(
    fired: sparse.csr_array, groups: np.ndarray, *, min_count: int, edge_share: float, seed: int
) -> tuple[float, tuple[int, int] | None]:
    """The bound of `BOUNDS` whose communities of each random half of the prompts tell their members best in the other.

    Args:
        fired: (n_samples, d_sae); groups: (n_samples,) prompt of each sample, which stays in one half.
    Returns:
        The bound (`told_by_others`), the lowest of equal ones; communities of one half that came back in the other at
        that bound, and how many it had. `USUAL_BOUND` and None where nothing is predicted.
    """
    names, index = np.unique(groups, return_inverse=True)
    half = (np.random.default_rng(seed).permutation(len(names)) % 2 == 0)[index]
    halves = []
    for rows in (half, ~half):
        part = affordable(fired[np.flatnonzero(rows)], seed, TRIED_WORK)
        live = live_features(part, min_count)
        halves.append((part, live, agreement_graph(part, live, edge_share)))
    (one, live, graph), (other, live_of_other, graph_of_other) = halves
    best, told, returned = USUAL_BOUND, 0.0, None
    for bound in BOUNDS:
        first, second = (agreeing_groups(of, bound, seed) for of in (graph, graph_of_other))
        found = round(told_by_others(other, live, first) + told_by_others(one, live_of_other, second), 6)
        if found > told:
            best, told, returned = bound, found, n_returned((first, second), (live, live_of_other))
    return best, returned


def agreeing_communities(
    fired: sparse.csr_array,
    groups: np.ndarray,
    *,
    min_count: int = 10,
    min_lone: int = 10,
    edge_share: float = 0.01,
    seed: int = 0,
) -> Agreeing:
    """Communities whose members agree, and lone latents: the concepts T1, T2, ... of an audit.

    Args:
        fired: (n_samples, d_sae), a stored non-zero means that the feature fired in the sample; as many are taken as
            `affordable` says.
        groups: (n_samples,) prompt of each sample.
        min_count: a live feature fires in at least so many samples, and stays silent in as many.
        min_lone: the same of a latent that is a concept by itself.
        edge_share: see `agreement_graph`.
        seed: of the halves, and of Leiden.
    """
    every, fired = fired, affordable(fired, seed)
    live = live_features(fired, min_count)
    if not len(live):
        return Agreeing([], USUAL_BOUND, None, 0)
    bound, returned = USUAL_BOUND, None
    if len(live) <= MOST_TRIED:
        bound, returned = stable_bound(every, groups, min_count=min_count, edge_share=edge_share, seed=seed)
    labels = agreeing_groups(agreement_graph(fired, live, edge_share), bound, seed)
    size = np.bincount(labels)[labels]
    count = np.bincount(fired.indices, minlength=fired.shape[1])[live]
    even = np.minimum(count, fired.shape[0] - count)
    order = np.argsort(labels, kind="stable")
    every = [live[part] for part in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)]
    large = sorted((c for c in every if len(c) > 1), key=lambda c: (-len(c), c[0]))
    lone = np.flatnonzero((size == 1) & (even >= min_lone))
    kept = lone[np.lexsort((live[lone], -even[lone]))][: max(0, MOST_CONCEPTS - len(large))]
    features = [*large[:MOST_CONCEPTS], *(live[[k]] for k in np.sort(kept))]
    return Agreeing(features, bound, returned, len(large) + len(lone) - len(features))
