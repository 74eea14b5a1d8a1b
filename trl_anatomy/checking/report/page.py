"""Comparison -> compare.html: predicted against observed, beside `compare.json`, in the look of the audit's page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...audit.findings import MIN_PROMPTS, too_few
from ...audit.folder import write_atomically
from ...audit.predict import FALLS, RISES
from ...audit.report.drawing import WIDTH, place
from ...audit.report.shell import render_page

PAGE = "compare.html"
_SIGN = {RISES: 1, FALLS: -1}


def write_comparison(result: Mapping[str, Any], out: str | Path) -> Path:
    """Write the page of a comparison.

    Args:
        result: what `compare` returns and `compare.json` holds.
        out: file to write.
    Returns:
        Where it was written.
    """
    write_atomically(path := Path(out), render_comparison(result).encode())
    return path


def render_comparison(result: Mapping[str, Any]) -> str:
    """The page as HTML; what its Content-Security-Policy allows: `trl_anatomy.audit.report.shell.render_page`."""
    names = list(result["after"])
    concepts = sorted(result["concepts"], key=lambda c: -abs(c["predicted"] or 0.0))
    held = [row for row in result["rates"] if any(_number(rate[0]) > 0 for rate in row["rates"].values())]
    scatter = {
        "concepts": [[c["concept"], c["label"], c["predicted"], c["ci_low"], c["ci_high"]] for c in concepts],
        "observed": [[list(c["observed"][name]) for c in concepts] for name in names],
    }
    n_prompts = result["sampling"]["n_prompts"]
    return render_page(
        "compare.html",
        __package__,
        ["compare.js"],
        {"data": scatter},
        names=names,
        few=too_few(n_prompts) if n_prompts < MIN_PROMPTS else None,
        audit_name=Path(result["audit"]).name,
        before=Path(result["before"]).name,
        sampling=result["sampling"],
        concepts=[{**c, "met": {name: _met(c, c["observed"][name]) for name in names}} for c in concepts],
        agreement=result["agreement"],
        baselines=sorted({m for figures in result["agreement"].values() for m in figures.get("baselines_r2", {})}),
        piloted=all("pilot_r2" in figures for figures in result["agreement"].values()),
        foretold=all("step_r2" in figures for figures in result["agreement"].values()),
        told=[_told(name, result["agreement"][name], concepts) for name in names],
        rates=[{**row, "moved": _apart(row["rates"]["before"], row["rates"][names[0]])} for row in held],
        n_never=len(result["rates"]) - len(held),
        place=lambda rate: place(rate) or 0.0,
        width=WIDTH,
    )


def _met(concept: Mapping[str, Any], observed: tuple[float, float, float] | list[float]) -> str:
    """What became of a prediction: the audit's verdict, and the 95 % interval of what was observed."""
    _, low, high = observed
    if any(not math.isfinite(_number(value)) for value in (low, high)):
        return "unknown"
    predicted, seen = _SIGN.get(concept["verdict"], 0), 1 if low > 0 else -1 if high < 0 else 0
    if predicted == 0:
        return "none predicted, none seen" if seen == 0 else "not predicted"
    if seen == 0:
        return "too few prompts to tell" if low <= concept["predicted"] <= high else "did not come"
    return "as predicted" if predicted == seen else "the other way"


def _apart(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether two intervals do not touch."""
    return one[2] < other[1] or other[2] < one[1]


def _told(name: str, figures: Mapping[str, Any], concepts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """How many of the predicted shifts came, as the page's first sentence says it."""
    shifts = [c for c in concepts if c["verdict"] in _SIGN]
    met = [_met(c, c["observed"][name]) for c in shifts]
    return {
        "name": name,
        "figures": figures,
        "n_shifts": len(shifts),
        "n_came": met.count("as predicted"),
        "n_against": met.count("the other way"),
        "n_unsure": met.count("too few prompts to tell"),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value
