"""What the page's scripts show: concepts, contexts, hypotheses, and the pairs that it can carry."""

import math
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ...reading.habits import ALSO, HABITS
from ...reading.progress import Progress
from ..concept_words import LEANS, NOT_SIGNIFICANT
from ..finding_list import CONCEPT as CONCEPT_KIND
from ..finding_list import HABIT
from ..folder import Audit
from ..row_texts import RowTexts
from ..shown import CONTEXT_RATES, RATES

N_PAIRS = 10_000  # pairs carried; the folder holds all
N_HYPOTHESES = 5_000  # hypotheses carried
TEXT = 12_000_000  # characters of text carried, samples apart
CUTS = (4000, 2000, 1000, 500, 250)  # characters of a text carried: the first of these that fits

HYPOTHESIS = (
    "context",
    "concept",
    "lean",
    "mean_in",
    "mean_out",
    "delta",
    "ci_low",
    "ci_high",
    "q",
    "n_in",
    "kept",
    "differs",
    "folded_under",
    *CONTEXT_RATES,
)
CONCEPT = (
    "concept",
    "kind",
    "label",
    "verdict",
    "predicted",
    "ci_low",
    "ci_high",
    "length_adjusted",
    "q",
    "differ",
    "n_features",
    "telling_rows",
    *RATES,
)
_NAMED = ("told", "words")
PAIR = ("row", "contexts", "concepts", "scores")
_SIDES = ("prompt", "chosen", "rejected")


def explore_data(audit: Audit, snippets: dict[str, str]) -> dict[str, Any]:
    """Concepts, contexts and hypotheses as columns and rows.

    Args:
        snippets: policies with signs in place of the names of concept and context: "all", "feature", "prompt".
    """
    places = audit.info.get("maps", {})
    described = audit.info.get("contexts", {})
    tested = audit.hypotheses
    kept, rank, delta, differs = (tested[name].to_numpy() for name in ("kept", "rank", "delta", "differs"))
    order = np.lexsort((-np.abs(delta), np.nan_to_num(rank), ~differs, ~kept))[:N_HYPOTHESES]
    hypotheses = tested.take(order).select(HYPOTHESIS).to_pylist()
    # The two kinds have different units, so each is in the order of its own shifts.
    concepts = [
        concept
        for table in (audit.concepts, audit.responses)
        for concept in sorted(audit.labelled(table).to_pylist(), key=lambda c: -abs(c["predicted"] or 0))
    ]
    plain = _plain_names(audit)
    return {
        "n_pairs": audit.pairs.num_rows,
        "alpha": audit.info["settings"]["alpha"],
        "leans": LEANS,
        "not_significant": NOT_SIGNIFICANT,
        "n_hypotheses": tested.num_rows,
        "concepts": {
            "columns": (*CONCEPT, *_NAMED, "habits"),
            "rows": [
                [*(c[key] for key in CONCEPT), *_named(audit, c["concept"], c["terms"]), plain.get(c["concept"], "")]
                for c in concepts
            ],
        },
        "contexts": {
            "columns": ("context", "pairs", "terms", *_NAMED),
            "rows": [
                [name, entry["pairs"], audit.about(name), *_named(audit, name, entry["terms"])]
                for name, entry in described.items()
            ],
        },
        "hypotheses": {
            "columns": HYPOTHESIS,
            "rows": [[h[key] for key in HYPOTHESIS] for h in hypotheses],
        },
        "places": places,
        "snippets": snippets,
    }


def _named(audit: Audit, name: str, terms: list[str]) -> list[str]:
    """What is said of a label, and what a search looks in."""
    label = audit.labels.get(name)
    return ["", " ".join(terms)] if label is None else [label.told(terms[:4]), label.words(terms)]


def _plain_names(audit: Audit) -> dict[str, str]:
    """Concept -> plain names of the habits that it agrees with, or that it is folded under as a finding."""
    habits: dict[str, set[str]] = {}
    for row in (*audit.concepts.to_pylist(), *audit.responses.to_pylist()):
        if row["evidence"] is not None and row["evidence"]["habit"]:
            habits.setdefault(row["concept"], set()).add(row["evidence"]["habit"])
    for row in [] if audit.findings is None else audit.findings.to_pylist():
        group = [row, *row["folded"]]
        names = {each["name"] for each in group if each["kind"] == HABIT}
        for each in group:
            if each["kind"] == CONCEPT_KIND:
                habits.setdefault(each["name"], set()).update(names)
    return {concept: " ".join(map(_plain, sorted(names))) for concept, names in habits.items()}


def _plain(habit: str) -> str:
    """A habit's name, its other names, and what is counted."""
    known = HABITS.get(habit)
    names = [habit, *(other for other, name in ALSO.items() if name == habit)]
    return " ".join([*(name.replace("_", " ") for name in names), known.description if known else ""])


def pair_data(audit: Audit, held: RowTexts | None, samples: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The pairs that the page carries, with their texts as far as these fit.

    All pairs of a small audit; of a larger one the samples and telling rows, and others evenly spread.

    Args:
        held: texts of the audited pairs; without them pairs have no text but that of the samples.
        samples: row -> tokens and firings, of `sample_views`.
    """
    carried = _carried(audit, samples)
    table = audit.pairs.take(carried).select(PAIR)
    rows = [list(pair.values()) for pair in table.to_pylist()]
    texts, cut = _texts(held, [row[0] for row in rows], set(samples))
    return {
        "columns": (*PAIR, *_SIDES),
        "rows": [[*row, *text] for row, text in zip(rows, texts, strict=True)],
        "cut": cut,
        "samples": samples,
    }


def _carried(audit: Audit, samples: dict[int, dict[str, Any]]) -> np.ndarray:
    """Places in the table of pairs, ascending."""
    rows = audit.pairs["row"].to_numpy()
    if len(rows) <= N_PAIRS:
        return np.arange(len(rows))
    telling = [pc.list_flatten(table["telling_rows"]).to_numpy() for table in (audit.concepts, audit.responses)]
    first = np.flatnonzero(np.isin(rows, np.concatenate([list(samples), *telling])))[:N_PAIRS]
    others = np.setdiff1d(np.arange(len(rows)), first)
    spread = others[np.linspace(0, len(others) - 1, N_PAIRS - len(first)).astype(np.int64)]
    return np.union1d(first, spread)


def _texts(texts: RowTexts | None, rows: list[int], sampled: set[int]) -> tuple[list[list[str | None]], int]:
    """Prompt, chosen and rejected of each row, cut where all together are too long; samples carry tokens instead."""
    if texts is None:
        return [[None, None, None] for _ in rows], CUTS[0]
    found = []
    with Progress(len(rows), "Reading texts for the page", "pairs") as bar:
        for row in rows:
            found.append([text[: CUTS[0]] for text in texts.of(row)])
            bar.update()
    lengths = np.array([[len(text) for text in held] for held in found])
    cut = next((cut for cut in CUTS if np.minimum(lengths, cut).sum() <= TEXT), CUTS[-1])
    shown = [[None if row in sampled else text[:cut] for text in held] for row, held in zip(rows, found, strict=True)]
    return shown, cut


def sample_views(audit: Audit) -> dict[int, dict[str, Any]]:
    """Row -> token texts of each span, and concept -> span -> [tokens, levels]: how much of the concept fires there.

    A level is 1, 2 or 3: thirds of the largest share of the concept's features that fires on one token of the pair.
    """
    found: dict[int, dict[str, Any]] = {}
    for sample in [] if audit.samples is None else audit.samples.to_pylist():
        fired: dict[str, dict[str, list[list[int]]]] = {}
        top: dict[str, float] = {}
        for entry in sample["fired"]:
            top[entry["concept"]] = max(top.get(entry["concept"], 0.0), *entry["share"])
        for entry in sample["fired"]:
            levels = np.ceil(3 * np.array(entry["share"]) / top[entry["concept"]] - 1e-6).astype(int)
            fired.setdefault(entry["concept"], {})[entry["span"]] = [entry["tokens"], levels.tolist()]
        found[sample["row"]] = {**{side: sample[side] for side in _SIDES}, "fired": fired}
    return found


def marked(sample: dict[str, Any], concept: str, side: str) -> list[tuple[str, int]]:
    """A text in pieces with the level at which the concept fires there; 0 where it does not.

    >>> sample = {"chosen": ["a", " b", " c"], "fired": {"T1": {"chosen": [[1], [3]]}}}
    >>> marked(sample, "T1", "chosen")
    [('a', 0), (' b', 3), (' c', 0)]
    """
    levels = np.zeros(len(sample[side]), dtype=int)
    tokens, level = sample["fired"].get(concept, {}).get(side, ([], []))
    levels[tokens] = level
    pieces: list[tuple[str, int]] = []
    for text, here in zip(sample[side], levels.tolist(), strict=True):
        if pieces and pieces[-1][1] == here:
            pieces[-1] = (pieces[-1][0] + text, here)
        else:
            pieces.append((text, here))
    return pieces


def excerpt(sample: dict[str, Any], concept: str, side: str, n_characters: int) -> list[tuple[str, int]]:
    """The stretch of a text in which the concept fires most, as `marked` gives it, with an ellipsis where it is cut.

    Args:
        n_characters: about as many, counted in whole tokens of mean length.
    """
    n = len(sample[side])
    n_tokens = math.ceil(n_characters * n / max(1, sum(map(len, sample[side]))))
    levels = np.zeros(n)
    tokens, level = sample["fired"].get(concept, {}).get(side, ([], []))
    levels[tokens] = level
    total = np.concatenate([[0.0], np.cumsum(levels)])
    starts = np.arange(max(1, n - n_tokens + 1))
    start = int(starts[np.argmax(total[np.minimum(starts + n_tokens, n)] - total[starts])])
    part = {
        side: sample[side][start : start + n_tokens],
        "fired": {
            concept: {
                side: [
                    [t - start for t in tokens if start <= t < start + n_tokens],
                    [at for t, at in zip(tokens, level, strict=True) if start <= t < start + n_tokens],
                ]
            }
        },
    }
    shown = marked(part, concept, side)
    return [*([("… ", 0)] if start else []), *shown, *([(" …", 0)] if start + n_tokens < n else [])]
