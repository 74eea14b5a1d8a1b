"""Which concepts does a harvest show? Communities of features that fire together.

The co-firing graph and Leiden are in `clusters.py` (method.md section 3a); here is what an audit feeds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from .clusters import affordable, cofiring_communities, live_features
from .config import AuditConfig
from .views import above

if TYPE_CHECKING:
    from ..reading.harvest import Harvest

# A live feature fires in at least so many responses, and stays silent in as many.
MIN_COUNT = 10
# The published sizes belong to an SAE of 65k latents; below so many live features they are scaled down.
LARGE_SAE = 4096


@dataclass(frozen=True)
class Sizes:
    """Sizes that an audit really used, and why they differ from its settings."""

    min_community: int
    min_concept: int
    resolution: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Communities:
    """The concepts T1, T2, ... of an audit.

    Attributes:
        features: arrays of feature ids, largest community first.
        n_live: features that could be in one.
        sizes: smallest community and concept, and resolution, that were used.
        notes: what the reader should know of how they were found.
    """

    features: list[np.ndarray]
    n_live: int
    sizes: Sizes
    notes: tuple[str, ...]


def find_communities(harvest: "Harvest", config: AuditConfig, distinct: np.ndarray | None = None) -> Communities:
    """Communities of the responses: of both sides of the pairs, or of the one response that a row of SFT data has.

    Args:
        distinct: (n_pairs,) bool, one pair of each set of copies: the others are left out; default no pair is a copy.
    Source: method.md section 3a.
    """
    spans = ("chosen",) if config.data_kind == "sft" else ("chosen", "rejected")
    every = fired_responses(harvest, config.tau, config.community_pairs, config.seed, spans=spans, distinct=distinct)
    fired = affordable(every, config.seed)
    notes: tuple[str, ...] = ()
    if fired.shape[0] < every.shape[0]:
        notes = (
            f"So many features fire at a time that communities were found from {fired.shape[0]} responses of "
            f"{every.shape[0]} drawn.",
        )
    del every
    n_live = len(live_features(fired, MIN_COUNT))
    sizes = sizes_for(n_live, config)
    features = cofiring_communities(
        fired,
        edge_share=config.edge_share,
        min_size=sizes.min_community,
        min_count=MIN_COUNT,
        resolution=sizes.resolution,
        seed=config.seed,
    )
    if not features:
        notes += ("No features fire together often enough to form a concept: this audit can not tell anything.",)
    return Communities(features, n_live, sizes, (*sizes.notes, *notes))


def sizes_for(n_live: int, config: AuditConfig) -> Sizes:
    """Smallest community and concept, and resolution, for an SAE with `n_live` live features.

    From 4096 live features on, the settings. Below, both sizes are scaled by n_live / 4096, to 1 feature at least: with
    few features a habit lights a handful of them or a single one, and the published sizes would drop every concept.
    The resolution is doubled: in a graph of few edges plain modularity joins groups that are only loosely linked, such
    as a habit and the one topic that it belongs to.
    """
    if n_live >= LARGE_SAE:
        return Sizes(config.min_community, config.min_concept, config.resolution, ())
    share = n_live / LARGE_SAE
    community = min(config.min_community, max(1, round(config.min_community * share)))
    concept = min(config.min_concept, max(1, round(config.min_concept * share)))
    note = (
        f"Only {n_live} features are live, so the smallest community that is kept has {community} (setting "
        f"{config.min_community}), the smallest concept of a hypothesis {concept} (setting {config.min_concept}), and "
        "the resolution was doubled."
    )
    return Sizes(community, concept, 2 * config.resolution, (note,))


def fired_responses(
    harvest: "Harvest",
    tau: float,
    max_pairs: int,
    seed: int = 0,
    spans: Sequence[str] = ("chosen", "rejected"),
    distinct: np.ndarray | None = None,
) -> sparse.csr_array:
    """Which feature fired in which response, as communities see it.

    A response counts as one sample and a feature as fired above the same share `tau` of tokens as in the disparity.

    Args:
        spans: the responses of a pair; SFT data have the first alone.
        distinct: (n_pairs,) bool, pairs to draw from; default all.
    Returns:
        (responses of the pairs used, d_sae), at most `max_pairs` pairs drawn by `seed`.
    """
    drawn = np.ones(harvest.n_pairs, dtype=bool) if distinct is None else distinct.copy()
    known = np.flatnonzero(drawn)
    if len(known) > max_pairs:
        drawn[:] = False
        drawn[np.random.default_rng(seed).choice(known, max_pairs, replace=False)] = True
    parts, start = [], 0
    for shard in harvest.shards():
        here = shard.select(np.flatnonzero(drawn[start : start + len(shard.rows)]))
        start += len(shard.rows)
        parts += [_fired(sparse.csr_array(here.frequency(span)), tau) for span in spans]
    return sparse.csr_array(sparse.vstack(parts, format="csr"))


def _fired(frequency: sparse.csr_array, tau: float) -> sparse.csr_array:
    """1 where the frequency is above tau; nothing stored elsewhere."""
    entries = above(frequency.data, tau)
    fired = sparse.csr_array((entries, frequency.indices.copy(), frequency.indptr.copy()), shape=frequency.shape)
    fired.eliminate_zeros()
    return fired
