"""Named habits by what is asked: where a habit's difference between the sides is another than elsewhere."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..reading.habits import FORMATTING, LENGTHS
from . import stats
from .counted import Counted
from .findings import few_prompts, one_blas_thread
from .folding import SAME, context_correlations, fold, side_correlations
from .number_words import SHARE
from .prompt_rules import RULES

# Prompts that a context, and the rest, need: errors between fewer prompts can not be estimated.
LEAST_PROMPTS = 10
# A context is called by a property that so many of its pairs have, and that correlates so much with it.
MOST, SHAPED = 0.5, 0.3
# Terms that a cluster is called by.
NAMED = 3
# Lines, and rows tried, beyond which a row whose habit has a line is no further one: a reader has enough.
MOST_LINES, MOST_TRIED = 100, 500

HABIT_HYPOTHESES = pa.schema(
    [
        ("rank", pa.int32()),
        ("context", pa.string()),
        ("when", pa.string()),
        ("habit", pa.string()),
        ("says", pa.string()),
        ("unit", pa.string()),
        ("lean", pa.string()),
        *((f"{side}_{where}", pa.float64()) for where in ("in", "out") for side in ("chosen", "rejected")),
        *((name, pa.float64()) for name in ("mean_in", "mean_out", "delta", "delta_a", "delta_b")),
        *((name, pa.float64()) for name in ("ci_low", "ci_high", "z", "p", "q")),
        *((name, pa.int64()) for name in ("n_in", "n_out", "prompts_in", "prompts_out")),
        ("differs", pa.bool_()),
        ("kept", pa.bool_()),
        ("folded_under", pa.string()),
    ]
)


@dataclass(frozen=True)
class Asked:
    """Contexts of prompts: those for which a rule of `prompt_rules.RULES` holds, and clusters that an SAE finds.

    Attributes:
        names: of the rules, then of the clusters: "list", "A3".
        says: what a prompt does that is in it, to follow "when the prompt": "asks for code", "is like A3 (tea · cup)".
        members: (n_contexts, n) of ones, the pairs of each.
    """

    names: tuple[str, ...]
    says: tuple[str, ...]
    members: sparse.csr_array

    @classmethod
    def of(cls, rules: Sequence[Sequence[str]]) -> "Asked":
        """
        Args:
            rules: of each pair, the names of the rules that hold of its prompt.
        """
        held = [set(names) for names in rules]
        names = tuple(name for name in RULES if any(name in of for of in held))
        inside = [[i for i, of in enumerate(held) if name in of] for name in names]
        indptr = np.r_[0, np.cumsum([len(of) for of in inside])].astype(np.int64)
        rows = np.array([i for of in inside for i in of], dtype=np.int64)
        members = sparse.csr_array((np.ones(len(rows)), rows, indptr), shape=(len(names), len(held)))
        return cls(names, tuple(RULES[name].says for name in names), members)

    def with_clusters(self, clusters: sparse.csr_array, terms: Sequence[Sequence[str]]) -> "Asked":
        """The same with the prompt clusters A1, A2, ... of an audit.

        Args:
            clusters: (K, n) of ones; terms: what each is called by.
        """
        # A number that tells equal names apart says nothing here: "A3" does that.
        own = [[term for term in of if not re.fullmatch(r"\(\d+\)", term)] for of in terms]
        words = [" · ".join(of[:NAMED]) for of in own]
        says = (f"is like A{k + 1}" + (f" ({of})" if of else "") for k, of in enumerate(words))
        return Asked(
            (*self.names, *(f"A{k + 1}" for k in range(len(words)))),
            (*self.says, *says),
            sparse.csr_array(sparse.vstack([self.members, clusters], format="csr")),
        )

    def select(self, contexts: np.ndarray) -> "Asked":
        """Some of the contexts, by number."""
        names, says = (tuple(of[k] for k in contexts) for of in (self.names, self.says))
        return Asked(names, says, sparse.csr_array(self.members[contexts]))

    @property
    def clusters(self) -> np.ndarray:
        """(n_contexts,) bool: which are clusters."""
        return np.array([name not in RULES for name in self.names], dtype=bool)


def cluster_members(pairs: pa.Table, n_clusters: int) -> sparse.csr_array:
    """(n_clusters, n_pairs) of ones: the pairs of A1, A2, ... in a table of schema `folder.PAIRS`."""
    listed = pairs["contexts"].combine_chunks()
    named = listed.flatten().dictionary_encode()
    number = {f"A{k + 1}": k for k in range(n_clusters)}
    of = np.array([number.get(name, -1) for name in named.dictionary.to_pylist()], dtype=np.int64)
    context, pair = of[named.indices.to_numpy()], listed.value_parent_indices().to_numpy()
    about = context >= 0
    return sparse.csr_array(
        (np.ones(int(about.sum())), (context[about], pair[about])), shape=(n_clusters, pairs.num_rows)
    )


def properties(counted: Counted | None, asked: Asked | None) -> tuple[sparse.csr_array, list[str]]:
    """What pairs have that a reader knows by name: what prompts ask for, then rates that either response shows.

    Returns:
        (n_properties, n) of ones, and each in words: "asks for code or brings some", "responses use bold".
    """
    parts: list[sparse.csr_array] = []
    says: list[str] = []
    if asked is not None:
        parts.append(asked.members)
        says += asked.says
    if counted is not None:
        rates = [k for k, habit in enumerate(counted.habits.values()) if habit.kind == "rate"]
        shown = (counted.values[:, :, rates] > 0).any(axis=0)
        parts.append(sparse.csr_array(shown.T.astype(np.float64)))
        habits = list(counted.habits.values())
        says += [f"responses {habits[k].says}" for k in rates]
    return sparse.csr_array(sparse.vstack(parts, format="csr")) if parts else sparse.csr_array((0, 0)), says


def shapes(members: sparse.csr_array, having: sparse.csr_array, says: Sequence[str]) -> list[str | None]:
    """The property of most pairs of each context that sets them apart most; None where none does.

    Args:
        members: (n_contexts, n) of ones; having: (n_properties, n) of ones; says: each property in words.
    """
    if not len(says) or not members.shape[0]:
        return [None] * members.shape[0]
    every = sparse.csr_array(sparse.vstack([having, members], format="csr"))
    related = context_correlations(every, np.ones(members.shape[1], dtype=bool))[len(says) :, : len(says)]
    share = np.asarray((members @ having.T).todense()) / np.maximum(1, members.sum(axis=1))[:, None]
    related = np.where(share >= MOST, related, -1.0)
    best = related.argmax(axis=1)
    return [says[j] if related[k, j] >= SHAPED else None for k, j in enumerate(best.tolist())]


@one_blas_thread
def habits_by_prompt(
    counted: Counted,
    asked: Asked,
    *,
    alpha: float = 0.05,
    least: int = 25,
    copies: np.ndarray | None = None,
) -> pa.Table:
    """Every (prompt rule or prompt cluster, habit) against all other pairs.

    The difference of the gaps (chosen minus rejected; of amounts differences of logarithms, `Counted.gaps`) inside and
    outside is tested as in the prompt-conditioned view: the larger of the prompt-robust Welch error and that of a
    context drawn at random. q is over all cells of rules, or of clusters, with `least` different pairs and
    `LEAST_PROMPTS` prompts on either side. What `differs` has q at most alpha and is alike in both halves of the
    prompts. Of that, `kept` is what says something of its own: a row is folded under one before it that says the same
    of almost the same prompts (`folding.fold`; habits of layout, and lengths, say the same), or where nothing is left
    of it beyond the contexts of such rows before it, at the level of the others. Rules come before clusters, then the
    smaller p; of clusters a correlation of `SHAPED` is near enough.

    Args:
        counted: habits of both sides; asked: the contexts.
        least: different pairs that a context, and the rest, need.
        copies: (n,) the same number for copies of a pair, which count once towards `least`; default none are.
    Returns:
        Table of schema HABIT_HYPOTHESES: kept rows by rank, then what differs, then the others, by p. Rates and means
        of the sides are those of `Counted.values`.
    Source: method.md section 5.
    """
    gaps, n = counted.gaps(), len(counted.groups)
    copies = np.arange(n) if copies is None else copies
    support = _support(asked.members, counted.groups, copies)
    fit = (support[:, :2].min(axis=1) >= least) & (support[:, 2:].min(axis=1) >= LEAST_PROMPTS)
    if not fit.any() or few_prompts(counted.groups, n) or not gaps.shape[1]:
        return HABIT_HYPOTHESES.empty_table()
    asked = asked.select(np.flatnonzero(fit))
    support, pool = support[fit], np.ones(n, dtype=bool)
    halves = stats.row_halves(np.arange(n), counted.groups)
    welch, split = stats.compare_members(gaps, asked.members, pool, halves)
    welch = stats.welch_of_groups(welch, gaps, asked.members, pool, counted.groups)
    welch = stats.no_surer_than_a_draw(welch, gaps, pool, counted.groups)
    clusters, q = asked.clusters, np.full_like(welch.p, np.nan)
    for kind in (clusters, ~clusters):
        q[kind] = stats.benjamini_hochberg(welch.p[kind])
    with np.errstate(invalid="ignore"):
        differs = (q <= alpha) & split.consistent
    k, m = np.nonzero(~np.isnan(welch.p))
    with np.errstate(divide="ignore"):
        size = np.round(np.log(welch.p[k, m]), 6)  # a context and its complement tie, but for rounding
    order = np.lexsort((m, k, size, clusters[k], ~differs[k, m]))
    k, m = k[order], m[order]
    n_differ = int(differs.sum())
    under = _folded(counted, gaps, asked, k[:n_differ], m[:n_differ], welch)
    names = list(counted.habits)
    cell = [f"{asked.names[a]}~{names[b]}" for a, b in zip(k, m, strict=True)]
    folded_under = [cell[i] if i >= 0 else None for i in under] + [None] * (len(k) - n_differ)
    kept = np.arange(len(k)) < n_differ
    kept[:n_differ] &= under < 0
    again = np.lexsort((np.arange(len(k)), ~kept))
    inside = [stats.member_means(side, asked.members) for side in (*counted.values, gaps)]
    outside = [_rest(side, asked.members, mean) for side, mean in zip((*counted.values, gaps), inside, strict=True)]
    found = []
    for rank, i in enumerate(again, start=1):
        a, b = int(k[i]), int(m[i])
        habit = counted.habits[names[b]]
        entry: dict[str, Any] = {
            "rank": rank if kept[i] else None,
            "context": asked.names[a],
            "when": asked.says[a],
            "habit": names[b],
            "says": habit.says,
            "unit": SHARE if habit.kind == "rate" else habit.unit,
            "lean": "chosen" if welch.delta[a, b] > 0 else "rejected",
            "differs": bool(differs[a, b]),
            "kept": bool(kept[i]),
            "folded_under": folded_under[i],
        }
        for where, means in (("in", inside), ("out", outside)):
            for side, mean in zip(("chosen", "rejected"), means, strict=False):
                entry[f"{side}_{where}"] = mean[a, b]
            entry[f"mean_{where}"] = means[2][a, b]
        entry |= {name: getattr(welch, name)[a, b] for name in ("delta", "ci_low", "ci_high", "z", "p")}
        entry |= {"q": q[a, b], "delta_a": split.delta_a[a, b], "delta_b": split.delta_b[a, b]}
        entry |= dict(zip(("n_in", "n_out", "prompts_in", "prompts_out"), support[a].tolist(), strict=True))
        found.append(entry)
    return pa.Table.from_pylist(found, schema=HABIT_HYPOTHESES)


def _support(members: sparse.csr_array, groups: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(n_contexts, 4): different pairs inside and outside, prompts inside and outside."""
    found = np.zeros((members.shape[0], 4), dtype=np.int64)
    for column, labels in ((0, copies), (2, groups)):
        _, of, size = np.unique(labels, return_inverse=True, return_counts=True)
        for k, part in enumerate(np.split(members.indices, members.indptr[1:-1])[: members.shape[0]]):
            held, count = np.unique(of[part], return_counts=True)
            found[k, column : column + 2] = len(held), len(size) - (count == size[held]).sum()
    return found


def _rest(values: np.ndarray, members: sparse.csr_array, inside: np.ndarray) -> np.ndarray:
    """(n_contexts, n_columns) mean over the rows that are in no context's members."""
    n_in = members.sum(axis=1)[:, None]
    return np.asarray((values.sum(axis=0) - n_in * inside) / (len(values) - n_in))


def _folded(
    counted: Counted,
    gaps: np.ndarray,
    asked: Asked,
    k: np.ndarray,
    m: np.ndarray,
    welch: stats.Welch,
) -> np.ndarray:
    """(N,) place of the row that each of these, which differ, is folded under; -1 for a line of its own."""
    names, members, clusters = list(counted.habits), asked.members, asked.clusters
    same = side_correlations(gaps, np.arange(len(names)))
    of_kind = np.array([0 if name in FORMATTING else 1 if name in LENGTHS else -1 for name in names])
    kin = (of_kind[:, None] == of_kind) & (of_kind >= 0)
    same = np.where(kin & (np.abs(same) < SAME), SAME, same)
    alike = context_correlations(members, np.ones(len(gaps), dtype=bool))
    delta = welch.delta[k, m]
    under = fold(k.tolist(), m.tolist(), np.sign(delta).tolist(), alike, same)
    levels = [welch.p[k, m][clusters[k] == kind].max(initial=0.0) for kind in (False, True)]
    lines: list[int] = []
    tried = 0
    for i in np.flatnonzero(under < 0):
        above = [j for j in lines if k[j] != k[i] and abs(same[m[i], m[j]]) >= SAME]
        if above:
            contexts = np.unique(k[above])
            left, p = np.nan, 1.0
            # A cluster that is called by what a line's prompts ask for says no more than that line.
            called_so = clusters[k[i]] and any(
                abs(alike[k[i], k[j]]) >= SHAPED and alike[k[i], k[j]] * same[m[i], m[j]] * delta[i] * delta[j] > 0
                for j in above
            )
            if len(lines) < MOST_LINES and tried < MOST_TRIED and not called_so:
                tried += 1
                inside = np.asarray(members[[k[i]]].todense(), dtype=np.float64).ravel()
                others = np.asarray(members[contexts].todense(), dtype=np.float64).T
                left, p = stats.partial_effect(gaps[:, m[i]], inside, others, counted.groups)
            if not (p <= levels[int(clusters[k[i]])] and left * delta[i] > 0):
                under[i] = max(above, key=lambda j: abs(alike[k[i], k[j]]))
                continue
        lines.append(int(i))
    # What was folded under a row that is itself folded now stands under its line.
    for place, parent in enumerate(under.tolist()):
        while parent >= 0 and under[parent] >= 0:
            parent = int(under[parent])
        under[place] = parent
    return under
