"""The first screen of a page: what sets the two sides apart, in sentences and at most ten findings."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..finding_list import HABIT
from ..finding_text import finding_texts
from ..folder import Audit
from ..number_words import SHARE
from ..problems import problem_line
from .drawing import SIDES, WIDTH, paired, share_scale
from .explore import excerpt
from .policies import explaining_away, snippet
from .shell import render_part

# Characters of the text in which a concept fires.
SEEN = 160


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
    for row, text in zip(rows, finding_texts(audit.findings, audit.habits), strict=True):
        own = max(row[side] for side in SIDES)
        habit = habits.get(row["name"]) if row["kind"] == HABIT else None
        found.append(
            {
                "text": text,
                "about": habit["description"].replace("`", "") if habit else row["name"],
                "card": row["name"] in cards,
                "places": paired(row, scale if row["unit"] == SHARE else own if own > 0 else 1.0),
                "place": _habit_place(habit) if habit else _concept_place(row, samples),
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
