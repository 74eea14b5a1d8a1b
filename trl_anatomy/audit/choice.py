"""What the choice is made of: how well length, named habits and concepts predict which side is chosen, held out
(docs/explanation/findings.md)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats as distributions

from ..reading.habits import LENGTHS, Habit
from . import stats
from .bradley_terry import (
    LIGHT,
    MOST_PAIRS,
    MOST_VALUES,
    WIDER,
    drawn_rows,
    fit_path,
    fold_of,
    held_out_margins,
    interval,
    light_margins,
    log_sigmoid,
    right,
)
from .counted import Counted, is_share
from .finding_list import Line, habit_lines
from .findings import MIN_PROMPTS, one_blas_thread

TOLD, CHANCE, TOO_FEW = "beyond chance", "nothing beyond chance", "too few prompts to tell"
LENGTH, HABITS, CONCEPTS, ALL = "length", "habits", "concepts", "all"

_INTERVALS = {f"{name}{end}": float for name in ("accuracy", "auc") for end in ("", "_low", "_high")}
# What `audit.json` holds under `choice`; audits of earlier versions have none.
SHAPE = {
    "verdict": str,
    "pairs": int,
    "prompts": int,
    "sources": [{"source": str, "features": int, "verdict": str, "log_likelihood": float, **_INTERVALS}],
    "carried_by": [
        {"habit": str, "with_it": [str], "favours": str, "odds": float, "step": str, "log_likelihood": float}
        | {f"{name}{end}": float for name in ("accuracy", "adds") for end in ("", "_low", "_high")}
    ],
}


@one_blas_thread
def choice_of(
    counted: Counted, concepts: np.ndarray | None = None, seed: int = 0, lines: Sequence[Line] | None = None
) -> dict[str, Any]:
    """Held-out accuracy and AUC of the preference by source, and the few habits that carry it.

    Pairs of one prompt stay in one fold, so nothing is learnt from a copy. Each fold is predicted by a model of the
    other four: standardised by their root mean squares, at the penalty that predicts them best when each is left out
    in turn. Accuracy is the share of pairs with a margin above 0 (0 counts half), AUC that of all margins and their
    negatives; intervals are robust to what pairs of one prompt and models of different folds share.

    Args:
        counted: habits of both sides.
        concepts: (n_pairs, K) disparity u of the SAE's concepts, where there is an SAE.
        seed: of the folds, and of the pairs that are drawn where there are too many to fit.
        lines: `finding_list.habit_lines(counted, seed)`, where they are known already.

    Returns:
        JSON-able. `verdict`; `pairs` and `prompts` that were fitted, and whether they were `drawn`; `sources`: per
        source its `features`, held-out `accuracy`, `auc` (each with `_low` and `_high`), `log_likelihood` (nats a
        pair), `verdict`, and what it `adds` to the accuracy of another (`to`); `carried_by`: as the function of that
        name. With fewer than 20 prompts the lists are empty.
    """
    found: dict[str, Any] = {"verdict": TOO_FEW, "pairs": len(counted.groups), "sources": [], "carried_by": []}
    found["prompts"] = len(np.unique(counted.groups))
    if found["prompts"] < MIN_PROMPTS:
        return found
    names = list(counted.habits)
    n_columns = len(names) + (0 if concepts is None else concepts.shape[1])
    rows = drawn_rows(counted.groups, min(MOST_PAIRS, MOST_VALUES // max(1, n_columns)), seed)
    groups = counted.groups[rows]
    gaps = Counted(counted.values[:, rows], counted.habits, groups).gaps()
    folds = fold_of(groups, seed)
    matrices = {LENGTH: gaps[:, [names.index(next(name for name in LENGTHS if name in names))]], HABITS: gaps}
    if concepts is not None and concepts.shape[1]:
        matrices[CONCEPTS] = np.asarray(concepts[rows], dtype=np.float64)
        matrices[ALL] = np.concatenate([gaps, matrices[CONCEPTS]], axis=1)
    correct: dict[str, np.ndarray] = {}
    for source, matrix in matrices.items():
        margins = held_out_margins(matrix, folds)
        correct[source] = right(margins)
        entry = {"source": source, "features": matrix.shape[1], **scores(margins, groups)}
        if (before := {HABITS: LENGTH, ALL: HABITS}.get(source)) is not None:
            entry |= {"to": before, **interval("adds", correct[source] - correct[before], groups)}
        found["sources"].append(entry)
    beyond = any(entry["verdict"] == TOLD for entry in found["sources"])
    found["verdict"], found["drawn"] = TOLD if beyond else CHANCE, len(rows) < found["pairs"]
    found["pairs"], found["prompts"] = len(rows), len(np.unique(groups))
    if beyond:
        lines = habit_lines(counted, seed) if lines is None else lines
        found["carried_by"] = carried_by(gaps, list(counted.habits.values()), lines, groups, folds)
    return found


def scores(margins: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Accuracy, AUC with their 95 % intervals, and mean log-likelihood of held-out margins."""
    rate, low, high = stats.rate_interval(right(margins), groups=groups)
    low, high = max(0.0, rate - WIDER * (rate - low)), min(1.0, rate + WIDER * (high - rate))
    # Of m and −m: the share of (i, j) with m_i > −m_j. Each pair counts as i and as j, hence twice the error.
    negative = np.sort(-margins)
    below = (np.searchsorted(negative, margins, "left") + np.searchsorted(negative, margins, "right")) / 2
    (auc,), (error,), _ = stats.mean_test(below[:, None] / len(margins), groups)
    half = 2 * WIDER * error * distributions.t.ppf(0.975, len(np.unique(groups)) - 1)
    return {
        "accuracy": float(rate),
        "accuracy_low": low,
        "accuracy_high": high,
        "auc": float(auc),
        "auc_low": float(max(0.0, auc - half)),
        "auc_high": float(min(1.0, auc + half)),
        "log_likelihood": float(log_sigmoid(margins).mean()),
        "verdict": TOLD if low > 0.5 else CHANCE,
    }


def carried_by(
    gaps: np.ndarray, habits: Sequence[Habit], lines: Sequence[Line], groups: np.ndarray, folds: np.ndarray
) -> list[dict[str, Any]]:
    """What each habit that is a line of the list of findings adds to the held-out choice.

    Args:
        gaps: (n, n_habits) of `Counted.gaps`.
        lines: of `finding_list.habit_lines`.
        groups: (n,) prompt of each pair; folds: (n,) fold of each row.

    Returns:
        A row per line, in order: `habit`; `with_it`, the names folded under it; `favours`, the side; `odds` of being
        chosen for a response that has it where the other has not (`step` "one side has it"), or has twice as much, or a
        tenth more of a share, all other rows equal; `accuracy` of it with those above; `adds`, the same less that of
        those above, with interval; `log_likelihood` that it adds, nats a pair.
    """
    rows: list[dict[str, Any]] = []
    kept = [line.at for line in lines]
    weights = fit_path(gaps[:, kept], [LIGHT])[0] if kept else np.zeros(0)
    margins = np.zeros(len(gaps))
    for i, (line, weight) in enumerate(zip(lines, weights, strict=True)):
        new = light_margins(gaps[:, kept[: i + 1]], folds)
        step, size_of_step = _step(habits[line.at])
        rows.append(
            {
                "habit": habits[line.at].name,
                "with_it": [habits[k].name for k in line.folded],
                **interval("accuracy", right(new), groups),
                **interval("adds", right(new) - right(margins), groups),
                "log_likelihood": float((log_sigmoid(new) - log_sigmoid(margins)).mean()),
                "favours": "chosen" if weight > 0 else "rejected",
                "odds": float(np.exp(min(50.0, weight * size_of_step))),
                "step": step,
            }
        )
        margins = new
    return rows


def _step(habit: Habit) -> tuple[str, float]:
    """The difference that odds are given for, and its size in `Counted.gaps`."""
    if habit.kind == "rate":
        return "one side has it", 1.0
    return ("a tenth more", 0.1) if is_share(habit) else ("twice as much", float(np.log(2)))
