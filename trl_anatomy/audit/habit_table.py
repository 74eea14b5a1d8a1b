"""Named habits per side: rates and means with intervals, and whether both differ (docs/explanation/findings.md)."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import stats as distributions

from ..reading.habits import HABITS, TOKENS, Habit, measure, read_habits
from ..reading.progress import Progress
from . import stats
from .findings import MIN_PROMPTS, one_blas_thread

if TYPE_CHECKING:
    from ..reading.spans import Pairs

# Verdicts on a habit, in the words of the page.
MORE, LESS, NO_EVIDENCE, TOO_FEW = "more in chosen", "more in rejected", "no evidence", "too few prompts to tell"

# Snippets of a habit, and characters around and of a match.
N_SNIPPETS, AROUND, MATCHED = 3, 70, 160

SNIPPET = pa.struct([(name, pa.string()) for name in ("side", "before", "match", "after")] + [("row", pa.int64())])
HABIT_ROWS = pa.schema(
    [
        ("habit", pa.string()),
        ("description", pa.string()),
        ("says", pa.string()),
        ("kind", pa.string()),
        ("unit", pa.string()),
        *(
            (f"{side}{end}", pa.float64())
            for side in ("chosen", "rejected", "difference")
            for end in ("", "_low", "_high")
        ),
        ("z", pa.float64()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("verdict", pa.string()),
        ("snippets", pa.list_(SNIPPET)),
    ]
)

Texts = tuple[str, str, str]


class LazyTexts(Sequence[Texts]):
    """Texts of pairs that are made when they are asked for: all together may be larger than memory.

    Args:
        n: how many pairs.
        of: place of a pair -> prompt, chosen and rejected text.
        each: all of them in order, where that is quicker than one by one.
    """

    def __init__(self, n: int, of: Callable[[int], Texts], each: Callable[[], Iterator[Texts]] | None = None) -> None:
        self._n, self._of, self._each = n, of, each

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        return self._of(range(self._n)[i])

    def __iter__(self) -> Iterator[Texts]:
        return self._each() if self._each is not None else map(self._of, range(self._n))


def habits_to_count(own: str | None, tokens: bool) -> dict[str, Habit]:
    """The library, without the number of tokens where no tokenizer tells it, and a user's own.

    Args:
        own: YAML file of a user's own habits (`reading.habits.read_habits`).

    Raises:
        AnatomyError: as `read_habits`.
    """
    return {
        **{name: habit for name, habit in HABITS.items() if tokens or name != TOKENS},
        **({} if own is None else read_habits(own)),
    }


def prompt_groups(texts: Iterable[Texts]) -> np.ndarray:
    """(n_pairs,) int64, the same number for pairs of one prompt; of pairs without a prompt, for copies.

    Args:
        texts: prompt, chosen and rejected text of each pair.
    """
    keys = (prompt if prompt.strip() else "\0".join(["", *sorted(sides)]) for prompt, *sides in texts)
    hashes = (hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)


@one_blas_thread
def habit_table(  # noqa: PLR0913
    texts: Sequence[Texts],
    habits: Mapping[str, Habit],
    *,
    groups: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    alpha: float = 0.05,
    progress: bool = True,
    values: np.ndarray | None = None,
) -> pa.Table:
    """Count habits on both sides and test whether they differ.

    The difference is the mean over pairs of chosen minus rejected, with the t-test and interval of `stats.mean_test`:
    errors are robust to what pairs of one prompt share, so copies of a pair tell no more than one. q is of all habits
    that vary (Benjamini and Hochberg). Rates have Wilson intervals, means t intervals, over prompts alike. With fewer
    than 20 prompts nothing is claimed, and no test or interval is given.

    Args:
        texts: prompt, chosen and rejected text of each pair; each is read once, and a few again for snippets.
        habits: name -> habit.
        groups: (n_pairs,) prompt of each pair; default `prompt_groups` of the texts.
        tokens: (n_pairs, 2) tokens of chosen and rejected, where `habits` holds the habit "tokens".
        rows: (n_pairs,) row of each pair in the dataset, for snippets; default 0, 1, ...
        alpha: q-value up to which a difference is called found.
        progress: show a progress bar.
        values: `habit_values` of the same texts, where they are known already.

    Returns:
        Table of schema HABIT_ROWS in the order of `habits`. Rates are shares, `difference` is in their unit.
    """
    values = habit_values(texts, habits, tokens, progress=progress) if values is None else values
    groups = prompt_groups(texts) if groups is None else groups
    rows = np.arange(len(texts)) if rows is None else rows
    n_groups = len(np.unique(groups))
    few = n_groups < MIN_PROMPTS
    mean, error, p = stats.mean_test(values[0] - values[1], groups)
    if few:
        error, p = np.full_like(error, np.nan), np.full_like(p, np.nan)
    q = stats.benjamini_hochberg(p)
    half = distributions.t.ppf(0.975, max(1, n_groups - 1))
    sides = [_levels(side, habits, groups, few) for side in values]
    found = []
    for k, habit in enumerate(habits.values()):
        verdict = TOO_FEW if few else NO_EVIDENCE
        if not few and q[k] <= alpha:
            verdict = MORE if mean[k] > 0 else LESS
        entry: dict[str, Any] = {
            "habit": habit.name,
            "description": habit.description,
            "says": habit.says,
            "kind": habit.kind,
            "unit": habit.unit,
            "difference": mean[k],
            "difference_low": mean[k] - half * error[k],
            "difference_high": mean[k] + half * error[k],
            "z": mean[k] / error[k] if error[k] > stats.ROUNDING else np.nan,
            "p": p[k],
            "q": q[k],
            "verdict": verdict,
            "snippets": _snippets(habit, texts, rows, values[:, :, k], groups),
        }
        for name, levels in zip(("chosen", "rejected"), sides, strict=True):
            entry |= dict(zip((name, f"{name}_low", f"{name}_high"), levels[k], strict=True))
        found.append(entry)
    return pa.Table.from_pylist(found, schema=HABIT_ROWS)


def habit_values(
    texts: Sequence[Texts],
    habits: Mapping[str, Habit],
    tokens: np.ndarray | None = None,
    *,
    progress: bool = True,
) -> np.ndarray:
    """(2, n_pairs, n_habits) float64: each habit of the chosen and of the rejected responses.

    Args:
        texts, habits, tokens, progress: as `habit_table` takes them.
    """
    values = np.empty((2, len(texts), len(habits)))
    with Progress(len(texts), "Counting habits", "pairs", show=progress) as bar:
        for i, (_, *both) in enumerate(texts):
            values[:, i] = measure(both, habits)
            bar.update()
    if tokens is not None and TOKENS in habits:
        values[:, :, list(habits).index(TOKENS)] = tokens.T
    return values


def _levels(
    values: np.ndarray, habits: Mapping[str, Habit], groups: np.ndarray, few: bool
) -> list[tuple[float, float, float]]:
    """Rate or mean of each habit with its interval; no interval with too few prompts."""
    mean, error, _ = stats.mean_test(values, groups)
    half = distributions.t.ppf(0.975, max(1, len(np.unique(groups)) - 1))
    found = []
    for k, habit in enumerate(habits.values()):
        if few:
            found.append((float(mean[k]), np.nan, np.nan))
        elif habit.kind == "rate":
            found.append(stats.rate_interval(values[:, k] != 0, groups=groups))
        else:
            found.append((float(mean[k]), float(mean[k] - half * error[k]), float(mean[k] + half * error[k])))
    return found


def _snippets(
    habit: Habit, texts: Sequence[Texts], rows: np.ndarray, values: np.ndarray, groups: np.ndarray
) -> list[dict[str, Any]]:
    """Places where a habit shows, on the side that has it more often, in pairs of different prompts.

    Pairs of which the other side lacks it come first, evenly spread over the data; with them the shortest match.
    """
    if habit.kind != "rate":
        return []
    side = int(values[0].mean() < values[1].mean())
    one = np.flatnonzero((values[side] != 0) & (values[1 - side] == 0))
    both = np.flatnonzero((values[side] != 0) & (values[1 - side] != 0))
    candidates = [i for part in (one, both) for i in part[_spread(len(part))]]
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for i in candidates:
        if len(found) == N_SNIPPETS or groups[i] in seen:
            continue
        text = texts[i][1 + side]
        start, end = min(habit.spans(text), key=lambda span: span[1] - span[0], default=(0, 0))
        piece = {
            "row": int(rows[i]),
            "side": ("chosen", "rejected")[side],
            "before": _words(text[:start], AROUND, end=True),
            "match": text[start:end] if end - start <= MATCHED else f"{text[start : start + MATCHED]} …",
            "after": _words(text[end:], AROUND if end else 2 * AROUND),
        }
        found.append(piece)
        seen.add(groups[i])
    return found


def _spread(n: int, most: int = 12) -> np.ndarray:
    """At most so many places, evenly spread over 0 ... n - 1."""
    return ((np.arange(min(n, most)) + 0.5) * max(1.0, n / most)).astype(np.int64)


def _words(text: str, n: int, end: bool = False) -> str:
    """The first (or last) `n` characters or so, whole words, with a mark where something is left out."""
    if len(text) <= n:
        return text
    if end:
        part = text[-n:]
        return "… " + re.sub(r"^\S*\s", "", part)
    part = text[:n]
    return re.sub(r"\s\S*$", "", part) + " …"


def texts_of(pairs: "Pairs") -> Sequence[Texts]:
    """Prompt, chosen and rejected text of every pair, decoded when they are asked for."""
    return LazyTexts(len(pairs), pairs.texts)


def tokens_of(pairs: "Pairs") -> np.ndarray:
    """(n_pairs, 2) int64: tokens of chosen and rejected responses after truncation."""
    return np.diff(pairs.response_bounds).reshape(-1, 2)
