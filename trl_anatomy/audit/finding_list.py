"""The fewest findings that together say what the pairs say: named habits first, then concepts that add to them.

A finding is a line where it differs beyond doubt and adds to the lines above it in the joint Bradley-Terry model; what
differs and says the same as a line, or adds nothing to the lines, is folded under one (docs/explanation/findings.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats as distributions

from ..reading.habits import FORMATTING, LENGTHS
from . import stats
from .bradley_terry import MOST_PAIRS, drawn_rows, fold_of, interval, light_margins, right, score_test
from .counted import Counted, is_share
from .findings import MIN_PROMPTS, one_blas_thread
from .folding import SAME
from .predict import CO_FIRING

HABIT, CONCEPT = "habit", "concept"
# Verdicts on the list as a whole.
LISTED, NOTHING, TOO_FEW = "listed", "nothing beyond chance", "too few prompts to tell"
RULE = (
    "a line at a family-wise 0.5 % over habits, or over concepts with a label of score 0.75, also in what it adds to "
    "the lines above it; folded under a line at q <= 0.05"
)

# What differs: q-value over all habits, or over all concepts. A line has to hold at a family-wise level that is so low
# that another half of the same data finds it again.
DIFFERS, LINE = 0.05, 0.005
MOST_LINES = 10
# The least score of the label of a concept that is listed.
GOOD_LABEL = 0.75
# Concepts that may come into the list: those that differ most.
MOST_CONCEPTS = 200
# Complementary pairs of halves; pairs that are halved at most; share of the halves in which a line is selected.
N_HALVES, MOST_HALVED, STABLE = 25, 5_000, 0.6
N_TELLING = 3

FOLDED = pa.struct(
    [(name, pa.string()) for name in ("kind", "name", "says")]
    + [(name, pa.float64()) for name in ("chosen", "rejected", "correlation")]
)
FINDINGS = pa.schema(
    [
        ("rank", pa.int32()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("says", pa.string()),
        ("favours", pa.string()),
        ("unit", pa.string()),
        *((name, pa.float64()) for name in ("chosen", "rejected")),
        *((f"difference{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((name, pa.float64()) for name in ("z", "p", "q")),
        *((f"adds{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("stability", pa.float64()),
        ("label_score", pa.float64()),
        ("folded", pa.list_(FOLDED)),
        ("telling_rows", pa.list_(pa.int64())),
    ]
)
# What `audit.json` holds under `findings`; audits of earlier versions have none.
SHAPE = {"verdict": str, "pairs": int, "prompts": int, "tested": int, "significant": int, "rule": str}


@dataclass(frozen=True)
class Line:
    """A candidate that is listed.

    Attributes:
        at: its column.
        folded: columns of those that are folded under it, what varies with it most first.
        stability: share of halves in which it, or one of those, is selected.
    """

    at: int
    folded: tuple[int, ...]
    stability: float = float("nan")


@dataclass(frozen=True)
class Shown:
    """Concepts of an SAE as the list takes them; K concepts.

    Attributes:
        names: T1, T2, ...
        labels: what they are called.
        label_scores: (K,) held-out balanced accuracy of the label; NaN where there is none.
        habits: the named habit that each agrees with; empty where there is none.
        shown: of chosen and of rejected, (n_pairs, K) bool: responses that show them.
        telling_rows: rows of the dataset that show each best.
    """

    names: Sequence[str]
    labels: Sequence[str]
    label_scores: np.ndarray
    habits: Sequence[str]
    shown: tuple[np.ndarray, np.ndarray]
    telling_rows: Sequence[Sequence[int]]

    @classmethod
    def of(cls, table: pa.Table, shown: tuple[np.ndarray, np.ndarray]) -> "Shown":
        """The co-firing concepts of a table of schema `predict.CONCEPTS`.

        Args:
            shown: of chosen and of rejected, (n_pairs, K) bool.
        """
        rows = [row for row in table.to_pylist() if row["kind"] == CO_FIRING]
        return cls(
            names=[row["concept"] for row in rows],
            labels=[row["label"] for row in rows],
            label_scores=np.array([row["label_score"] for row in rows], dtype=np.float64),
            habits=[(row["evidence"] or {}).get("habit") or "" for row in rows],
            shown=shown,
            telling_rows=[row["telling_rows"] for row in rows],
        )

    def gaps(self, columns: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(n_rows, n_columns) int8: chosen minus rejected."""
        chosen, rejected = (side[rows][:, columns].astype(np.int8) for side in self.shown)
        return np.asarray(chosen - rejected)


@dataclass(frozen=True)
class _Tested:
    """Means of chosen minus rejected with errors, z, p, q and Holm-adjusted p, each (n_columns,); tests in all."""

    mean: np.ndarray
    error: np.ndarray
    z: np.ndarray
    p: np.ndarray
    q: np.ndarray
    adjusted: np.ndarray
    n: int

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> "_Tested":
        mean, error, p = (np.concatenate(part) for part in zip(*parts, strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.where(error > stats.ROUNDING, mean / error, np.where(np.isnan(p), 0.0, np.sign(mean) * np.inf))
        n = int((~np.isnan(p)).sum())
        return cls(mean, error, z, p, stats.benjamini_hochberg(p), stats.holm(p), n)

    @property
    def differs(self) -> np.ndarray:
        """(n_columns,) bool."""
        return (self.q <= DIFFERS) & (self.z != 0)

    def only(self, columns: np.ndarray) -> "_Tested":
        """The same of some columns, as tested among all."""
        names = ("mean", "error", "z", "p", "q", "adjusted")
        return replace(self, **{name: getattr(self, name)[columns] for name in names})


@one_blas_thread
def habit_lines(counted: Counted, seed: int = 0) -> list[Line]:
    """The fewest habits that together say what all that differ say.

    A habit differs if its mean of chosen minus rejected is not zero (q <= 0.05, robust to shared prompts); of a line
    that holds at a family-wise 0.5 % (Holm). The first is the one that differs most. A further one has to add to those
    above, by its efficient score at 0.5 % over all habits, on the same side. Under a line are folded: habits that vary
    with it (|correlation| above 0.5 over both directions of all pairs), those of its family (layout, or length) on its
    side, and of the others that differ those that add nothing, each under the line that it varies with most. A line has
    to be selected, or one that is folded under it, in 60 % of halves (`selected`).

    Args:
        counted: habits of both sides.
        seed: of the halves.

    Returns:
        At most ten lines, by column of `counted`; none below 20 prompts.
    """
    if len(np.unique(counted.groups)) < MIN_PROMPTS:
        return []
    gaps, names = counted.gaps(), list(counted.habits)
    tested = _test_habits(counted)
    family = [next((i for i, of in enumerate((FORMATTING, LENGTHS)) if name in of), -1) for name in names]
    lines = pick_lines(gaps, tested, counted.groups, np.array(family))
    lines = selected(lines, [gaps], counted.groups, seed)
    return _fold_rest(lines, np.flatnonzero(tested.differs).tolist(), gaps)


def _test_habits(counted: Counted) -> _Tested:
    return _Tested.of([stats.mean_test(counted.values[0] - counted.values[1], counted.groups)])


def pick_lines(
    gaps: np.ndarray,
    tested: _Tested,
    groups: np.ndarray,
    family: np.ndarray,
    above: np.ndarray | None = None,
    most: int = MOST_LINES,
) -> list[Line]:
    """Lines one by one, the one that adds most to those above first.

    Args:
        gaps: (n, J) chosen minus rejected of the candidates.
        tested: of the candidates.
        groups: (n,) prompt of each pair.
        family: (J,) the same number for candidates that say the same if they speak for the same side; -1 for none.
        above: (n, m) columns that the model has already; default none.
        most: lines at most.

    Returns:
        Lines with those folded under them that vary with them, or are of their family. What adds nothing is in none.
    """
    model = np.zeros((len(gaps), 0)) if above is None else np.asarray(above, dtype=np.float64)
    z = tested.z
    left = [int(k) for k in np.argsort(-np.abs(z), kind="stable") if tested.differs[k]]
    lines: list[Line] = []
    while len(lines) < most:
        able = [k for k in left if tested.adjusted[k] <= LINE]
        if model.shape[1] and able:
            score, p = score_test(model, gaps[:, able], groups)
            adds = (p * tested.n <= LINE) & (score * z[able] > 0)
            able = [able[i] for i in np.argsort(-np.abs(score), kind="stable") if adds[i]]
        if not able:
            break
        best, left = able[0], [k for k in left if k != able[0]]
        related = correlations(gaps[:, best], gaps[:, left])
        same = [
            abs(r) > SAME or (family[k] >= 0 and family[k] == family[best] and z[k] * z[best] > 0)
            for k, r in zip(left, related, strict=True)
        ]
        order = sorted((i for i, like in enumerate(same) if like), key=lambda i: -abs(related[i]))
        lines.append(Line(best, tuple(left[i] for i in order)))
        left = [k for k, like in zip(left, same, strict=True) if not like]
        model = np.column_stack([model, gaps[:, best]])
    return lines


def _fold_rest(lines: list[Line], differ: Sequence[int], gaps: np.ndarray) -> list[Line]:
    """The lines with what differs and is in none folded under the one that it varies with most."""
    known = {k for line in lines for k in (line.at, *line.folded)}
    rest = [k for k in differ if k not in known]
    if not lines or not rest:
        return lines
    related = np.abs([correlations(gaps[:, line.at], gaps[:, rest]) for line in lines])
    best = related.argmax(axis=0)
    found = []
    for i, line in enumerate(lines):
        mine = sorted(np.flatnonzero(best == i), key=lambda j: -related[i, j])
        found.append(Line(line.at, (*line.folded, *(rest[j] for j in mine)), line.stability))
    return found


def correlations(column: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n_columns,) correlation of `column` (n,) with each of `columns` over both directions of all pairs.

    The means over both directions are zero, so this is the cosine; 0 where nothing varies.
    """
    column = np.asarray(column, dtype=np.float64)

    def of(block: np.ndarray) -> tuple[np.ndarray]:
        size = np.sqrt(column @ column * np.square(block).sum(axis=0))
        return (column @ block / np.where(size > 0, size, 1.0),)

    return stats.in_blocks(columns, of)[0]


def selected(lines: list[Line], gaps: Sequence[np.ndarray], groups: np.ndarray, seed: int) -> list[Line]:
    """The lines that are selected in most halves of the prompts, with the share of them.

    Stability selection with complementary pairs of halves (Shah and Samworth 2013) by an L1-penalised logistic
    regression on all candidates. Columns are divided by the root mean square of their sums over prompts, and the
    penalty is the one that lets in one column of noise on average. Of more than 5,000 pairs whole prompts are drawn:
    the share is then reported, and decides nothing.

    Args:
        lines: to look for; gaps: of all candidates, arrays of (n, some columns) side by side; groups: (n,) prompt of
            each pair; seed: of the halves.

    Returns:
        Lines that they or what is folded under them are selected in 60 % of the halves or more.
    """
    if not lines:
        return []
    rows = drawn_rows(groups, MOST_HALVED, seed)
    sides = [mask for half in stats.half_masks(groups[rows], N_HALVES, seed) for mask in (half, ~half)]
    drawn, sets = np.column_stack([part[rows] for part in gaps]), [[line.at, *line.folded] for line in lines]
    hits = np.zeros(len(lines))
    for mask in sides:
        found = _l1_selected(drawn[mask], groups[rows][mask])
        hits += [found[of].any() for of in sets]
    share = hits / len(sides)
    decides = len(rows) == len(groups)
    return [
        Line(line.at, line.folded, float(of))
        for line, of in zip(lines, share, strict=True)
        if of >= STABLE or not decides
    ]


def _l1_selected(gaps: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(J,) bool: columns with a weight in the L1-penalised model. Without an intercept, turning rows round changes
    nothing; scikit-learn wants two classes."""
    from sklearn.linear_model import LogisticRegression

    totals = stats.group_sums(gaps, groups)
    size = np.sqrt(np.square(totals).sum(axis=0) / len(gaps))
    varies = size > 0
    n, found = len(gaps), np.zeros(gaps.shape[1], dtype=bool)
    if not varies.any():
        return found
    # At weights of zero the gradient of a column of noise is normal with variance n/4.
    strength = 2 / (distributions.norm.isf(1 / (2 * max(2, varies.sum()))) * np.sqrt(n))
    sign = np.where(np.arange(n) % 2, -1.0, 1.0)
    model = LogisticRegression(
        l1_ratio=1.0, C=strength, solver="liblinear", fit_intercept=False, tol=1e-3, max_iter=200, random_state=0
    )
    found[varies] = model.fit(gaps[:, varies] / size[varies] * sign[:, None], sign).coef_[0] != 0
    return found


@one_blas_thread
def list_findings(
    counted: Counted,
    rows: np.ndarray,
    concepts: Shown | None = None,
    *,
    lines: list[Line] | None = None,
    seed: int = 0,
) -> tuple[pa.Table, dict[str, Any]]:
    """List the fewest findings that together say what the pairs say.

    Habits first (`habit_lines`). A concept is a candidate where its label has a held-out score of 0.75 or more. It is
    folded under a line where it differs and varies with it or with a habit folded there (|correlation| above 0.5), or
    where its label names one of these habits. It is a line of its own where it adds to all habits that differ and to
    the concepts above it, by the same tests as habits, and where no line has its label.

    Args:
        counted: habits of both sides.
        rows: (n_pairs,) row of each pair in the dataset.
        concepts: the SAE's concepts; default there are none.
        lines: `habit_lines(counted, seed)`, where they are known already.
        seed: of halves, folds and draws.

    Returns:
        Table of schema FINDINGS, at most ten rows; and what `audit.json` says of it. `adds` is held-out accuracy,
        cross-validated by prompt on at most 20,000 pairs.
    """
    n_prompts = len(np.unique(counted.groups))
    info: dict[str, Any] = {"verdict": TOO_FEW, "pairs": len(rows), "prompts": n_prompts, "tested": 0, "significant": 0}
    info["rule"] = RULE
    if n_prompts < MIN_PROMPTS:
        return FINDINGS.empty_table(), info
    lines = habit_lines(counted, seed) if lines is None else lines
    tested = _test_habits(counted)
    gaps, habits = counted.gaps(), list(counted.habits.values())
    info["tested"], info["significant"] = tested.n, int(tested.differs.sum())
    found = []
    for line in lines:
        habit = habits[line.at]
        found.append(
            {
                "kind": HABIT,
                "name": habit.name,
                "says": habit.says,
                "unit": "share" if is_share(habit) else habit.unit,
                **_sides(counted.values[:, :, line.at].mean(axis=1), tested, line.at, n_prompts),
                "stability": line.stability,
                "label_score": None,
                "folded": [
                    _folded(HABIT, habits[k].name, habits[k].says, counted.values[:, :, k].mean(axis=1), r)
                    for k, r in zip(line.folded, correlations(gaps[:, line.at], gaps[:, line.folded]), strict=True)
                ],
                "telling_rows": _telling(gaps, line.at, tested.z[line.at], rows, counted.groups),
            }
        )
    columns = [gaps[:, line.at] for line in lines]
    if concepts is not None and len(concepts.names):
        more, of_concepts = _concept_rows(counted, gaps, tested, lines, found, concepts, info, seed)
        found, columns = found + more, columns + of_concepts
    drawn = drawn_rows(counted.groups, MOST_PAIRS, seed)
    folds, before = fold_of(counted.groups[drawn], seed), np.full(len(drawn), 0.5)
    for k, row in enumerate(found):
        after = right(light_margins(np.column_stack(columns[: k + 1])[drawn].astype(np.float64), folds))
        row |= {"rank": k + 1, **interval("adds", after - before, counted.groups[drawn])}
        before = after
    info["verdict"] = LISTED if found else NOTHING
    return pa.Table.from_pylist(found, schema=FINDINGS), info


def _concept_rows(  # noqa: PLR0913
    counted: Counted,
    gaps: np.ndarray,
    tested: _Tested,
    lines: list[Line],
    found: list[dict[str, Any]],
    concepts: Shown,
    info: dict[str, Any],
    seed: int,
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Rows of the concepts that are lines, with their columns; others are folded under the rows of `found`."""
    good = np.flatnonzero(np.nan_to_num(concepts.label_scores) >= GOOD_LABEL)
    blocks = [good[start : start + stats.BLOCK] for start in range(0, len(good), stats.BLOCK)]
    if not blocks:
        return [], []
    compared = _Tested.of([stats.mean_test(concepts.gaps(block), counted.groups) for block in blocks])
    info["tested"] += compared.n
    info["significant"] += int(compared.differs.sum())
    at = np.flatnonzero(compared.differs)
    at = at[np.argsort(-np.abs(compared.z[at]), kind="stable")][:MOST_CONCEPTS]
    of = concepts.gaps(good[at])
    rate = [side[:, good[at]].mean(axis=0) for side in concepts.shown]

    def folded(i: int, correlation: float) -> dict[str, Any]:
        k = good[at[i]]
        return _folded(CONCEPT, concepts.names[k], concepts.labels[k], [side[i] for side in rate], correlation)

    left = np.ones(len(at), dtype=bool)
    names = list(counted.habits)
    for line, row in zip(lines, found, strict=True):
        inside = [line.at, *line.folded]
        related = np.array([correlations(gaps[:, k], of) for k in inside])
        named = np.isin([concepts.habits[good[k]] for k in at], [names[k] for k in inside])
        mine = np.flatnonzero(left & ((np.abs(related) > SAME).any(axis=0) | named))
        row["folded"] += [folded(i, related[0, i]) for i in mine[np.argsort(-np.abs(related[0, mine]), kind="stable")]]
        left[mine] = False
    stay = np.flatnonzero(left)
    _, label = np.unique([concepts.labels[good[at[i]]] for i in stay], return_inverse=True)
    above = gaps[:, tested.differs]
    of_left = of[:, stay]
    picked = pick_lines(of_left, compared.only(at[stay]), counted.groups, label, above, MOST_LINES - len(lines))
    # Beside the habits that differ, so that a concept is not selected for what they say.
    picked = selected(picked, [of_left, above], counted.groups, seed)
    more = []
    for line in picked:
        j = at[stay[line.at]]
        k = good[j]
        related = correlations(of_left[:, line.at], of_left[:, line.folded])
        more.append(
            {
                "kind": CONCEPT,
                "name": concepts.names[k],
                "says": concepts.labels[k],
                "unit": "share",
                **_sides([side[stay[line.at]] for side in rate], compared, j, info["prompts"]),
                "stability": line.stability,
                "label_score": float(concepts.label_scores[k]),
                "folded": [folded(stay[i], r) for i, r in zip(line.folded, related, strict=True)],
                "telling_rows": list(concepts.telling_rows[k]),
            }
        )
    return more, [of_left[:, line.at].astype(np.float64) for line in picked]


def _sides(sides: Sequence[float], tested: _Tested, at: int, n_prompts: int) -> dict[str, Any]:
    half = distributions.t.ppf(0.975, n_prompts - 1) * tested.error[at]
    return {
        "favours": "chosen" if tested.mean[at] > 0 else "rejected",
        "chosen": float(sides[0]),
        "rejected": float(sides[1]),
        "difference": float(tested.mean[at]),
        "difference_low": float(tested.mean[at] - half),
        "difference_high": float(tested.mean[at] + half),
        "z": float(tested.z[at]) if np.isfinite(tested.z[at]) else None,
        "p": float(tested.p[at]),
        "q": float(tested.q[at]),
    }


def _folded(kind: str, name: str, says: str, sides: Sequence[float], correlation: float) -> dict[str, Any]:
    chosen, rejected = map(float, sides)
    return {
        "kind": kind,
        "name": name,
        "says": says,
        "chosen": chosen,
        "rejected": rejected,
        "correlation": float(correlation),
    }


def _telling(gaps: np.ndarray, at: int, z: float, rows: np.ndarray, groups: np.ndarray) -> list[int]:
    """Rows of different prompts that show a habit best: the largest difference on its side, the least in others."""
    side = gaps[:, at] * np.sign(z)
    size = np.sqrt(np.square(gaps).mean(axis=0))
    others = np.abs(gaps / np.where(size > 0, size, 1.0)).sum(axis=1)
    order = np.lexsort((others, -side))
    order = order[: np.count_nonzero(side > 0)]
    _, first = np.unique(groups[order], return_index=True)
    return [int(row) for row in rows[order[np.sort(first)[:N_TELLING]]]]
