"""Pairs whose label looks improbable, given what decides most pairs: out of fold (docs/reference/problems.md)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..reading.habits import LENGTHS
from .bradley_terry import FOLDS, MOST_PAIRS, MOST_VALUES, STRENGTHS, drawn_rows, fit_path, fold_of, log_sigmoid
from .choice import ALL, CONCEPTS, LENGTH, TOLD
from .counted import Counted
from .findings import one_blas_thread
from .folding import SAME
from .habit_words import SHARE, percent

# Between these a label begins to be improbable: where the model is sure of most pairs, one in ten is; where it is not,
# more than one in five is no evidence.
SURELY, AT_MOST = 0.1, 0.2
# Reasons told for a pair; rows whose columns are made at a time.
N_REASONS, BLOCK = 3, 20_000
# A concept in a reason, before it has a label.
_CONCEPT = re.compile(r"(?:^|(?<=; ))more of (T\d+) in(?= (?:chosen|rejected))")


@dataclass(frozen=True)
class Improbable:
    """Pairs whose label looks improbable, the least probable first.

    Attributes:
        pairs: (n,) int64 index of each among all pairs.
        probability: (n,) out-of-fold probability of the given label.
        why: what speaks against it most, in words.
        every: (n_pairs,) the probability of all pairs, in their order.
    """

    pairs: np.ndarray
    probability: np.ndarray
    why: Sequence[str]
    every: np.ndarray

    def called(self, labels: Mapping[str, str]) -> "Improbable":
        """The same with reasons that say what each concept is called, beside its name.

        Args:
            labels: name of a concept -> its label.
        """

        def with_label(match: re.Match[str]) -> str:
            label = labels.get(match[1], "")
            return f"more of {match[1]} ({label}) in" if label else match[0]

        return replace(self, why=[_CONCEPT.sub(with_label, why) for why in self.why])


@one_blas_thread
def improbable_labels(
    counted: Counted,
    choice: Mapping[str, Any],
    concepts: np.ndarray | None = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Improbable | None:
    """Rank the pairs that a model of the other prompts' pairs would turn round.

    The model is the one of `choice` that predicts held-out pairs best. Its margins become probabilities by one slope
    (Platt; a pair turned round has the opposite margin, so there is no intercept). A label is improbable where the
    other side is as probable as the labels of all pairs are on average: the threshold of confident learning (Northcutt
    et al. 2021; both classes of a pair are alike), held between 10 and 20 %. Wrong labels make a model less sure, so
    the improbable ones are left out, and the rest predicts all pairs once more.

    Args:
        counted: habits of both sides.
        choice: `choice_of` the same pairs.
        concepts: (n_pairs, K) disparity u, where there is an SAE.
        names: what each concept is called.
        seed: of the folds, and of the pairs that are drawn where there are too many to fit.

    Returns:
        None where the choice is not predicted beyond chance: then no label can be called improbable.
    """
    source = _source(choice)
    if source is None:
        return None
    columns = _Columns(counted, concepts, names, source)
    groups = counted.groups
    rows = drawn_rows(groups, min(MOST_PAIRS, MOST_VALUES // max(1, len(columns))), seed)
    gaps, folds = columns.gaps(rows), fold_of(groups[rows], seed)
    kept = np.ones(len(rows), bool)
    for _ in range(2):
        models = _models(gaps, folds, kept)
        margins = _held_out(gaps, models, folds)
        scale = max(0.0, float(fit_path(margins[kept, None], [1e-6])[0, 0]))
        kept = ~_improbable(np.exp(log_sigmoid(scale * margins)))
    # Pairs that were not drawn have prompts that no model has seen.
    fold = np.full(len(groups), len(models))
    fold[rows] = folds
    models = np.vstack([models, models.mean(axis=0)])
    margins = np.empty(len(groups))
    for start in range(0, len(groups), BLOCK):
        block = slice(start, start + BLOCK)
        margins[block] = _held_out(columns.gaps(np.arange(len(groups))[block]), models, fold[block])
    probability = np.exp(log_sigmoid(scale * margins))
    listed = np.flatnonzero(_improbable(probability))
    listed = listed[np.argsort(probability[listed], kind="stable")]
    return Improbable(listed, probability[listed], columns.reasons(listed, models[fold[listed]], gaps), probability)


def _source(choice: Mapping[str, Any]) -> str | None:
    """The source that predicts held-out pairs best, of those that tell them beyond chance."""
    told = [entry for entry in choice["sources"] if entry["verdict"] == TOLD]
    return max(told, key=lambda entry: entry["log_likelihood"])["source"] if told else None


def _improbable(probability: np.ndarray) -> np.ndarray:
    return probability <= np.clip(1 - probability.mean(), SURELY, AT_MOST)


def _models(gaps: np.ndarray, folds: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(n_folds, n_columns) weights of the kept rows without each fold, at the penalty that predicts these best."""
    paths = np.array([fit_path(gaps[(folds != fold) & kept], STRENGTHS) for fold in range(FOLDS)])
    likelihood = [log_sigmoid(_held_out(gaps, paths[:, k], folds)[kept]).sum() for k in range(len(STRENGTHS))]
    return paths[:, int(np.argmax(likelihood))]


def _held_out(gaps: np.ndarray, models: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) margin of each row by the model of its fold."""
    margins = np.empty(len(gaps))
    for fold in np.unique(folds):
        margins[folds == fold] = gaps[folds == fold] @ models[fold]
    return margins


def _leaders(gaps: np.ndarray) -> np.ndarray:
    """(n_columns,) the column that each varies with (|correlation| above 0.5) of those that tell more, else itself."""
    moments = gaps.T @ gaps
    size = np.sqrt(np.diag(moments))
    with np.errstate(invalid="ignore", divide="ignore"):
        related = np.nan_to_num(np.abs(moments / np.outer(size, size))) > SAME
        tells = np.nan_to_num(np.abs(gaps.sum(axis=0)) / size)
    leader = np.full(len(size), -1)
    for k in np.argsort(-tells, kind="stable"):
        if leader[k] < 0:
            leader[(related[k] | (np.arange(len(size)) == k)) & (leader < 0)] = k
    return leader


class _Columns:
    """Columns of a source of `choice_of`, made for the rows that are asked for, and what they are called."""

    def __init__(self, counted: Counted, concepts: np.ndarray | None, names: Sequence[str], source: str) -> None:
        self._counted, self._concepts, self._names = counted, concepts, names
        self._habits = list(counted.habits.values())
        self._used = np.arange(len(self._habits))
        if source == LENGTH:
            self._used = self._used[[habit.name in LENGTHS for habit in self._habits]][:1]
        elif source == CONCEPTS:
            self._used = self._used[:0]
        if source not in (ALL, CONCEPTS):
            self._concepts = None

    def __len__(self) -> int:
        return len(self._used) + (0 if self._concepts is None else self._concepts.shape[1])

    def gaps(self, rows: np.ndarray) -> np.ndarray:
        """(n, n_columns) chosen minus rejected."""
        habits = Counted(self._counted.values[:, rows], self._counted.habits, self._counted.groups[rows]).gaps()
        habits = habits[:, self._used]
        return habits if self._concepts is None else np.concatenate([habits, self._concepts[rows]], axis=1)

    def reasons(self, rows: np.ndarray, models: np.ndarray, drawn: np.ndarray) -> list[str]:
        """What speaks against the label of each of these rows, the strongest first.

        Columns that vary together speak with one voice: of the one that tells most by itself, if it is not as usual in
        this row, else of the one that counts most.
        """
        leader, usual = _leaders(drawn), drawn.mean(axis=0)
        found = []
        for row, gap, model in zip(rows.tolist(), self.gaps(rows), models, strict=True):
            parts, unusual = gap * model, gap * usual < 0
            together = np.bincount(leader, weights=parts, minlength=len(parts))
            named: list[int] = []
            for k in np.argsort(together, kind="stable").tolist():
                if together[k] >= 0 or len(named) == N_REASONS:
                    break
                members = np.flatnonzero((leader == k) & unusual & (parts < 0))
                if unusual[k] or len(members):
                    named.append(k if unusual[k] else int(members[parts[members].argmin()]))
            found.append("; ".join(self._says(k, row) for k in named))
        return found

    def _says(self, k: int, row: int) -> str:
        if k >= len(self._used):
            assert self._concepts is not None
            k -= len(self._used)
            return f"more of {self._names[k]} in {'chosen' if self._concepts[row, k] > 0 else 'rejected'}"
        k = int(self._used[k])
        habit, (chosen, rejected) = self._habits[k], self._counted.values[:, row, k]
        name = habit.name.replace("_", " ")
        if habit.kind == "rate":
            return f"{name} in {'chosen' if chosen else 'rejected'} only"
        levels = [percent(value) if habit.unit == SHARE else f"{value:.3g}" for value in (chosen, rejected)]
        unit = "" if habit.unit in (SHARE, name, "") else f" {habit.unit}"
        return f"{name} {levels[0]} in chosen, {levels[1]}{unit} in rejected"
