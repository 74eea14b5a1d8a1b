"""Predicted against observed in the prompt-conditioned view: what came in prompts of A (method.md section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy import stats as distributions

from ..audit.config import recorded
from ..audit.habits_by_prompt import cluster_members
from ..audit.prompt_view import delta_scale, prompt_scores, response_scores, top_pairs
from ..audit.stats import half_masks, member_means, member_moments, stepped_up

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.harvest import Harvest

# Of a context with fewer prompts among the rollouts, no shift is told.
MIN_PROMPTS = 5
QUANTITIES = ("inside", "difference")
SPLITS = 20
N_BOOTSTRAP, N_PERMUTATIONS = 2000, 10_000


def prompt_view_agreement(audit: Audit, read: Harvest, prompt_groups: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """How well the shifts of R1, R2, ... in prompts of A1, A2, ... were predicted.

    A rollout belongs to A when its prompt scores as high as the lowest pair of the audit's S(A). Two quantities, each
    over all cells that the audit tested and over those that it reports (they differ from the rest, also where named
    habits say why or another cell says the same: training moves those too):

    - "inside": the mean score of R in prompts of A, which is what training is predicted to do there, and what can be
      seen there. Much of it is what R does everywhere, so `without_context_r2` is what the mean of R over all pairs
      predicts of the same cells.
    - "difference": inside less outside, what A adds; this is what a hypothesis `A ⇝ R` says.

    Scores are in the audit's units, standard deviations of each feature over its pairs.

    Args:
        audit: audit of the training set.
        read: harvest of the rollouts: the trained model's as chosen, the start model's as rejected.
        prompt_groups: (n_rollouts,) the same number for rollouts to one prompt.
        seed: of resampling and of the controls.

    Returns:
        `reason`: None, or why there is nothing to tell, and then nothing else. Else `n_contexts` of the audit,
        `n_contexts_seen` with at least `MIN_PROMPTS` prompts, `prompts_per_context` (median), and under "inside" and
        "difference" the figures of "tested" and "reported": n cells, r2 with an interval (bootstrap over R), spearman,
        p (the R's permuted as wholes: cells of one R share what it does everywhere), `noise_ceiling_r2` (what the
        rollouts allow) and `noise_ceiling_both_r2` (what rollouts and pairs allow), by split halves of prompts, and
        `shrunk_r2` (of the prediction by `shrunk`). Of "tested" also `random_prompts_r2` and `random_responses_r2`:
        the same with the features of all A, or of all R, dealt anew to clusters of the same sizes. Figures are None
        where there are too few cells.
    """
    contexts = {name: about for name, about in audit.info.get("contexts", {}).items() if name.startswith("A")}
    if not contexts or not audit.responses.num_rows:
        return {"reason": "the audit has no prompt-conditioned view"}
    if any("features" not in about for about in contexts.values()):
        return {"reason": "the audit does not tell the features of its prompt contexts: audit again"}
    config = recorded(audit.info["settings"])
    prompts = [np.asarray(contexts[f"A{k + 1}"]["features"], dtype=np.int64) for k in range(len(contexts))]
    responses = [np.asarray(ids, dtype=np.int64) for ids in audit.responses["features"].to_pylist()]
    scale = delta_scale(audit.harvest, config.pooling)
    u = response_scores(audit.harvest, responses, config.pooling, scale).u
    seen = response_scores(read, responses, config.pooling, scale).u
    members = cluster_members(audit.pairs, len(prompts))
    about = prompt_scores(audit.harvest, prompts, config)
    there = about_as_much(prompt_scores(read, prompts, config), about, members)
    n_prompts = _prompts_in(there, prompt_groups)
    told = n_prompts >= MIN_PROMPTS
    if not told.any():
        most = int(n_prompts.max(initial=0))
        return {"reason": f"no prompt context has {MIN_PROMPTS} prompts among the rollouts (most: {most})"}
    there = _only(there, told)

    pair_groups = audit.pairs["prompt_group"].to_numpy()
    expected, found = shifts(u, members), shifts(seen, there)
    nearer = shrunk(u, members)
    cells = _cells(audit, expected["inside"].shape)
    by_rollouts = _reliability(seen, there, prompt_groups, cells, seed)
    by_pairs = _reliability(u, members, pair_groups, cells, seed)
    everywhere = np.broadcast_to(u.mean(axis=0), cells["tested"].shape)
    dealt = _dealt(responses, seed)
    dealt_seen = shifts(response_scores(read, dealt, config.pooling, scale).u, there)
    dealt_expected = shifts(response_scores(audit.harvest, dealt, config.pooling, scale).u, members)
    other = _dealt(prompts, seed)
    other_about = prompt_scores(audit.harvest, other, config)
    other_members = top_pairs(other_about, int(np.diff(members.indptr).max()), config.seed)
    other_there = about_as_much(prompt_scores(read, other, config), other_about, other_members)
    other_there = _only(other_there, _prompts_in(other_there, prompt_groups) >= MIN_PROMPTS)
    other_expected, other_seen = shifts(u, other_members), shifts(seen, other_there)

    result: dict[str, Any] = {
        "reason": None,
        "n_contexts": len(prompts),
        "n_contexts_seen": int(told.sum()),
        "prompts_per_context": float(np.median(n_prompts[told])),
    }
    for what in QUANTITIES:
        result[what] = {}
        for name, of in cells.items():
            rollouts, pairs = by_rollouts[what, name], by_pairs[what, name]
            result[what][name] = {
                **agreement_of_cells(expected[what], found[what], of, seed=seed),
                "noise_ceiling_r2": rollouts,
                "noise_ceiling_both_r2": None if rollouts is None or pairs is None else rollouts * pairs,
            }
            result[what][name]["shrunk_r2"] = _r2(nearer[what][of], found[what][of])
            if what == "inside":
                result[what][name]["without_context_r2"] = _r2(everywhere[of], found[what][of])
        result[what]["tested"] |= {
            "random_prompts_r2": _r2(other_expected[what], other_seen[what]),
            "random_responses_r2": _r2(dealt_expected[what], dealt_seen[what]),
        }
    return result


def about_as_much(scores: np.ndarray, audited: np.ndarray, members: sparse.csr_array) -> sparse.csr_array:
    """Which rollouts belong to which prompt context: those that score as high as the lowest of the audit's pairs in it.

    Args:
        scores: (n_rollouts, K); audited: (n_pairs, K) prompt scores.
        members: (K, n_pairs) of ones, the pairs of each context.
    Returns:
        (K, n_rollouts) of ones; a context without pairs has no rollouts.
    """
    rows = [members.indices[members.indptr[k] : members.indptr[k + 1]] for k in range(members.shape[0])]
    lowest = np.array([audited[of, k].min() if len(of) else np.inf for k, of in enumerate(rows)])
    return sparse.csr_array((scores >= lowest).T.astype(np.float64))


def shifts(u: np.ndarray, members: sparse.csr_array) -> dict[str, np.ndarray]:
    """Mean of each column inside each context, and that less the mean of all other rows.

    Args:
        u: (n, M); members: (K, n) of ones.
    Returns:
        "inside", "difference" -> (K, M); NaN where a side is empty.
    """
    inside, n_in = member_means(u, members), members.sum(axis=1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        outside = (u.sum(axis=0) - n_in * inside) / (len(u) - n_in)
    return {"inside": inside, "difference": inside - np.where(np.isfinite(outside), outside, np.nan)}


def shrunk(u: np.ndarray, members: sparse.csr_array) -> dict[str, np.ndarray]:
    """`shifts` of the pairs, each drawn to the mean over all pairs as far as its own noise asks for.

    A context holds a few hundred pairs, and training does not learn the accidents of these: what it learns elsewhere it
    shows there too. The weight of what A says of R is the share of true variance, (S² - E) / (S² - E + e²), where e is
    the standard error of the mean in A, E the mean of e² over contexts, and S² the mean over contexts of the squared
    deviation from the mean over all pairs; 0 where the deviations are no larger than their errors.

    Args:
        u: (n, M); members: (K, n) of ones.
    Source: method.md section 12.
    """
    told, everywhere = shifts(u, members), u.mean(axis=0)
    inside, moments = told["inside"], member_moments(u, members, everywhere)
    error = moments.variance / moments.n[:, None]
    deviation = inside - everywhere
    true = np.maximum(0.0, np.nanmean(deviation**2 - error, axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.where(true > 0, true / (true + error), 0.0)
    return {"inside": everywhere + weight * deviation, "difference": weight * told["difference"]}


def agreement_of_cells(
    predicted: np.ndarray,
    observed: np.ndarray,
    cells: np.ndarray,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """Squared correlation over cells of a table, with what is said of one column resampled and permuted as a whole.

    The cells of a column are not independent: a response cluster that rises everywhere rises in every context. So the
    95 % percentile interval draws columns, and p is the share of permutations of the columns of `observed` in which the
    same cells correlate as well.

    Args:
        predicted, observed: (K, M); a row of `observed` is NaN where nothing was observed.
        cells: (K, M) bool, those that count.
    Returns:
        n, r2, r2_low, r2_high, spearman, p; None below three cells, or where a side does not vary.
    """
    cells = cells & np.isfinite(predicted) & np.isfinite(observed)
    n = int(cells.sum())
    x, y = predicted[cells], observed[cells]
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"n": n, **dict.fromkeys(("r2", "r2_low", "r2_high", "spearman", "p"))}
    # Centred and scaled first: the sums of squares below lose no digits.
    x = np.where(cells, (predicted - x.mean()) / x.std(), 0.0)
    y = np.where(np.isfinite(observed), (observed - y.mean()) / y.std(), 0.0)
    rng, n_columns = np.random.default_rng(seed), cells.shape[1]
    weight = cells.astype(np.float64)
    sums = np.stack([(weight * of).sum(axis=0) for of in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)
    drawn = rng.multinomial(n_columns, np.full(n_columns, 1 / n_columns), n_bootstrap).astype(np.float64)
    resampled = _correlation(*(drawn @ sums).T) ** 2
    low, high = np.nanquantile(resampled, [0.025, 0.975]) if np.isfinite(resampled).any() else (np.nan, np.nan)
    # Entry (m, l): the sum over the cells of column m of what column l observed there.
    tables = (weight.T @ y, weight.T @ (y * y), x.T @ y)
    column = np.arange(n_columns)
    permuted = (
        np.array(
            [
                [table[column, order].sum() for table in tables]
                for order in (rng.permutation(n_columns) for _ in range(n_permutations))
            ]
        )
        .reshape(-1, 3)
        .T
    )
    n_all, total, _, square, _, _ = sums.sum(axis=0)
    by_chance = _correlation(n_all, total, permuted[0], square, permuted[1], permuted[2])
    r = float(np.corrcoef(x[cells], y[cells])[0, 1])
    return {
        "n": n,
        "r2": r**2,
        "r2_low": _known(low),
        "r2_high": _known(high),
        "spearman": _known(distributions.spearmanr(x[cells], y[cells]).statistic),
        "p": float((1 + np.sum(by_chance >= r - 1e-12)) / (1 + n_permutations)),
    }


def _correlation(
    n: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> np.ndarray:
    """From sums; NaN where a side does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def _r2(x: np.ndarray, y: np.ndarray) -> float | None:
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _cells(audit: Audit, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """(K, M) bool: the cells that the audit tested, and those of them that it reports."""
    found = {name: np.zeros(shape, dtype=bool) for name in ("tested", "reported")}
    for row in audit.hypotheses.select(["view", "context", "concept", "differs"]).to_pylist():
        if row["view"] == "prompt":
            at = int(row["context"][1:]) - 1, int(row["concept"][1:]) - 1
            found["tested"][at] = True
            found["reported"][at] = row["differs"]
    return found


def _prompts_in(members: sparse.csr_array, groups: np.ndarray) -> np.ndarray:
    """(K,) different prompts in each context."""
    parts = (groups[members.indices[members.indptr[k] : members.indptr[k + 1]]] for k in range(members.shape[0]))
    return np.array([len(np.unique(of)) for of in parts])


def _only(members: sparse.csr_array, rows: np.ndarray) -> sparse.csr_array:
    """Members of the contexts in `rows` (K,) bool; the others become empty."""
    return sparse.csr_array(sparse.diags_array(rows.astype(np.float64)) @ members)


def _reliability(
    u: np.ndarray, members: sparse.csr_array, groups: np.ndarray, cells: dict[str, np.ndarray], seed: int
) -> dict[tuple[str, str], float | None]:
    """Of each quantity over each set of cells, how far random halves of the prompts agree: the median over splits."""
    found: dict[tuple[str, str], list[float]] = {(what, name): [] for what in QUANTITIES for name in cells}
    for first in half_masks(groups, SPLITS, seed):
        halves = [shifts(u[rows], sparse.csr_array(members[:, rows])) for rows in map(np.flatnonzero, (first, ~first))]
        for what, name in found:
            one, other = (half[what] for half in halves)
            both = cells[name] & np.isfinite(one) & np.isfinite(other)
            if (stepped := stepped_up(one[both], other[both])) is not None:
                found[what, name].append(stepped)
    return {key: float(np.median(values)) if values else None for key, values in found.items()}


def _dealt(clusters: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Clusters of the same sizes with the features of all of them dealt at random."""
    every = np.random.default_rng(seed).permutation(np.concatenate(clusters))
    return np.split(every, np.cumsum([len(cluster) for cluster in clusters])[:-1])
