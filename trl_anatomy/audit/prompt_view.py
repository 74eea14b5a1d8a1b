"""The prompt-conditioned view: when the prompt is about A, what is the response taught? (method.md section 5)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..reading.files import scratch_array
from .clusters import STD_FLOOR, ColumnMoments, geometry_clusters
from .config import AuditConfig
from .views import Disparity, blocks, first_of, hypothesis_table, log_length_ratio, lookups, summed

if TYPE_CHECKING:
    from ..reading.harvest import Harvest, Shard

# Below so many pairs the published thresholds are scaled down.
LARGE_DATA = 20_000
# Retained features that a geometry cluster holds on average, at least.
MEAN_CLUSTER = 8
# A prompt context holds at most this share of the pairs: it is compared with the rest.
TOP_SHARE = 0.25
# Stored entries of the rows that clusters are made from: a few hundred megabytes and half a minute.
SAMPLE_ENTRIES = 3e7


@dataclass(frozen=True)
class Geometry:
    """Prompt clusters A1, A2, ... and response clusters R1, R2, ... of a dataset.

    Attributes:
        prompts, responses: feature ids of each cluster, largest cluster first.
        scale: (d_sae,) standard deviation of each feature's difference, chosen minus rejected, floored.
        settings_used, notes: what differs from the settings, as numbers and in sentences.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    scale: np.ndarray
    settings_used: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PromptView:
    """Result of the prompt-conditioned view.

    Attributes:
        geometry: the clusters.
        scores: the response scores of every pair, see `response_scores`.
        members: (number of prompt clusters, n) of ones: row k holds the pairs of S(k), the context A(k + 1).
        hypotheses: a row per tested (A, R); schema HYPOTHESES, view "prompt".
        settings_used, notes: what differs from the settings, as numbers and in sentences.
    """

    geometry: Geometry
    scores: Disparity
    members: sparse.csr_array
    hypotheses: pa.Table
    settings_used: dict[str, int]
    notes: tuple[str, ...]


def prompt_view(
    harvest: "Harvest",
    config: AuditConfig,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    habits: np.ndarray | None = None,
) -> PromptView:
    """Cluster features by geometry, then test every "A ⇝ R": in pairs whose prompt is about A, is R taught?

    Halves are split by parity of the row in the raw dataset, pairs of one prompt together. All pairs are in the pool:
    one that shows nothing of A is outside S(A). Permutation p-values take the response clusters and the scale of their
    features as given: swapping chosen and rejected would change these by the square of a mean shift only.

    Args:
        groups: (n,) prompt of each pair, for errors robust to what pairs of one prompt share; default none repeats.
        copies: (n,) the same number for copies of a pair, which count once; default none are.
        habits: (n, H) gaps of named habits, beyond which a kept hypothesis says something; default none were counted.
    Source: method.md section 5.
    """
    geometry = find_geometry(harvest, config, None if copies is None else first_of(copies))
    scores = response_scores(harvest, geometry.responses, config.pooling, geometry.scale)
    n_top = min(config.n_top, int(TOP_SHARE * harvest.n_pairs))
    members = top_pairs(prompt_scores(harvest, geometry.prompts, config), n_top, config.seed)
    pool = np.ones(harvest.n_pairs, dtype=bool)
    how: dict[str, Any] = {"groups": groups, "copies": copies, "habits": habits}
    table = hypothesis_table(scores, members, pool, config, names=("prompt", "A", "R"), **how)
    notes = geometry.notes
    if n_top < config.n_top and geometry.prompts:
        notes = (*notes, f"A prompt context holds {n_top} pairs at most, a quarter of them (setting {config.n_top}).")
    used = {
        **geometry.settings_used,
        "n_top": n_top,
        "n_prompt_contexts": len(geometry.prompts),
        "n_response_clusters": len(geometry.responses),
        "n_tested_prompt": table.num_rows,
        "n_kept_prompt": int(np.sum(table["kept"].to_numpy())),
    }
    return PromptView(geometry, scores, members, table, used, notes)


def find_geometry(harvest: "Harvest", config: AuditConfig, distinct: np.ndarray | None = None) -> Geometry:
    """Geometry clusters of prompts and of response deltas, made apart (method.md section 3b).

    Two passes, shard by shard: moments of all pairs, then the sampled rows, which stay in memory. In a harvest so dense
    that they would be more than `SAMPLE_ENTRIES`, fewer rows are sampled.

    Args:
        distinct: (n_pairs,) bool, one pair of each set of copies, of which clusters are made; default all.
    """
    n = harvest.n_pairs if distinct is None else int(distinct.sum())
    min_seen = config.min_seen
    if n < LARGE_DATA:
        min_seen = min(config.min_seen, max(config.min_context, round(config.min_seen * n / LARGE_DATA)))
    read: dict[str, Callable[[Shard], sparse.csr_array]] = {
        "prompts": lambda shard: _pooled(shard, "prompt", config.pooling),
        "responses": lambda shard: _delta(shard, config.pooling),
    }
    moments = {name: ColumnMoments.none(harvest.d_sae) for name in read}
    scale, start = ColumnMoments.none(harvest.d_sae), 0
    for shard in blocks(harvest):
        here = slice(start, start + len(shard.rows))
        start = here.stop
        once = shard if distinct is None else shard.select(np.flatnonzero(distinct[here]))
        for name, values in read.items():
            moments[name] = moments[name].plus(values(once))
        if distinct is not None:
            scale = scale.plus(_delta(shard, config.pooling))
    retained = {
        "prompts": moments["prompts"].retained(min_seen),
        "responses": moments["responses"].retained(min_seen, config.min_delta_std, config.min_delta_size),
    }
    clusters, used, notes = {}, {"min_seen": min_seen}, []
    for name, word in (("prompts", "prompt"), ("responses", "response")):
        size = len(retained[name])
        affordable = int(SAMPLE_ENTRIES / max(1.0, moments[name].seen.sum() / n))
        n_rows = min(n, config.geometry_rows, max(affordable, 2 * config.geometry_components))
        if affordable < min(n, config.geometry_rows):
            notes.append(
                f"{word.capitalize()} clusters were made from {n_rows} pairs (setting {config.geometry_rows})."
            )
        sample = _sample(harvest, read[name], n_rows, config.seed, distinct)
        n_clusters = min(config.n_geometry, max(1, size // MEAN_CLUSTER))
        components = min(config.geometry_components, sample.shape[0], max(1, size // 2))
        clusters[name] = geometry_clusters(
            sample, moments[name], retained[name], n_clusters, n_components=components, seed=config.seed
        )
        used |= {f"{word}_features": size, f"{word}_components": components if size else 0}
        if not size:
            notes.append(
                f"No feature fires often enough in {name} ({min_seen} pairs) to say what prompts and responses are "
                "about; there is no prompt-conditioned view."
            )
        elif n_clusters < config.n_geometry or components < config.geometry_components:
            notes.append(
                f"{size} features fire in the {name} of {min_seen} pairs or more (setting {config.min_seen}): "
                f"{len(clusters[name])} {word} clusters (setting {config.n_geometry}) from {components} components "
                f"(setting {config.geometry_components})."
            )
    std = moments["responses"].std if distinct is None else scale.std
    return Geometry(clusters["prompts"], clusters["responses"], np.maximum(std, STD_FLOOR), used, tuple(notes))


def _sample(
    harvest: "Harvest",
    values: "Callable[[Shard], sparse.csr_array]",
    n_rows: int,
    seed: int,
    distinct: np.ndarray | None = None,
) -> sparse.csr_array:
    """(n_rows, d_sae) float32 values of pairs drawn by `seed`, all if there are no more; nothing else is read."""
    drawn = np.ones(harvest.n_pairs, dtype=bool) if distinct is None else distinct.copy()
    known = np.flatnonzero(drawn)
    if n_rows < len(known):
        drawn[:] = False
        drawn[np.random.default_rng(seed).choice(known, n_rows, replace=False)] = True
    parts, start = [], 0
    for shard in harvest.shards():
        here = np.flatnonzero(drawn[start : start + len(shard.rows)])
        start += len(shard.rows)
        if len(here):
            parts.append(values(shard.select(here)).astype(np.float32))
    return sparse.csr_array(sparse.vstack(parts, format="csr"))


def prompt_scores(harvest: "Harvest", prompts: Sequence[np.ndarray], config: AuditConfig) -> np.ndarray:
    """How much each prompt is about each prompt cluster: (n, K) float32.

    The mean over the cluster's features of "fires in the prompt", or of its pooled value where `prompt_score` is raw.

    Source: method.md section 5.
    """
    scores = scratch_array((harvest.n_pairs, len(prompts)), np.float32, getattr(harvest, "path", None), order="F")
    size, start = np.array([len(c) for c in prompts], dtype=np.float64), 0
    places = lookups(prompts, harvest.d_sae)
    for shard in blocks(harvest):
        prompt = _pooled(shard, "prompt", config.pooling)
        values = np.ones(prompt.nnz) if config.prompt_score == "fired" else prompt.data
        (total,) = summed(prompt, places, len(prompts), values)
        scores[start : start + len(shard.rows)] = total / size
        start += len(shard.rows)
    return scores


def top_pairs(scores: np.ndarray, n_top: int, seed: int = 0) -> sparse.csr_array:
    """S(k) of every prompt cluster: the `n_top` highest-scoring pairs with a score above 0.

    Scores tie often. Among pairs tied at the cut a seeded draw decides, so that the order of the dataset does not.

    Args:
        scores: (n, K).
    Returns:
        (K, n) of ones; a row may hold fewer than `n_top`, or none.
    Source: method.md section 5.
    """
    n, n_clusters = scores.shape
    luck = np.random.default_rng(seed).permutation(n)
    chosen = []
    for k in range(n_clusters):
        rows = np.flatnonzero(scores[:, k] > 0)
        if len(rows) > n_top:
            rows = np.sort(rows[np.lexsort((luck[rows], -scores[rows, k]))[:n_top]])
        chosen.append(rows)
    indptr = np.r_[0, np.cumsum([len(rows) for rows in chosen])].astype(np.int64)
    rows = np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64)
    return sparse.csr_array((np.ones(len(rows)), rows, indptr), shape=(n_clusters, n))


def response_scores(
    harvest: "Harvest", responses: Sequence[np.ndarray], pooling: str, scale: np.ndarray | None = None
) -> Disparity:
    """How far each pair favours each response cluster: u, in standard deviations of a feature's difference.

    The mean over the cluster's features of (chosen - rejected) / standard deviation. method.md section 5 also takes off
    the mean over all pairs, which shifts every pair alike and so leaves every comparison of pairs as it is. Left in,
    the mean of u is the shift that training is predicted to cause, as in the feature-conditioned view.

    Args:
        responses: feature ids of R1, R2, ...
        pooling: "freq" or "max".
        scale: (d_sae,) floored standard deviations; default those of this harvest, in a pass of their own.
    """
    if scale is None:
        scale = delta_scale(harvest, pooling)
    shape, folder = (harvest.n_pairs, len(responses)), getattr(harvest, "path", None)
    u = scratch_array(shape, np.float64, folder, order="F")
    by_count = scratch_array(shape, np.float32, folder, order="F")
    size, start = np.array([len(c) for c in responses], dtype=np.float64), 0
    rows: list[np.ndarray] = []
    lengths: dict[str, list[np.ndarray]] = {"prompt": [], "chosen": [], "rejected": []}
    support = np.zeros(len(responses), dtype=np.int64)
    places = lookups(responses, harvest.d_sae)
    for shard in blocks(harvest):
        here = slice(start, start + len(shard.rows))
        start = here.stop
        sides = []
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            values = _pooled(shard, side, pooling)
            scaled = values.data / scale[values.indices]
            if pooling == "freq":
                longer = np.maximum(1.0, shard.lengths[side] / np.maximum(1, shard.lengths[other]))
                counted = scaled * np.repeat(longer, np.diff(values.indptr))
                sides.append(summed(values, places, len(responses), scaled, counted))
            else:
                sides.append(summed(values, places, len(responses), scaled) * 2)
        u[here] = (sides[0][0] - sides[1][0]) / size
        by_count[here] = (sides[0][1] - sides[1][1]) / size
        support += (sides[0][0] + sides[1][0] > 0).sum(axis=0)  # what fires is above 0
        rows.append(np.asarray(shard.rows, dtype=np.int64))
        for span in lengths:
            lengths[span].append(np.asarray(shard.lengths[span], dtype=np.int64))
    tokens = {span: np.concatenate(parts) for span, parts in lengths.items()}
    return Disparity(np.concatenate(rows), u, log_length_ratio(tokens), tokens, support, by_count=by_count)


def delta_scale(harvest: "Harvest", pooling: str) -> np.ndarray:
    """(d_sae,) standard deviation of each feature's difference over all pairs, chosen minus rejected, floored."""
    found = ColumnMoments.none(harvest.d_sae)
    for shard in blocks(harvest):
        found = found.plus(_delta(shard, pooling))
    return np.maximum(found.std, STD_FLOOR)


def _pooled(shard: "Shard", span: str, pooling: str) -> sparse.csr_array:
    """(n, d_sae) float64, a stored entry wherever a feature fires."""
    of: Callable[[str], sparse.csr_array] = shard.frequency if pooling == "freq" else shard.maximum
    values = sparse.csr_array(of(span)).astype(np.float64)
    if not values.data.all():
        values.eliminate_zeros()
    return values


def _delta(shard: "Shard", pooling: str) -> sparse.csr_array:
    """Chosen minus rejected (n, d_sae) float64, a stored entry (0 where equal) wherever a feature fires in either."""
    chosen, rejected = (_pooled(shard, span, pooling) for span in ("chosen", "rejected"))
    # One merge for both: chosen in the real part, rejected in the imaginary one, exact in single precision.
    both = sparse.csr_array(_complex(chosen, 1) + _complex(rejected, 1j))
    delta = both.data.real.astype(np.float64) - both.data.imag
    return sparse.csr_array((delta, both.indices, both.indptr), shape=both.shape)


def _complex(values: sparse.csr_array, unit: complex) -> sparse.csr_array:
    return sparse.csr_array(
        (values.data.astype(np.complex64) * np.complex64(unit), values.indices, values.indptr), shape=values.shape
    )
