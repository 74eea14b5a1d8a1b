"""Named habits by what is asked, on a page."""

from typing import Any

from markupsafe import Markup

from ..by_prompt_text import by_prompt_texts
from ..folder import Audit
from ..prompt_rules import RULES
from .policies import explaining_away
from .shell import render_part

N_LINES = 8  # lines shown; the table has the rest


def _gate(context: str) -> str:
    return "asks" if context in RULES else "prompts"


def _sides(chosen: str, rejected: str) -> str:
    """Both sides of a number, with a unit in words once.

    >>> _sides("2.4 per 100 words", "1.8 per 100 words"), _sides("75 %", "11 %")
    ('2.4 / 1.8 per 100 words', '75 % / 11 %')
    """
    number, _, unit = chosen.partition(" ")
    once = unit not in ("", "%") and rejected.endswith(f" {unit}")
    return f"{number if once else chosen} / {rejected}"


def by_prompt_section(audit: Audit) -> Markup:
    """The section on habits by prompt; empty for an audit that did not look."""
    table = audit.habit_hypotheses
    if table is None:
        return Markup("")
    # Audits of earlier versions know neither how many prompts a cluster has nor a typical one.
    described = audit.info.get("contexts", {})
    found: list[dict[str, Any]] = [
        {
            "text": text,
            "here": _sides(*text.here),
            "elsewhere": _sides(*text.elsewhere),
            "policy": explaining_away(text.habit, f"{{{_gate(text.context)}: {text.context}}}"),
            "prompts": described.get(text.context, {}).get("prompts"),
            "example": described.get(text.context, {}).get("example"),
        }
        for text in by_prompt_texts(table, N_LINES)
    ]
    n_kept, n_differ = (sum(table[name].to_pylist()) for name in ("kept", "differs"))
    return render_part(
        "by_prompt.html",
        __package__,
        found=found,
        n_kept=n_kept,
        n_folded=n_differ - n_kept,
        n_tested=table.num_rows,
        clusters=audit.has_concepts,
        alpha=f"{audit.info['settings']['alpha']:g}",
    )
