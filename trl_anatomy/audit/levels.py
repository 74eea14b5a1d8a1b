"""When does a latent fire in a response? Above a level: the same for all, or one of its own, from both sides together.

A latent that fires in most responses says nothing by firing. Judged against its own base, it fires where it fires more
than it usually does. Levels know nothing of chosen and rejected: swapping the sides changes none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import sparse

if TYPE_CHECKING:
    from ..reading.harvest import Harvest, Shard

# A latent is taken by intensity if it fires in this share of the responses, or if less than that one lies above the
# median of its frequency: it fires on nearly every token.
NEARLY_ALL, LEAST_ABOVE = 0.95, 0.25
# Pairs whose responses give the medians, at most: the rank of a median is then right to half a percent.
LEVEL_PAIRS = 5_000
FREQUENCY, MAXIMUM = "frequency", "maximum"
# A row per latent whose level is not the published one.
LEVELS = pa.schema([("feature", pa.int32()), ("measure", pa.string()), ("level", pa.float32())])


@dataclass(frozen=True, eq=False)
class Levels:
    """What each latent must exceed to have fired in a response.

    Attributes:
        level: (d_sae,) float32, in the unit of the latent's measure.
        by_maximum: (d_sae,) bool, latents measured by their largest activation in the response; the others by the share
            of tokens on which they fire.
    """

    level: np.ndarray
    by_maximum: np.ndarray

    def table(self, tau: float) -> pa.Table:
        """The levels that differ from the published rule, which is `tau` for all; schema LEVELS."""
        own = np.flatnonzero(self.by_maximum | (self.level != np.float32(tau)))
        measure = np.where(self.by_maximum[own], MAXIMUM, FREQUENCY).tolist()
        columns = {"feature": own.astype(np.int32), "measure": measure, "level": self.level[own]}
        return pa.table(columns, schema=LEVELS)

    @classmethod
    def of_table(cls, table: pa.Table, tau: float, d_sae: int) -> "Levels":
        """Those of a table, and `tau` for all other latents."""
        level, by_maximum = np.full(d_sae, tau, dtype=np.float32), np.zeros(d_sae, dtype=bool)
        feature = table["feature"].to_numpy()
        level[feature] = table["level"].to_numpy()
        by_maximum[feature] = np.array(table["measure"].to_pylist()) == MAXIMUM
        return cls(level, by_maximum)


def fits(table: pa.Table, d_sae: int) -> bool:
    """Whether a table of schema LEVELS names latents of an SAE of `d_sae`, each once, and measures that there are."""
    feature = table["feature"].to_numpy()
    named = bool(np.all((feature >= 0) & (feature < d_sae))) and len(np.unique(feature)) == len(feature)
    return named and set(table["measure"].to_pylist()) <= {FREQUENCY, MAXIMUM}


def above(frequency: np.ndarray, tau: float) -> np.ndarray:
    """1.0 where a frequency is above tau, else 0.0.

    Compared in float32, as frequencies are stored: a share of exactly tau does not count, whatever its rounding.
    """
    return (frequency.astype(np.float32, copy=False) > np.float32(tau)).astype(np.float64)


def firing(frequency: sparse.csr_array, tau: float | Levels, maximum: sparse.csr_array | None = None) -> np.ndarray:
    """1.0 for each stored entry of `frequency` whose latent has fired in that response, else 0.0.

    Args:
        frequency: (n, d_sae) share of tokens on which each latent fires.
        tau: what a latent must exceed: one share of tokens for all, or levels.
        maximum: (n, d_sae) largest activations, stored where `frequency` is; needed where levels ask for them.
    """
    if not isinstance(tau, Levels):
        return above(frequency.data, tau)
    values = frequency.data.astype(np.float32, copy=False)
    taken = tau.by_maximum[frequency.indices]
    if taken.any():
        if maximum is None or not np.array_equal(maximum.indices, frequency.indices):
            raise ValueError("levels by intensity need the largest activations, stored where the frequencies are")
        values = np.where(taken, maximum.data.astype(np.float32, copy=False), values)
    return (values > tau.level[frequency.indices]).astype(np.float64)


def firing_by_count(shorter: sparse.csr_array, tau: float | Levels, fires: np.ndarray) -> np.ndarray:
    """`firing` with tokens counted on the length of the shorter response (`views.by_shorter`).

    Args:
        fires: `firing` itself, entry for entry: what stays of latents that are measured by intensity.
    """
    if not isinstance(tau, Levels):
        return above(shorter.data, tau)
    counted = (shorter.data > tau.level[shorter.indices]).astype(np.float64)
    return np.where(tau.by_maximum[shorter.indices], fires, counted)


def shard_firing(shard: "Shard", span: str, tau: float | Levels) -> tuple[sparse.csr_array, np.ndarray]:
    """The frequencies (n, d_sae) of a span and, entry for entry, whether the latent has fired there: `firing`."""
    frequency = sparse.csr_array(shard.frequency(span))
    asked = isinstance(tau, Levels) and bool(tau.by_maximum.any())
    return frequency, firing(frequency, tau, sparse.csr_array(shard.maximum(span)) if asked else None)


def own_levels(
    harvest: "Harvest",
    tau: float,
    *,
    spans: Sequence[str] = ("chosen", "rejected"),
    distinct: np.ndarray | None = None,
    seed: int = 0,
) -> Levels:
    """A level for each latent, from its own values over responses, both sides together.

    - A latent that fires above `tau` in at most half of the responses keeps the published level `tau`.
    - A denser one must fire more often than in half of the responses: the level is the median of its frequency.
    - One that fires in nearly all responses, or on nearly all tokens, must fire more strongly than in half of them: the
      level is the median of its largest activation.

    Args:
        tau: share of tokens, at least.
        spans: the responses of a pair; SFT data have the first alone.
        distinct: (n_pairs,) bool, pairs to draw from; default all. At most `LEVEL_PAIRS` are drawn by `seed`.
    """
    drawn = draw_pairs(harvest.n_pairs, LEVEL_PAIRS, seed, distinct)
    n_fired, n = np.zeros(harvest.d_sae, dtype=np.int64), 0
    for shard in selected(harvest, drawn):
        for span in spans:
            frequency = sparse.csr_array(shard.frequency(span))
            n_fired += np.bincount(frequency.indices[above(frequency.data, tau) > 0], minlength=harvest.d_sae)
            n += int(np.count_nonzero(shard.lengths[span]))
    found = Levels(np.full(harvest.d_sae, tau, dtype=np.float32), np.zeros(harvest.d_sae, dtype=bool))
    dense = np.flatnonzero(2 * n_fired > n)
    if not len(dense):
        return found
    frequencies = _columns(harvest, drawn, spans, dense, FREQUENCY)
    median = np.median(frequencies, axis=0).astype(np.float32)
    found.level[dense] = np.maximum(np.float32(tau), median)
    n_above = (frequencies > found.level[dense]).sum(axis=0)
    intense = dense[(n_fired[dense] >= NEARLY_ALL * n) | (n_above < LEAST_ABOVE * n)]
    if len(intense):
        found.by_maximum[intense] = True
        found.level[intense] = np.median(_columns(harvest, drawn, spans, intense, MAXIMUM), axis=0)
    return found


def draw_pairs(n_pairs: int, most: int, seed: int, distinct: np.ndarray | None = None) -> np.ndarray:
    """(n_pairs,) bool: at most `most` of the pairs in `distinct` (default all), drawn by `seed`."""
    drawn = np.ones(n_pairs, dtype=bool) if distinct is None else distinct.copy()
    known = np.flatnonzero(drawn)
    if len(known) > most:
        drawn[:] = False
        drawn[np.random.default_rng(seed).choice(known, most, replace=False)] = True
    return drawn


def selected(harvest: "Harvest", drawn: np.ndarray) -> "Iterator[Shard]":
    """The shards of a harvest with the pairs of `drawn` (n_pairs,) alone, in order."""
    start = 0
    for shard in harvest.shards():
        yield shard.select(np.flatnonzero(drawn[start : start + len(shard.rows)]))
        start += len(shard.rows)


def _columns(
    harvest: "Harvest", drawn: np.ndarray, spans: Sequence[str], features: np.ndarray, measure: str
) -> np.ndarray:
    """(n_responses, n_features) float32 of the responses that have tokens; 0 where a latent does not fire."""
    parts = []
    for shard in selected(harvest, drawn):
        for span in spans:
            matrix = shard.frequency(span) if measure == FREQUENCY else shard.maximum(span)
            told = np.flatnonzero(shard.lengths[span])
            parts.append(sparse.csr_array(matrix)[told][:, features].toarray().astype(np.float32))
    return np.concatenate(parts)
