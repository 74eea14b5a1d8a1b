"""Rows that nearly repeat others: MinHash sketches find candidates, the overlap of their texts decides."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np

Sides = tuple[str, str]

# Bytes of a shingle; bands of a sketch, and how many agree before texts are compared; the overlap of near-copies.
SHINGLE, BANDS, AGREE, NEARLY = 5, 16, 6, 0.75
# A word more makes another text of one so short: there half is enough, if both sides together overlap as they should.
SHORT, HALF = 40, 0.5

# Signs of which one more or less makes no other text.
_SIGNS = str.maketrans("", "", ".,;:!?'\"…’‘“”")

_MIX, _MIX_TOO = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


def plain(text: str) -> str:
    """A text whose case and white space do not matter."""
    return " ".join(text.casefold().split())


def shingles(text: str) -> np.ndarray:
    """(n,) uint64: a number for each run of `SHINGLE` bytes of the plain text, without commas and the like."""
    text = text.translate(_SIGNS) or text
    data = np.frombuffer(plain(text).encode("utf-8", "replace"), np.uint8).astype(np.uint64)
    if len(data) < SHINGLE:
        data = np.pad(data, (0, SHINGLE - len(data)))
    n = len(data) - SHINGLE + 1
    runs = np.zeros(n, np.uint64)
    for k in range(SHINGLE):
        runs = runs * np.uint64(257) + data[k : k + n]
    runs = (runs ^ (runs >> np.uint64(29))) * _MIX
    return runs ^ (runs >> np.uint64(32))


def sketch(text: str) -> np.ndarray:
    """(BANDS,) uint64 MinHash of the shingles, by one hash in as many bins; an empty bin takes from the next.

    The share of bands in which two texts agree estimates their overlap.
    """
    runs = shingles(text)
    least = np.full(BANDS, _EMPTY)
    np.minimum.at(least, (runs >> np.uint64(60)).astype(np.int64), runs)
    filled = np.flatnonzero(least != _EMPTY)
    return least[filled[np.searchsorted(filled, np.arange(BANDS)) % len(filled)]]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of two sets of shingles, each sorted and without repeats."""
    n_shared = len(np.intersect1d(one, other, assume_unique=True))
    return n_shared / (len(one) + len(other) - n_shared)


def nearly_same(mine: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> bool:
    """Whether the responses of two pairs, as sets of shingles in the same order, are nearly the same."""
    n_shared = n_all = 0.0
    for one, other in zip(mine, theirs, strict=True):
        shared = overlap(one, other)
        if shared < (HALF if min(len(one), len(other)) < SHORT else NEARLY):
            return False
        together = (len(one) + len(other)) / (1 + shared)
        n_shared, n_all = n_shared + shared * together, n_all + together
    return n_shared >= NEARLY * n_all - 1e-9


def near_copies(
    prompts: np.ndarray,
    read: Callable[[np.ndarray], Iterator[Sides]],
    read_one: Callable[[int], Sides],
    skip: np.ndarray,
) -> Iterator[tuple[int, int, bool]]:
    """Rows of one prompt whose two responses are nearly those of an earlier row.

    Work and memory grow with the rows: within a bucket of alike sketches a row is compared with the first row and
    with the one before it.

    Args:
        prompts: (n,) the same number for rows of one prompt.
        read: rows -> the two responses of each.
        read_one: a row -> its two responses.
        skip: (n,) bool: rows to leave alone, such as exact copies.

    Yields:
        row, an earlier row, and whether chosen and rejected stand the other way round there; a row once.
    """
    _, of, size = np.unique(np.where(skip, -1, prompts), return_inverse=True, return_counts=True)
    rows = np.flatnonzero((size[of.reshape(-1)] > 1) & ~skip)
    if not len(rows):
        return
    sketches = np.array([[sketch(side) for side in sides] for sides in read(rows)])
    sketches.sort(axis=1)  # the same key, whichever is chosen
    keys = sketches[:, 0] * _MIX ^ sketches[:, 1] * _MIX_TOO ^ prompts[rows, None].astype(np.uint64)
    candidates: set[tuple[int, int]] = set()
    for band in range(BANDS):
        order = np.argsort(keys[:, band], kind="stable")
        new = np.r_[True, np.diff(keys[order, band]) != 0]
        starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        same = np.flatnonzero(~new)
        for at in (same - 1, starts[same]):
            alike = (keys[order[same]] == keys[order[at]]).sum(axis=1) >= AGREE
            candidates.update(zip(rows[order[same[alike]]].tolist(), rows[order[at[alike]]].tolist(), strict=True))

    @lru_cache(maxsize=256)
    def known(row: int) -> tuple[np.ndarray, np.ndarray]:
        sides = read_one(row)
        return np.unique(shingles(sides[0])), np.unique(shingles(sides[1]))

    found: set[int] = set()
    for row, other in sorted(candidates):
        if row in found or row == other:
            continue
        mine, theirs = known(row), known(other)
        for swapped in (False, True):
            if nearly_same(mine, theirs[::-1] if swapped else theirs):
                found.add(row)
                yield row, other, swapped
                break
