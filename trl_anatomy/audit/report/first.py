"""The first screen of a page: what sets the two sides apart, in sentences and at most ten findings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..finding_list import HABIT
from ..folder import Audit
from ..habit_words import SHARE
from ..problems import problem_line
from .drawing import SIDES, WIDTH, paired, share_scale
from .explore import excerpt
from .policies import explaining_away, snippet
from .shell import render_part, written

# What is folded under a finding and named beside it; characters of the text in which a concept fires.
N_FOLDED, SEEN = 5, 160


def first_screen(
    audit: Audit,
    sentences: Sequence[str],
    *,
    notes: Sequence[str] = (),
    samples: Mapping[int, dict[str, Any]] | None = None,
    cards: Sequence[str] = (),
) -> Markup:
    """The first section of a page, the same with and without an SAE.

    Audits of earlier versions have no list of findings: there it is sentences alone.

    Args:
        sentences: what the pairs say.
        notes: what a reader should know of the data before any finding.
        samples: row -> tokens and firings, of `sample_views`.
        cards: concepts of which the page has a card.
    """
    habits = {} if audit.habits is None else {row["habit"]: row for row in audit.habits.to_pylist()}
    rows = [] if audit.findings is None else audit.findings.to_pylist()
    shares = [row for row in rows if row["unit"] == SHARE]
    scale = share_scale([row[side] for row in shares for side in SIDES])
    found = []
    for row in rows:
        share, own = row["unit"] == SHARE, max(row[side] for side in SIDES)
        found.append(
            {
                **row,
                "title": _title(row),
                "about": habits.get(row["name"], {}).get("description", "").replace("`", ""),
                "card": row["kind"] != HABIT and row["name"] in cards,
                "share": share,
                "places": paired(row, scale if share else own if own > 0 else 1.0),
                "drawn": " and ".join(f"{side} {written(row[side], row['unit'])}" for side in SIDES),
                "known": not math.isnan(row["difference_low"]),
                "folded": [_folded(other, habits) for other in row["folded"][:N_FOLDED]],
                "more": max(0, len(row["folded"]) - N_FOLDED),
                "place": _habit_place(habits[row["name"]]) if row["kind"] == HABIT else _concept_place(row, samples),
                "policy": explaining_away(row["name"]) if row["kind"] == HABIT else snippet(audit, row["name"]),
            }
        )
    counts = audit.info.get("problems")
    return render_part(
        "first.html",
        __package__,
        sentences=sentences,
        notes=notes,
        problems="" if audit.problems is None or counts is None else problem_line(counts),
        found=found,
        scale=scale if shares else None,
        amounts=len(shares) < len(rows),
        width=WIDTH,
    )


def _title(row: Mapping[str, Any]) -> str:
    """A finding in words: a habit by its name, a concept by its label."""
    return row["name"].replace("_", " ") if row["kind"] == HABIT else row["says"] or row["name"]


def _folded(other: Mapping[str, Any], habits: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    habit = habits.get(other["name"]) if other["kind"] == HABIT else None
    unit = SHARE if habit is None or habit["kind"] == "rate" else habit["unit"]
    return {"title": _title(other), "rates": " / ".join(written(other[side], unit) for side in SIDES)}


def _habit_place(habit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where a habit shows, in pieces with the level of the mark."""
    if not habit["snippets"]:
        return None
    seen = habit["snippets"][0]
    pieces = [(seen["before"], 0), (seen["match"], 2), (seen["after"], 0)]
    return {"side": seen["side"], "row": seen["row"], "pieces": [piece for piece in pieces if piece[0]]}


def _concept_place(row: Mapping[str, Any], samples: Mapping[int, dict[str, Any]] | None) -> dict[str, Any] | None:
    """Where a concept fires most in the first telling pair whose tokens the audit keeps."""
    side = row["favours"]
    for at in row["telling_rows"]:
        fired = (samples or {}).get(at, {}).get("fired", {})
        if side in fired.get(row["name"], {}):
            return {"side": side, "row": at, "pieces": excerpt(dict((samples or {})[at]), row["name"], side, SEEN)}
    return None
