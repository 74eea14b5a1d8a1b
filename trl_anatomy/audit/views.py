"""Where in the data is a concept rewarded or punished? The feature-conditioned view (method.md section 4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..reading.files import scratch_array
from . import stats
from .beyond import beyond
from .clusters import spherical_kmeans
from .config import AuditConfig
from .findings import few_prompts
from .folding import context_correlations, fold, side_correlations
from .levels import Levels, firing, firing_by_count, shard_firing
from .shown import CONTEXT_RATES, context_rates, shown_where, split_points

if TYPE_CHECKING:
    from ..reading.harvest import Harvest, Shard

# Rows of scores that are worked on at a time: they should stay in the cache.
ROWS = 4096
# Pairs whose sparse rows are worked on at a time.
BLOCK_PAIRS = 256
# Share of a difference that must be left when firing tokens are counted on equal lengths, and beyond named habits.
LEAST_LEFT = 0.5
# Columns of hypotheses that audits of earlier versions do not have.
ADJUSTED = ("adjusted", "adjusted_low", "adjusted_high", "p_adjusted", "q_adjusted")
LATER = ("differs", *ADJUSTED, "folded_under")

HYPOTHESES = pa.schema(
    [
        ("view", pa.string()),
        ("context", pa.string()),
        ("concept", pa.string()),
        ("mean_in", pa.float64()),
        ("mean_out", pa.float64()),
        ("delta", pa.float64()),
        ("z", pa.float64()),
        ("d", pa.float64()),
        ("delta_a", pa.float64()),
        ("delta_b", pa.float64()),
        ("delta_min", pa.float64()),
        ("delta_length_adjusted", pa.float64()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("p_permutation", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("n_in", pa.int64()),
        ("n_out", pa.int64()),
        ("kept", pa.bool_()),
        ("lean", pa.string()),
        ("rank", pa.int32()),
        *((name, pa.float64()) for name in CONTEXT_RATES),
        ("differs", pa.bool_()),
        *((name, pa.float64()) for name in ADJUSTED),
        ("folded_under", pa.string()),
    ]
)


def blocks(harvest: "Harvest") -> Iterator["Shard"]:
    """All pairs of a harvest in order, `BLOCK_PAIRS` of a shard at a time: so few that memory is used again."""
    for shard in harvest.shards():
        n = len(shard.rows)
        if n <= BLOCK_PAIRS:
            yield shard
            continue
        for start in range(0, n, BLOCK_PAIRS):
            yield shard.select(np.arange(start, min(start + BLOCK_PAIRS, n)))


def cluster_sums(
    matrix: sparse.csr_array, clusters: Sequence[np.ndarray], *values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """For every row and cluster, the sum over the stored entries whose column is in the cluster.

    Each row is summed by itself and in the order of its entries, so that it makes no difference which rows stand in a
    matrix together.

    Args:
        matrix: (n, d_sae); its places are read, not its data.
        clusters: column ids of each of K clusters, which may overlap.
        values: (nnz,) what is summed, one array for each result.
    Returns:
        (n, K) float64 for each of `values`.
    """
    return summed(matrix, lookups(clusters, matrix.shape[1]), len(clusters), *values)


def summed(
    matrix: sparse.csr_array, clusters: Sequence[np.ndarray], n_clusters: int, *values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """`cluster_sums` of clusters that are `lookups` already."""
    # Of equal places in a row, scipy's dense form is the sum, entry by entry; the last column is that of no cluster.
    shape = (matrix.shape[0], n_clusters + 1)
    sums: list[np.ndarray] = []
    for lookup in clusters:
        places = lookup[matrix.indices]
        found = [sparse.csr_array((value, places, matrix.indptr), shape=shape).toarray() for value in values]
        sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
    return tuple(total[:, :-1] for total in sums or [np.zeros(shape) for _ in values])


def lookups(clusters: Sequence[np.ndarray], n_columns: int) -> list[np.ndarray]:
    """Arrays (n_columns,) of cluster numbers, K where there is none: one where clusters do not overlap, else more."""
    columns = np.concatenate([*clusters, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    cluster = np.repeat(np.arange(len(clusters)), [len(c) for c in clusters])
    found = []
    while len(columns):
        lookup = np.full(n_columns, len(clusters), dtype=np.int32)
        first = np.unique(columns, return_index=True)[1]
        lookup[columns[first]] = cluster[first]
        found.append(lookup)
        columns, cluster = np.delete(columns, first), np.delete(cluster, first)
    return found


def _distinct_members(members: sparse.csr_array, copies: np.ndarray) -> np.ndarray:
    """(n_groups,) members of each group, copies counted once."""
    inside = np.split(members.indices, members.indptr[1:-1])[: members.shape[0]]
    return np.array([len(np.unique(copies[part])) for part in inside], dtype=np.int64)


def _sizes(clusters: Sequence[np.ndarray]) -> np.ndarray:
    return np.maximum(1.0, np.array([len(c) for c in clusters], dtype=np.float64))


def concept_activity(
    frequency: sparse.csr_array,
    communities: Sequence[np.ndarray],
    tau: float | Levels = 0.01,
    maximum: sparse.csr_array | None = None,
) -> np.ndarray:
    """Share of each concept's features that fire in each response: the unit of u, for single responses.

    Args:
        frequency: (n_responses, d_sae) share of tokens in which a feature fires.
        tau, maximum: what a feature must exceed to have fired, as `levels.firing` takes them.
    Returns:
        (n_responses, K) float64 in [0, 1].
    """
    (fired,) = cluster_sums(frequency, communities, firing(frequency, tau, maximum))
    return fired / _sizes(communities)


def shard_activity(
    shard: "Shard", span: str, communities: Sequence[np.ndarray], tau: float | Levels = 0.01
) -> np.ndarray:
    """`concept_activity` of a span of a shard of a harvest."""
    frequency, fires = shard_firing(shard, span, tau)
    (fired,) = cluster_sums(frequency, communities, fires)
    return fired / _sizes(communities)


@dataclass(frozen=True)
class Disparity:
    """Per pair and concept, how far the concept favours chosen; K concepts.

    Attributes:
        rows: (n,) int64 row of the raw dataset.
        u: (n, K) float64, what is tested. Of a co-firing concept: share of its features that fire in chosen, minus the
            same for rejected, in [-1, 1] (method.md section 4).
        log_ratio: (n,) float64, log of chosen over rejected length in tokens.
        lengths: span -> (n,) int64 tokens.
        support: (K,) int64 pairs in which a feature of the concept fires in either response.
        by_count: (n, K) float32, `u` if the tokens on which a feature fires were counted on the length of the shorter
            response on both sides: what fires equally often on both sides is 0, however long they are. Of features
            measured by intensity it is u. None where it was not asked for.
        shown: of chosen and of rejected, (n, K) bool: which responses show the concept (`shown`). None of concepts that
            are no sets of firing features.
        shown_above: (K,) float64, the share of its features beyond which a response shows the concept; None with
            `shown`.
    """

    rows: np.ndarray
    u: np.ndarray
    log_ratio: np.ndarray
    lengths: dict[str, np.ndarray]
    support: np.ndarray
    by_count: np.ndarray | None = field(default=None, kw_only=True)
    shown: tuple[np.ndarray, np.ndarray] | None = field(default=None, kw_only=True)
    shown_above: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Activity(Disparity):
    """The disparity of co-firing concepts with what groups pairs and what is for drill-down (method.md section 4).

    Attributes:
        s: (n, K) float32 symmetric activity: summed firing frequencies of both responses. Used to group pairs only.
        v: (n, K) float32 signed intensity: summed frequencies, chosen minus rejected. Drill-down only.
    """

    s: np.ndarray
    v: np.ndarray


def first_of(copies: np.ndarray) -> np.ndarray:
    """(n,) bool: the first pair of each set of copies."""
    first = np.zeros(len(copies), dtype=bool)
    first[np.unique(copies, return_index=True)[1]] = True
    return first


def log_length_ratio(lengths: dict[str, np.ndarray]) -> np.ndarray:
    """(n,) float64: log of chosen over rejected tokens; an empty span counts as one token."""
    return np.log(np.maximum(lengths["chosen"], 1)) - np.log(np.maximum(lengths["rejected"], 1))


def by_shorter(frequency: sparse.csr_array, length: np.ndarray, other: np.ndarray) -> sparse.csr_array:
    """Firing tokens as a share of the shorter response of a pair, where `frequency` (n, d_sae) is one of its own.

    Args:
        length, other: (n,) pooled tokens of this response and of the other one.
    """
    count = np.rint(frequency.data.astype(np.float64) * np.repeat(length, np.diff(frequency.indptr)))
    shorter = np.maximum(1, np.minimum(length, other))
    share = count.astype(np.float32) / np.repeat(shorter.astype(np.float32), np.diff(frequency.indptr))
    return sparse.csr_array((share, frequency.indices, frequency.indptr), shape=frequency.shape)


def activity(
    harvest: "Harvest",
    communities: Sequence[np.ndarray],
    tau: float | Levels = 0.01,
    *,
    distinct: np.ndarray | None = None,
    shown_above: np.ndarray | None = None,
) -> Activity:
    """Disparity, symmetric activity and intensity of every concept in every pair, shard by shard.

    Args:
        tau: what a feature must exceed to have fired: one share of tokens for all, or levels.
        distinct: (n,) bool, one pair of each set of copies, from which split points are found; default all.
        shown_above: (K,) split points that an audit has found already, instead of finding them.
    Source: method.md section 4.
    """
    shape, sizes = (harvest.n_pairs, len(communities)), np.array([len(c) for c in communities], dtype=np.int64)
    folder = getattr(harvest, "path", None)
    # Columns of u are what statistics take, rows of s and v what groups and lists pairs.
    u = scratch_array(shape, np.float64, folder, order="F")
    by_count = scratch_array(shape, np.float32, folder, order="F")
    s, v = (scratch_array(shape, np.float32, folder) for _ in range(2))
    n_fire = [scratch_array(shape, np.min_scalar_type(sizes.max(initial=0)), folder) for _ in range(2)]
    rows, support, start = [], np.zeros(len(communities), dtype=np.int64), 0
    lengths: dict[str, list[np.ndarray]] = {"prompt": [], "chosen": [], "rejected": []}
    places = lookups(communities, harvest.d_sae)
    for shard in blocks(harvest):
        here = slice(start, start + len(shard.rows))
        start = here.stop
        sides = []
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            frequency, fires = shard_firing(shard, side, tau)
            data = frequency.data.astype(np.float64)
            shorter = by_shorter(frequency, shard.lengths[side], shard.lengths[other])
            counted = firing_by_count(shorter, tau, fires)
            sides.append(summed(frequency, places, len(communities), fires, data, counted))
        (in_chosen, of_chosen, counted_chosen), (in_rejected, of_rejected, counted_rejected) = sides
        support += ((in_chosen > 0) | (in_rejected > 0)).sum(axis=0)
        u[here] = (in_chosen - in_rejected) / _sizes(communities)
        by_count[here] = (counted_chosen - counted_rejected) / _sizes(communities)
        n_fire[0][here], n_fire[1][here] = in_chosen, in_rejected
        s[here] = of_chosen + of_rejected
        v[here] = of_chosen - of_rejected
        rows.append(np.asarray(shard.rows, dtype=np.int64))
        for span in lengths:
            lengths[span].append(np.asarray(shard.lengths[span], dtype=np.int64))
    tokens = {span: np.concatenate(parts) for span, parts in lengths.items()}
    if shown_above is None:
        split = split_points((n_fire[0], n_fire[1]), sizes, (tokens["chosen"], tokens["rejected"]), distinct)
    else:
        split = np.rint(shown_above * sizes).astype(np.int64)
    shown = [shown_where(side, split, scratch_array(shape, np.bool_, folder)) for side in n_fire]
    return Activity(
        rows=np.concatenate(rows),
        u=u,
        s=s,
        v=v,
        log_ratio=log_length_ratio(tokens),
        lengths=tokens,
        support=support,
        by_count=by_count,
        shown=(shown[0], shown[1]),
        shown_above=split / np.maximum(1, sizes),
    )


@dataclass(frozen=True)
class FeatureView:
    """Result of the feature-conditioned view.

    Attributes:
        activity: the scores of every pair.
        contexts: (n,) int64; 0 is the silent bucket B0, k is the data cluster Bk.
        hypotheses: a row per tested (context, concept); schema HYPOTHESES.
        settings_used: what differs from the settings or is only known after the run.
        notes: the same in sentences, for the reader.
    """

    activity: Activity
    contexts: np.ndarray
    hypotheses: pa.Table
    settings_used: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Of chosen and of rejected, (n, K) bool: which responses show each concept T1, T2, ..."""
        assert self.activity.shown is not None
        return self.activity.shown


def row_norms(s: np.ndarray) -> np.ndarray:
    """(n,) float64: length of each row of (n, K), in blocks of rows."""
    norm = np.empty(len(s))
    for start in range(0, len(s), ROWS):
        norm[start : start + ROWS] = np.linalg.norm(s[start : start + ROWS].astype(np.float64), axis=1)
    return norm


def find_contexts(
    s: np.ndarray, config: AuditConfig, copies: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Silent bucket and data clusters (method.md section 4, steps 1 and 2).

    Args:
        s: (n, K) symmetric activity.
        copies: (n,) the same number for copies of a pair, which count once; default none are.
    Returns:
        contexts (n,): 0 silent (norm below the percentile, or no activity at all), 1.. data clusters, largest first;
        notes on what was scaled down.
    """
    norm = row_norms(s)
    contexts = np.zeros(len(s), dtype=np.int64)
    active = norm > 0
    if len(norm):
        active &= norm >= np.percentile(norm, config.silent_percentile)
    n_active = int(active.sum()) if copies is None else len(np.unique(copies[active]))
    if n_active == 0:
        return contexts, ("No pair shows any concept, so there are no contexts.",)
    k = max(1, min(config.n_contexts, n_active // (2 * config.min_context)))
    notes: tuple[str, ...] = ()
    if k < config.n_contexts:
        notes = (
            f"{n_active} active pairs are too few for {config.n_contexts} contexts; made: {k}, of about "
            f"{n_active // k} pairs each.",
        )
    if k == 1:
        notes = (*notes, "With one context there is nothing to compare it with: too few pairs to tell contexts apart.")
    labels, _ = spherical_kmeans(s, k, seed=config.seed, rows=np.flatnonzero(active))
    contexts[active] = labels + 1
    return contexts, notes


def feature_view(  # noqa: PLR0913
    harvest: "Harvest",
    communities: Sequence[np.ndarray],
    config: AuditConfig,
    *,
    min_concept: int | None = None,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    tau: float | Levels | None = None,
    habits: np.ndarray | None = None,
) -> FeatureView:
    """Group pairs by what is active in them, then test where each concept leans to chosen or to rejected.

    Halves are split by parity of the row in the raw dataset; pairs of one prompt stay together (`stats.row_halves`).

    Args:
        communities: feature ids of T1, T2, ...
        min_concept: features a concept needs for a kept hypothesis; default the setting.
        groups: (n,) prompt of each pair, for errors robust to what pairs of one prompt share; default none repeats.
        copies: (n,) the same number for copies of a pair, which count once; default none are.
        tau: what a feature must exceed to have fired; default the setting.
        habits: (n, H) gaps of named habits, beyond which a kept hypothesis says something; default none were counted.
    Source: method.md section 4.
    """
    least = config.min_concept if min_concept is None else min_concept
    scores = activity(
        harvest,
        communities,
        config.tau if tau is None else tau,
        distinct=None if copies is None else first_of(copies),
    )
    contexts, notes = find_contexts(scores.s, config, copies)
    sizes = np.array([len(c) for c in communities], dtype=np.int64)
    table = compare_contexts(scores, contexts, sizes, least, config, groups, copies, habits)
    used = {
        "n_contexts": int(contexts.max(initial=0)),
        "min_concept": least,
        "n_silent": int((contexts == 0).sum()),
        "n_tested": table.num_rows,
        "n_kept": int(np.sum(table["kept"].to_numpy())),
    }
    return FeatureView(scores, contexts, table, used, notes)


def compare_contexts(  # noqa: PLR0913
    scores: Disparity,
    contexts: np.ndarray,
    sizes: np.ndarray,
    min_concept: int,
    config: AuditConfig,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    habits: np.ndarray | None = None,
) -> pa.Table:
    """Every (context, concept) of the feature-conditioned view against the other active pairs: `hypothesis_table`.

    Args:
        contexts: (n,) 0 silent, 1.. data clusters; sizes: features of each concept.
        min_concept: features a concept needs for a kept hypothesis.
        groups: (n,) prompt of each pair; copies: (n,) the same number for copies of a pair.
        habits: (n, H) gaps of named habits.
    Source: method.md section 4, steps 3 to 5.
    """
    members = stats.one_hot(contexts - 1, int(contexts.max(initial=0)))
    fit = sizes >= min_concept
    how: dict[str, Any] = {"fit": fit, "groups": groups, "copies": copies, "habits": habits}
    return hypothesis_table(scores, members, contexts > 0, config, names=("feature", "B", "T"), **how)


def hypothesis_table(  # noqa: PLR0913, PLR0915
    scores: Disparity,
    members: sparse.csr_array,
    pool: np.ndarray,
    config: AuditConfig,
    *,
    names: tuple[str, str, str],
    fit: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
    habits: np.ndarray | None = None,
) -> pa.Table:
    """Every (context, concept) of a view against the rest of the pool.

    q is over all testable cells of the view, before the keep rules. `lean` is the side that the concept favours inside
    the context compared with outside: a concept that is rewarded everywhere but absent from a context leans to rejected
    there, with `mean_in` near zero.

    `differs`: q is at most alpha, both halves agree, half of the difference or more is left by `by_count` (else the
    lengths of the responses may be all there is), and context and concept are large enough. With fewer than 20 prompts
    nothing differs. `kept` is what a reader should see of that: what is left beyond named habits (`adjusted`, by
    `beyond.beyond`) is half of the difference or more, with a q-value of at most alpha over all that differ; and it is
    no near-copy of a larger one, which `folded_under` names (`folding.fold`). `rank` counts kept hypotheses of that
    side from 1. `p_permutation` is family-wise, over all cells of the view in contexts of
    `min_context` pairs or more; null for the others or if none was asked for. `rate_chosen_in` and its like are shares
    of the responses of a side that show the concept, inside the context and in the rest of the pool; null without
    `Disparity.shown`.

    Args:
        members: (n_contexts, n) of ones and zeros, within the pool; contexts may overlap.
        pool: (n,) bool, pairs that are compared.
        names: the view, and the letters of its contexts and concepts.
        fit: (n_concepts,) bool, concepts that may differ; default all.
        groups: (n,) prompt of each pair: z, p, q and intervals are robust to what pairs of one prompt share; default
            every pair its own, and z is Welch's.
        copies: (n,) the same number for copies of a pair, which count once towards `min_context`; default none are.
        habits: (n, H) gaps of named habits; without them nothing is adjusted, and all that differs may be kept.
    Returns:
        Table of schema HYPOTHESES: what is kept by rank, what differs, the rest; `adjusted` is null of what does not
        differ. Cells without a test (a context of one pair, no variance anywhere) are left out.
    """
    view, context, concept = names
    if members.shape[0] == 0 or scores.u.shape[1] == 0:
        return HYPOTHESES.empty_table()
    halves = stats.row_halves(scores.rows, groups)
    welch, split = stats.compare_members(scores.u, members, pool, halves)
    plain_z = welch.z
    if groups is not None:
        welch = stats.welch_of_groups(welch, scores.u, members, pool, groups)
    welch = stats.no_surer_than_a_draw(welch, scores.u, pool, groups)
    adjusted = stats.adjusted_difference(scores.u, scores.log_ratio, members, pool)
    k, m = np.nonzero(~np.isnan(welch.p))
    if len(k) == 0:
        return HYPOTHESES.empty_table()
    cell: dict[str, np.ndarray] = {
        name: getattr(welch, name)[k, m] for name in ("delta", "z", "d", "p", "ci_low", "ci_high")
    }
    cell["mean_in"] = stats.member_means(scores.u, members)[k, m]
    cell["mean_out"] = cell["mean_in"] - cell["delta"]
    cell |= {name: getattr(split, name)[k, m] for name in ("delta_a", "delta_b", "delta_min")}
    cell["delta_length_adjusted"] = adjusted[k, m]
    cell["q"] = stats.benjamini_hochberg(cell["p"])
    swapped = np.full(len(k), np.nan)
    if config.permutations:
        large = np.flatnonzero(welch.n_in >= config.min_context)
        best = stats.swapped_best_z(scores.u, members[large], pool, config.permutations, config.seed, groups=groups)
        asked = np.isin(k, large)
        swapped[asked] = stats.family_wise_p(plain_z[k, m][asked], best)
    cell["n_in"], cell["n_out"] = welch.n_in[k].astype(np.int64), welch.n_out[k].astype(np.int64)
    n_distinct = welch.n_in[k] if copies is None else _distinct_members(members, copies)[k]
    with np.errstate(invalid="ignore"):
        differs = (cell["q"] <= config.alpha) & split.consistent[k, m] & (n_distinct >= config.min_context)
    if few_prompts(groups, len(pool)):
        differs[:] = False
    if fit is not None:
        differs &= fit[m]
    if scores.by_count is not None and differs.any():
        asked, of = np.unique(m[differs], return_inverse=True)
        some = (scores.by_count[:, asked[i : i + stats.BLOCK]] for i in range(0, len(asked), stats.BLOCK))
        deltas = [stats.compare_members(block, members, pool, halves)[0].delta for block in some]
        counted = np.concatenate(deltas, axis=1)[k[differs], of]
        with np.errstate(invalid="ignore"):
            stays = counted * np.sign(cell["delta"][differs]) >= LEAST_LEFT * np.abs(cell["delta"][differs])
        differs[differs] = stays
    own = _beyond_habits(scores.u, members, pool, habits, groups, k, m, differs, cell, config.alpha)
    key = np.abs(cell[config.rank_by])
    tried = np.flatnonzero(own)[np.lexsort((m[own], k[own], -key[own]))]
    under = _near_copies(scores.u, members, pool, k[tried], m[tried], cell["delta"][tried])
    kept = own.copy()
    kept[tried[under >= 0]] = False
    folded = np.full(len(k), -1)
    folded[tried] = np.where(under >= 0, tried[under], -1)
    order = np.lexsort((m, k, -key, ~differs, ~kept))
    rank = np.zeros(len(k), dtype=np.int32)
    for side in (cell["delta"] > 0, cell["delta"] <= 0):
        mine = order[(kept & side)[order]]
        rank[mine] = np.arange(1, len(mine) + 1)
    columns: dict[str, Any] = {name: values[order] for name, values in cell.items()}
    columns |= {name: pa.array(columns[name], from_pandas=True) for name in ADJUSTED}
    columns["view"] = [view] * len(k)
    columns["context"] = [f"{context}{i + 1}" for i in k[order]]
    columns["concept"] = [f"{concept}{i + 1}" for i in m[order]]
    columns["kept"], columns["differs"] = kept[order], differs[order]
    columns["folded_under"] = [f"{context}{k[i] + 1}~{concept}{m[i] + 1}" if i >= 0 else None for i in folded[order]]
    columns["lean"] = np.where(cell["delta"][order] > 0, "chosen", "rejected").tolist()
    columns["p_permutation"] = pa.array(swapped[order], from_pandas=True)
    columns["rank"] = pa.array(rank[order], mask=~kept[order])
    shown = None if scores.shown is None else context_rates(scores.shown, scores.lengths, members, pool)
    for name in CONTEXT_RATES:
        rate = np.full(len(k), np.nan) if shown is None else shown[name][k, m][order]
        columns[name] = pa.array(rate, from_pandas=True)
    return pa.table({name: columns[name] for name in HYPOTHESES.names}, schema=HYPOTHESES)


def _beyond_habits(  # noqa: PLR0913
    u: np.ndarray,
    members: sparse.csr_array,
    pool: np.ndarray,
    habits: np.ndarray | None,
    groups: np.ndarray | None,
    k: np.ndarray,
    m: np.ndarray,
    differs: np.ndarray,
    cell: dict[str, np.ndarray],
    alpha: float,
) -> np.ndarray:
    """(n_cells,) bool: what differs and says something beyond named habits; writes the adjusted columns into `cell`."""
    cell |= {name: np.full(len(k), np.nan) for name in ADJUSTED}
    if habits is None or not differs.any():
        return differs.copy()
    columns, of = np.unique(m[differs], return_inverse=True)
    found = beyond(u, columns, members, pool, habits, groups)
    for name, values in zip(ADJUSTED, (found.delta, found.ci_low, found.ci_high, found.p), strict=False):
        cell[name][differs] = values[k[differs], of]
    cell["q_adjusted"] = stats.benjamini_hochberg(cell["p_adjusted"])
    with np.errstate(invalid="ignore"):
        left = cell["adjusted"] * np.sign(cell["delta"]) >= LEAST_LEFT * np.abs(cell["delta"])
        return np.asarray(differs & left & (cell["q_adjusted"] <= alpha))


def _near_copies(
    u: np.ndarray, members: sparse.csr_array, pool: np.ndarray, k: np.ndarray, m: np.ndarray, delta: np.ndarray
) -> np.ndarray:
    """(N,) place of the hypothesis that each is a near-copy of, -1 for none; the largest come first."""
    if not len(k):
        return np.zeros(0, dtype=np.int64)
    contexts, of_context = np.unique(k, return_inverse=True)
    concepts, of_concept = np.unique(m, return_inverse=True)
    alike = context_correlations(sparse.csr_array(members[contexts]), pool)
    same = side_correlations(u, concepts, pool)
    return fold(of_context.tolist(), of_concept.tolist(), np.sign(delta).tolist(), alike, same)
