"""Habits on a page: the table that every audit of pairs has, and the page of an audit that counted habits alone."""

import math
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from ..concept_words import NOT_SIGNIFICANT, only_uncorrected
from ..habit_table import LESS, MORE, TOO_FEW
from ..number_words import SHARE, apart, between, written
from .drawing import SIDES, WIDTH, both_sides
from .shell import render_part

# Habits shown before the rest is folded, on a page without a list of findings.
N_FIRST = 12


def habits_section(habits: pa.Table, alpha: float, *, tokens: bool, listed: bool = False) -> Markup:
    """The table of habits: drawings, snippets, and what shows no difference.

    Args:
        habits: schema `habit_table.HABIT_ROWS`.
        alpha: q-value up to which a difference is called found.
        tokens: whether the trained tokens were counted, not the dataset's text.
        listed: whether the page lists findings, under which the table is folded.
    """
    rows = [_shown(row, alpha) for row in habits.to_pylist()]
    found = sorted((row for row in rows if row["verdict"] in (MORE, LESS)), key=_order)
    never = [row["title"] for row in rows if row["kind"] == "rate" and not row["chosen"] and not row["rejected"]]
    others = [row for row in rows if row not in found and row["title"] not in never]
    counted = (
        "Counted in the text that template and truncation leave for training."
        if tokens
        else "Counted in the text of the dataset, before any chat template or truncation."
    )
    return render_part(
        "habits.html",
        __package__,
        found=found,
        others=others,
        never=never,
        few=any(row["verdict"] == TOO_FEW for row in rows),
        counted=counted,
        n_first=0 if listed else N_FIRST,
        not_significant=NOT_SIGNIFICANT,
        width=WIDTH,
    )


def _order(row: dict[str, Any]) -> tuple[int, float]:
    """Length first, as much may follow from it; then shares by their difference, then amounts by their z."""
    size = abs(row["difference"]) if row["share"] else abs(row["z"]) if not math.isnan(row["z"]) else math.inf
    return 0 if row["habit"] == "words" else 1 if row["share"] else 2, -size


def _shown(row: dict[str, Any], alpha: float) -> dict[str, Any]:
    """A row with what the template shows."""
    unit = SHARE if row["kind"] == "rate" else row["unit"]
    ends = [row[f"{side}{end}"] for side in SIDES for end in ("", "_high")]
    scale = 1.0 if unit == SHARE else max((end for end in ends if not math.isnan(end)), default=0.0) or 1.0
    told = {side: written(row[side], unit) for side in SIDES}
    low, high = row["difference_low"], row["difference_high"]
    return {
        **row,
        "share": unit == SHARE,
        "title": row["habit"].replace("_", " "),
        "about": row["description"].replace("`", ""),
        "told": told,
        "drawn": f"chosen {told['chosen']} and rejected {told['rejected']}",
        "apart": apart(row["difference"], unit),
        "between": ""
        if math.isnan(row["difference_low"])
        else between(row["difference_low"], row["difference_high"], unit),
        "uncorrected": only_uncorrected(low, high, row["q"], alpha),
        "places": both_sides(row, scale),
    }
