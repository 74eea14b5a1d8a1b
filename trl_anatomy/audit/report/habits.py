"""Habits on a page: the section that every audit has, and the page of an audit that counted habits alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from ...reading.habits import HABITS
from ..habit_table import LESS, MORE, TOO_FEW
from ..habit_words import SHARE, habit_sentences
from ..text_folder import TextAudit
from .choice import choice_part
from .problems import problems_section
from .shell import number, render_page, render_part

# Length of the axis of rates, in the drawing's own units; habits shown before the rest is folded.
WIDTH, N_FIRST = 220.0, 12
# Settings that a count of habits reads.
_SETTINGS = (
    "dataset",
    "dataset_split",
    "dataset_subset",
    "model",
    "max_length",
    "truncation",
    "habits",
    "alpha",
    "eval_dataset",
)


def habits_section(
    habits: pa.Table, n_prompts: int, *, tokens: bool, heading: str = "h1", choice: Mapping[str, Any] | None = None
) -> Markup:
    """The section on habits: sentences, the table with a drawing and snippets, what shows no difference.

    Args:
        habits: schema `habit_table.HABIT_ROWS`.
        n_prompts: prompts of the pairs.
        tokens: whether the trained tokens were counted, not the dataset's text.
        heading: tag of its title.
        choice: what the choice is made of (`choice.choice_of`); None in audits of earlier versions.
    """
    rows = [_shown(row) for row in habits.to_pylist()]
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
        heading=heading,
        sentences=habit_sentences(rows, n_prompts),
        found=found,
        others=others,
        never=never,
        choice="" if choice is None else choice_part(choice),
        few=any(row["verdict"] == TOO_FEW for row in rows),
        counted=counted,
        n_first=N_FIRST,
        width=WIDTH,
    )


def render_text_page(audit: TextAudit) -> str:
    """The page of an audit that counted habits alone, as HTML."""
    info = audit.info
    return render_page(
        "text.html",
        __package__,
        ["text.js"],
        {},
        plots=False,
        info=info,
        data_name=Path(info["data"]["name"]).name,
        model_name=Path(info["model"]["name"]).name,
        left_out=[f"{number(count)} {reason}" for reason, count in info["data"]["left_out"].items()],
        habits=habits_section(
            audit.habits, info["counts"]["n_prompts"], tokens=audit.reads_tokens, choice=info.get("choice")
        ),
        problems=problems_section(audit),
        snippet=habit_policy(audit.habits.to_pylist()),
        notes=info.get("notes", []),
        settings={key: info["settings"][key] for key in _SETTINGS if info["settings"].get(key) is not None},
    )


def habit_policy(rows: Sequence[Mapping[str, Any]]) -> str:
    """A policy that explains away the habit that differs most; empty where none does."""
    found = [row for row in rows if row["verdict"] in (MORE, LESS) and row["kind"] == "rate" and row["habit"] in HABITS]
    if not found:
        return ""
    name = max(found, key=lambda row: abs(row["difference"]))["habit"]
    return (
        f"version: 1\nconcepts:\n  {name}: {{scorer: habit, name: {name}}}\n"
        f"rules:\n  - {{explain_away: {name}, with: shape_reward, strength: auto}}\n"
    )


def _order(row: Mapping[str, Any]) -> tuple[int, float]:
    """Length first, as much may follow from it; then shares by their difference, then amounts by their z."""
    size = abs(row["difference"]) if row["share"] else abs(row["z"]) if not math.isnan(row["z"]) else math.inf
    return 0 if row["habit"] == "words" else 1 if row["share"] else 2, -size


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with what the template shows."""
    share = row["kind"] == "rate" or row["unit"] == SHARE
    ends = [row[f"{side}{end}"] for side in ("chosen", "rejected") for end in ("", "_high")]
    scale = 1.0 if share else max((end for end in ends if not math.isnan(end)), default=0.0) or 1.0

    def place(value: float) -> float | None:
        return None if math.isnan(value) else round(WIDTH * max(0.0, min(1.0, value / scale)), 1)

    return {
        **row,
        "share": share,
        "title": row["habit"].replace("_", " "),
        "about": row["description"].replace("`", ""),
        "known": not math.isnan(row["difference_low"]),
        "places": {
            side: {"at": place(row[side]), "low": place(row[f"{side}_low"]), "high": place(row[f"{side}_high"])}
            for side in ("chosen", "rejected")
        },
    }
