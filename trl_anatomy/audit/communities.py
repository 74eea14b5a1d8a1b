"""Which concepts does a harvest show? Communities of features that fire together, and lone features.

The published communities are found in `clusters.py`, those whose members agree in `agreement.py`; here is what an audit
feeds them (method.md section 3a).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from .agreement import agreeing_communities
from .clusters import affordable, cofiring_communities, live_features
from .config import PUBLISHED, AuditConfig
from .levels import Levels, draw_pairs, own_levels, selected, shard_firing

if TYPE_CHECKING:
    from ..reading.harvest import Harvest

# A live feature fires in at least so many responses, and stays silent in as many.
MIN_COUNT = 10
# A lone feature that is a concept fires in twice `min_context` responses, or in this share of fewer ones.
LONE_SHARE = 0.2
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
        levels: what each feature must exceed to have fired; None is `tau` for all.
        bound, returned: of concepts by agreement: see `agreement.Agreeing`.
    """

    features: list[np.ndarray]
    n_live: int
    sizes: Sizes
    notes: tuple[str, ...]
    levels: Levels | None = None
    bound: float | None = None
    returned: tuple[int, int] | None = None

    def tau(self, config: AuditConfig) -> float | Levels:
        """What a feature must exceed to have fired, as `views.activity` takes it."""
        return config.tau if self.levels is None else self.levels

    def used(self) -> dict[str, float]:
        """What `audit.json` says of how they were found, under `settings_used`."""
        smallest = {"min_community": self.sizes.min_community}
        if self.bound is None:
            return {**smallest, "resolution": self.sizes.resolution}
        used = {**smallest, "agreement": self.bound}
        if self.returned is not None:
            used["communities_returned"], used["communities_of_half"] = self.returned
        return used


def find_communities(
    harvest: "Harvest",
    config: AuditConfig,
    distinct: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Communities:
    """Concepts of the responses: of both sides of the pairs, or of the one response that a row of SFT data has.

    Args:
        distinct: (n_pairs,) bool, one pair of each set of copies: the others are left out; default no pair is a copy.
        groups: (n_pairs,) prompt of each pair; default every pair its own.
    Source: method.md section 3a.
    """
    spans = ("chosen",) if config.data_kind == "sft" else ("chosen", "rejected")
    published = config.concepts == PUBLISHED
    levels = None if published else own_levels(harvest, config.tau, spans=spans, distinct=distinct, seed=config.seed)
    tau = config.tau if levels is None else levels
    every, pairs = _fired(harvest, tau, config.community_pairs, config.seed, spans=spans, distinct=distinct)
    fired = affordable(every, config.seed)
    notes: tuple[str, ...] = ()
    if fired.shape[0] < every.shape[0]:
        notes = (
            f"So many features fire at a time that communities were found from {fired.shape[0]} responses of "
            f"{every.shape[0]} drawn.",
        )
    n_live = len(live_features(fired, MIN_COUNT))
    if published:
        del every
        sizes = sizes_for(n_live, config)
        features = cofiring_communities(
            fired,
            edge_share=config.edge_share,
            min_size=sizes.min_community,
            min_count=MIN_COUNT,
            resolution=sizes.resolution,
            seed=config.seed,
        )
        bound, returned = None, None
    else:
        del fired
        found = agreeing_communities(
            every,
            pairs if groups is None else groups[pairs],
            min_count=MIN_COUNT,
            min_lone=max(MIN_COUNT, min(2 * config.min_context, int(LONE_SHARE * every.shape[0]))),
            edge_share=config.edge_share,
            seed=config.seed,
        )
        del every
        features, bound, returned = found.features, found.bound, found.returned
        sizes = Sizes(1, 1, config.resolution, ())
        if found.n_left:
            notes += (
                f"The {len(features)} largest concepts are kept: {found.n_left} smaller communities and lone features "
                "are left out.",
            )
    if not features:
        notes += ("No features fire together often enough to form a concept: this audit can not tell anything.",)
    return Communities(features, n_live, sizes, (*sizes.notes, *notes), levels, bound, returned)


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
    tau: float | Levels,
    max_pairs: int,
    seed: int = 0,
    spans: Sequence[str] = ("chosen", "rejected"),
    distinct: np.ndarray | None = None,
) -> sparse.csr_array:
    """Which feature fired in which response, as communities see it.

    A response counts as one sample and a feature as fired where it has in the disparity.

    Args:
        tau: what a feature must exceed: one share of tokens for all, or levels.
        spans: the responses of a pair; SFT data have the first alone.
        distinct: (n_pairs,) bool, pairs to draw from; default all.
    Returns:
        (responses of the pairs used, d_sae), at most `max_pairs` pairs drawn by `seed`.
    """
    return _fired(harvest, tau, max_pairs, seed, spans, distinct)[0]


def _fired(
    harvest: "Harvest",
    tau: float | Levels,
    max_pairs: int,
    seed: int = 0,
    spans: Sequence[str] = ("chosen", "rejected"),
    distinct: np.ndarray | None = None,
) -> tuple[sparse.csr_array, np.ndarray]:
    """`fired_responses`, and the number of the pair of each response."""
    drawn = draw_pairs(harvest.n_pairs, max_pairs, seed, distinct)
    parts, pairs, known = [], [], np.flatnonzero(drawn)
    for shard in selected(harvest, drawn):
        here, known = known[: len(shard.rows)], known[len(shard.rows) :]
        for span in spans:
            frequency, fires = shard_firing(shard, span, tau)
            fired = sparse.csr_array((fires, frequency.indices, frequency.indptr), shape=frequency.shape)
            fired.eliminate_zeros()
            parts.append(fired)
            pairs.append(here)
    return sparse.csr_array(sparse.vstack(parts, format="csr")), np.concatenate(pairs)
