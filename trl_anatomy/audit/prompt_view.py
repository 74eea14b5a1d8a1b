"""The prompt-conditioned view: when the prompt is about A, what is the response taught? (method.md section 5)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import sparse

from .clusters import STD_FLOOR, ColumnMoments, geometry_clusters
from .config import AuditConfig
from .views import Disparity, hypothesis_table, log_length_ratio, membership

if TYPE_CHECKING:
    from ..reading.harvest import Harvest, Shard

# Below so many pairs the published thresholds are scaled down.
LARGE_DATA = 20_000
# Retained features that a geometry cluster holds on average, at least.
MEAN_CLUSTER = 8
# A prompt context holds at most this share of the pairs: it is compared with the rest.
TOP_SHARE = 0.25


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


def prompt_view(harvest: "Harvest", config: AuditConfig, groups: np.ndarray | None = None) -> PromptView:
    """Cluster features by geometry, then test every "A ⇝ R": in pairs whose prompt is about A, is R taught?

    Halves are split by parity of the row in the raw dataset. All pairs are in the pool: one that shows nothing of A is
    outside S(A). Permutation p-values take the response clusters and the scale of their features as given: swapping
    chosen and rejected would change these by the square of a mean shift only.

    Args:
        groups: (n,) prompt of each pair, for errors robust to what pairs of one prompt share; default none repeats.
    Source: method.md section 5.
    """
    geometry = find_geometry(harvest, config)
    scores = response_scores(harvest, geometry.responses, config.pooling, geometry.scale)
    n_top = min(config.n_top, int(TOP_SHARE * harvest.n_pairs))
    members = top_pairs(prompt_scores(harvest, geometry.prompts, config), n_top, config.seed)
    pool = np.ones(harvest.n_pairs, dtype=bool)
    table = hypothesis_table(scores, members, pool, config, names=("prompt", "A", "R"), groups=groups)
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


def find_geometry(harvest: "Harvest", config: AuditConfig) -> Geometry:
    """Geometry clusters of prompts and of response deltas, made apart (method.md section 3b).

    One pass: moments of all pairs, and the sampled rows. The harvest is read shard by shard; the sample is what stays
    in memory.
    """
    n = harvest.n_pairs
    min_seen = config.min_seen
    if n < LARGE_DATA:
        min_seen = min(config.min_seen, max(config.min_context, round(config.min_seen * n / LARGE_DATA)))
    drawn = np.ones(n, dtype=bool)
    if n > config.geometry_rows:
        drawn[:] = False
        drawn[np.random.default_rng(config.seed).choice(n, config.geometry_rows, replace=False)] = True
    samples: dict[str, list[sparse.csr_array]] = {"prompts": [], "responses": []}
    moments: dict[str, ColumnMoments] = {}
    start = 0
    for shard in harvest.shards():
        here = np.flatnonzero(drawn[start : start + len(shard.rows)])
        start += len(shard.rows)
        prompt = _pooled(shard, "prompt", config.pooling)
        delta, seen = _delta(shard, config.pooling)
        for name, values, fired in (("prompts", prompt, prompt), ("responses", delta, seen)):
            found = ColumnMoments.of(values, fired)
            moments[name] = moments[name] + found if name in moments else found
            samples[name].append(values[here])
    retained = {
        "prompts": moments["prompts"].retained(min_seen),
        "responses": moments["responses"].retained(min_seen, config.min_delta_std, config.min_delta_size),
    }
    clusters, used, notes = {}, {"min_seen": min_seen}, []
    for name, word in (("prompts", "prompt"), ("responses", "response")):
        size = len(retained[name])
        sample = sparse.csr_array(sparse.vstack(samples[name], format="csr"))
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
    scale = np.maximum(moments["responses"].std, STD_FLOOR)
    return Geometry(clusters["prompts"], clusters["responses"], scale, used, tuple(notes))


def prompt_scores(harvest: "Harvest", prompts: Sequence[np.ndarray], config: AuditConfig) -> np.ndarray:
    """How much each prompt is about each prompt cluster: (n, K) float32.

    The mean over the cluster's features of "fires in the prompt", or of its pooled value where `prompt_score` is raw.

    Source: method.md section 5.
    """
    members = _means(prompts, harvest.d_sae)
    parts = []
    for shard in harvest.shards():
        prompt = _pooled(shard, "prompt", config.pooling)
        if config.prompt_score == "fired":
            prompt.data[:] = 1.0
        parts.append((prompt @ members).toarray().astype(np.float32))
    return np.concatenate(parts)


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
        scale: (d_sae,) floored standard deviations; computed in a pass of their own where absent.
    """
    if scale is None:
        found: ColumnMoments | None = None
        for shard in harvest.shards():
            part = ColumnMoments.of(*_delta(shard, pooling))
            found = part if found is None else found + part
        assert found is not None  # a harvest has a shard
        scale = np.maximum(found.std, STD_FLOOR)
    weights = sparse.csr_array(_means(responses, harvest.d_sae).multiply(1 / scale[:, None]))
    any_of = membership(responses, harvest.d_sae)
    rows, u = [], []
    lengths: dict[str, list[np.ndarray]] = {"prompt": [], "chosen": [], "rejected": []}
    support = np.zeros(len(responses), dtype=np.int64)
    for shard in harvest.shards():
        delta, seen = _delta(shard, pooling)
        rows.append(np.asarray(shard.rows, dtype=np.int64))
        u.append((delta @ weights).toarray())
        support += np.diff((seen.astype(np.float64) @ any_of).tocsc().indptr)
        for span in lengths:
            lengths[span].append(np.asarray(shard.lengths[span], dtype=np.int64))
    tokens = {span: np.concatenate(parts) for span, parts in lengths.items()}
    return Disparity(np.concatenate(rows), np.concatenate(u), log_length_ratio(tokens), tokens, support)


def _means(clusters: Sequence[np.ndarray], d_sae: int) -> sparse.csr_array:
    """(d_sae, K): column k averages over the features of cluster k."""
    size = np.array([len(c) for c in clusters], dtype=np.float64)
    return sparse.csr_array(membership(clusters, d_sae).multiply(1 / size[None]))


def _pooled(shard: "Shard", span: str, pooling: str) -> sparse.csr_array:
    """(n, d_sae) float64, a stored entry wherever a feature fires."""
    of: Callable[[str], sparse.csr_array] = shard.frequency if pooling == "freq" else shard.maximum
    values = sparse.csr_array(of(span)).astype(np.float64)
    values.eliminate_zeros()
    return values


def _delta(shard: "Shard", pooling: str) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Chosen minus rejected (n, d_sae) float64, and where a feature fires in either response (bool)."""
    chosen, rejected = (_pooled(shard, span, pooling) for span in ("chosen", "rejected"))
    return sparse.csr_array(chosen - rejected), sparse.csr_array(chosen.astype(bool) + rejected.astype(bool))
