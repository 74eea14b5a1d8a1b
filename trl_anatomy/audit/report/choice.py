"""What the choice is made of, on the page: accuracy by source as bars, and the habits that carry it."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..choice import CHANCE
from ..choice_words import NAMES, choice_sentences, folded_names
from .shell import render_part

# The axis of accuracies in the drawing's own units, and the share at its left end.
WIDTH, LEAST = 200.0, 0.4
# Odds beyond which the number says no more.
MOST_ODDS = 100.0


def choice_part(choice: Mapping[str, Any], *, listed: bool = False) -> Markup:
    """The part of a page on `choice.choice_of`.

    Args:
        listed: whether the audit lists findings: these say what carries the choice, and the first sentences of the
            page how much of it each source tells, so neither is said again here.
    """
    carried = [] if listed else choice["carried_by"]
    return render_part(
        "choice.html",
        __package__,
        sentences=[] if listed and choice["sources"] else choice_sentences(choice),
        sources=[_shown(entry) for entry in choice["sources"]],
        carried=[{**row, "folded": folded_names(row["with_it"]), "times": _odds(row["odds"])} for row in carried],
        width=WIDTH,
        middle=_place(0.5),
        pairs=choice["pairs"],
        drawn=choice.get("drawn", False),
    )


def _shown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A source with the places of its bar, which begins at 50 %."""
    start, end = sorted((_place(0.5), _place(entry["accuracy"])))
    return {
        **entry,
        "title": NAMES.get(entry["source"], entry["source"]),
        "chance": entry["verdict"] == CHANCE,
        "start": start,
        "width": round(end - start, 1),
        "low": _place(entry["accuracy_low"]),
        "high": _place(entry["accuracy_high"]),
    }


def _place(share: float) -> float:
    return round(WIDTH * min(1.0, max(0.0, (share - LEAST) / (1 - LEAST))), 1)


def _odds(odds: float) -> str:
    """Odds for the side that a habit speaks for.

    >>> _odds(0.25), _odds(12.3), _odds(1e9)
    ('4.0 : 1', '12 : 1', '> 100 : 1')
    """
    odds = max(odds, 1 / odds) if odds > 0 else float("inf")
    if odds > MOST_ODDS:
        return f"> {MOST_ODDS:.0f} : 1"
    return f"{odds:.1f} : 1" if odds < 9.95 else f"{odds:.0f} : 1"
