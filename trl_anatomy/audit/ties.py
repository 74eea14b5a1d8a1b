"""Pairs of which the dataset itself says that neither side is better."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

# What columns with scores of one side are called; with a verdict; and what says that there is none.
_SCORE = re.compile(r"score|rating|reward|pref(?!ix)|vote|grade", re.IGNORECASE)
_VERDICT = re.compile(r"winner|preference|verdict|better", re.IGNORECASE)
_TIE = re.compile(r"\s*(?:tied?\b.{0,20}|draw|equal|same|both|neither|no preference)\s*", re.IGNORECASE)
# The difference of both scores, as TRL's RewardTrainer reads it.
_MARGIN = "margin"
_ROWS_AT_ONCE = 10_000

Path = tuple[str, ...]
Kinds = tuple[list[tuple[Path, Path]], list[Path], bool]


def score_columns(raw: "Dataset") -> Kinds:
    """Columns that can say that a pair is a tie, also those in a column that holds several.

    Returns:
        Pairs of columns with the scores of chosen and rejected (`score_chosen`, `score_rejected`; their names differ in
        that word alone); columns with a verdict in words (`winner`); whether there is TRL's `margin`.
    """
    paths = dict(_paths(raw.features))
    scores = []
    for path in paths:
        other = (*path[:-1], path[-1].replace("chosen", "rejected"))
        if other != path and other in paths and _SCORE.search(path[-1]) and _number(paths[path], paths[other]):
            scores.append((path, other))
    verdicts = [path for path, kind in paths.items() if kind == "string" and _VERDICT.search(path[-1])]
    return scores, verdicts, (_MARGIN,) in paths and _number(paths[(_MARGIN,)])


def can_tell_ties(raw: "Dataset") -> bool:
    """Whether a dataset has columns with scores of both sides."""
    scores, verdicts, margin = score_columns(raw)
    return bool(scores or verdicts or margin)


def find_ties(raw: "Dataset") -> np.ndarray:
    """(n,) int64 rows whose scores of both sides are equal, whose margin is 0, or whose verdict is a tie."""
    scores, verdicts, margin = score_columns(raw)
    tops = sorted({path[0] for both in scores for path in both} | {path[0] for path in verdicts})
    tops += [_MARGIN] if margin else []
    tied: list[int] = []
    if not tops:
        return np.array(tied, np.int64)
    for start in range(0, len(raw), _ROWS_AT_ONCE):
        batch = raw.with_format(None).select_columns(tops)[start : start + _ROWS_AT_ONCE]
        for i in range(len(batch[tops[0]])):
            row = {name: batch[name][i] for name in tops}
            if _is_tie(row, scores, verdicts, margin):
                tied.append(start + i)
    return np.array(tied, np.int64)


def _is_tie(
    row: Mapping[str, Any], scores: Sequence[tuple[Path, Path]], verdicts: Sequence[Path], margin: bool
) -> bool:
    both = [(_at(row, one), _at(row, other)) for one, other in scores]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    if known and all(a == b for a, b in known):
        return True
    if margin and row[_MARGIN] == 0:
        return True
    return any(_TIE.fullmatch(str(_at(row, path) or "")) is not None for path in verdicts)


def _at(row: Mapping[str, Any], path: Path) -> Any:
    value: Any = row
    for name in path:
        value = None if value is None else value[name]
    return value


def _paths(features: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, str]]:
    """Path and type of every column that holds one value a row."""
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            yield from _paths(feature, (*above, name))
        elif isinstance(dtype := getattr(feature, "dtype", None), str):
            yield (*above, name), dtype


def _number(*kinds: str) -> bool:
    return all(kind.startswith(("int", "uint", "float", "decimal")) for kind in kinds)
