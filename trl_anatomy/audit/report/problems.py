"""Problems of the data on a page."""

from markupsafe import Markup

from ..folder import Audit
from ..problems import PROBLEMS, problem_line
from .shell import render_part


def problems_section(audit: Audit) -> Markup:
    """The section on problems: a line, and a table of the kinds that were found; empty where none was looked for."""
    table, counts = audit.problems, audit.info.get("problems", {})
    if table is None:
        return Markup("")
    shown = table.filter(table["example"]).to_pylist()
    found = [
        {
            "name": name,
            "title": PROBLEMS[name].title,
            "about": PROBLEMS[name].about,
            "count": counts[name],
            "share": counts[name] / max(1, audit.info["data"]["n_rows"]),
            "examples": [row for row in shown if row["problem"] == name],
        }
        for name in PROBLEMS
        if counts.get(name)
    ]
    return render_part(
        "problems.html",
        __package__,
        line=problem_line(counts),
        found=sorted(found, key=lambda entry: -entry["count"]),
        none=[PROBLEMS[name].title for name in PROBLEMS if counts.get(name) == 0],
    )
