"""The page of an audit that counted habits alone."""

from pathlib import Path

from ..concept_words import HELD
from ..finding_words import what_pairs_say
from ..text_folder import TextAudit
from .by_prompt import by_prompt_section
from .choice import choice_part
from .first import first_screen
from .habits import habits_section
from .policies import habit_policy
from .problems import problems_section
from .shell import number, render_page

# Settings that a count of habits reads.
_SETTINGS = (
    "dataset",
    "dataset_split",
    "dataset_subset",
    "datasets",
    "model",
    "max_length",
    "truncation",
    "habits",
    "alpha",
    "eval_dataset",
)


def render_text_page(audit: TextAudit) -> str:
    """The page as HTML; what its Content-Security-Policy allows: `shell.render_page`."""
    info, rows = audit.info, audit.habits.to_pylist()
    listed = audit.findings is not None and audit.findings.num_rows > 0
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
        first=first_screen(audit, what_pairs_say(audit)),
        choice=choice_part(info["choice"], listed=audit.findings is not None) if "choice" in info else "",
        habits=habits_section(audit.habits, info["settings"]["alpha"], tokens=audit.reads_tokens, listed=listed),
        by_prompt=by_prompt_section(audit),
        problems=problems_section(audit),
        snippet="" if listed else habit_policy(rows),
        held=HELD,
        notes=info.get("notes", []),
        settings={key: info["settings"][key] for key in _SETTINGS if info["settings"].get(key) is not None},
    )
