"""A page of the timings on record: every operation and every cost, with its floor and its goal beside it.

Reads `ops_*.json` and `cost.json` from the results and writes `timings.html` beside them: plain SVG, no script.

    python benchmarks/plots.py
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

LEFT, WIDTH, RIGHT, STEP = 300, 420, 230, 22  # pixels: names, bars, figures; height of a bar's row
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Timings</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em }}
:root {{ color-scheme: light dark }}
svg {{ display: block; max-width: 100%; height: auto }} text {{ font: 12px system-ui, sans-serif; fill: currentColor }}
.bar {{ fill: #7aa6c2 }} .ours {{ fill: #c2410c }} .floor {{ fill: #9ca3af }} .range {{ stroke: currentColor }}
.goal {{ stroke: #15803d; stroke-dasharray: 5 3 }} .limit {{ stroke: #6b7280; stroke-dasharray: 1 3 }}
</style></head><body><h1>Timings</h1>
<p>Bars are medians, lines their range or interval. Operations: milliseconds; grey is the floor, what any implementation
has to do. Costs: time over that of TRL's own (1); dashed green is the goal, dotted grey the floor. Made by
<code>python benchmarks/plots.py</code>.</p>
{body}
</body></html>
"""


@dataclass
class Bar:
    name: str
    value: float
    low: float
    high: float
    text: str
    kind: str = "bar"
    goal: float | None = None
    floor: float | None = None


def chart(bars: Sequence[Bar]) -> str:
    """Horizontal bars as one SVG."""
    largest = max(max(bar.high, bar.goal or 0) for bar in bars)
    scale = WIDTH / largest
    parts = []
    for i, bar in enumerate(bars):
        top, middle = i * STEP, i * STEP + STEP / 2
        ends = [LEFT + value * scale for value in (bar.value, bar.low, bar.high)]
        parts.append(
            f'<text x="{LEFT - 6}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect class="{bar.kind}" x="{LEFT}" y="{top + 4}" width="{ends[0] - LEFT:.1f}" height="{STEP - 8}"/>'
            f'<line class="range" x1="{ends[1]:.1f}" x2="{ends[2]:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<text x="{LEFT + WIDTH + 6}" y="{middle + 4}">{escape(bar.text)}</text>'
        )
        for mark, at in (("goal", bar.goal), ("limit", bar.floor)):
            if at is not None:
                x = LEFT + at * scale
                parts.append(f'<line class="{mark}" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 1}" y2="{top + STEP - 1}"/>')
    height = len(bars) * STEP
    return f'<svg viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img">{"".join(parts)}</svg>'


def operation(row: dict[str, Any]) -> str:
    floors = [name for name in row["milliseconds"] if name.endswith("(floor)")]
    floor = row["milliseconds"][floors[0]]["median"] if floors else None
    bars = []
    for name, found in row["milliseconds"].items():
        text = f"{found['median']:.3g} ms" + (f", {found['median'] / floor:.2f} of the floor" if floor else "")
        kind = "floor" if name in floors else "ours" if name == "ours" else "bar"
        bars.append(Bar(name, found["median"], found["min"], found["max"], text, kind))
    goals = [f"{name}: {goal['figure']:.2f}, {_met(goal)}" for name, goal in row.get("goals", {}).items()]
    title = f"<h3>{escape(row['op'])}</h3><p>{escape(row['what'])}</p>"
    return title + chart(bars) + "".join(f"<p>{escape(goal)}</p>" for goal in goals)


def cost(section: dict[str, Any]) -> str:
    bars = []
    for name, found in section["variants"].items():
        goal, floor = section["goals"].get(name), section["floors"].get(name)
        text = f"{found['ratio']:.3f}"
        if "added_share" in found:
            text += f"; adds {found['added_share']:.2%} by itself"
        if goal is not None:
            text += f"; {_met(goal)}"
        low, high = found["ratio_interval"]
        kind = "bar" if name == "null pair" else "ours"
        bars.append(Bar(name, found["ratio"], low, high, text, kind, None if goal is None else goal["limit"], floor))
    return f"<h3>Over {escape(section['base'])}</h3><p>{escape(section['what'])}</p>{chart(bars)}"


def _met(goal: dict[str, Any]) -> str:
    return "met" if goal["met"] else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="benchmarks/results", help="folder of the results")
    folder = Path(parser.parse_args().results)
    body = []
    for file in [*sorted(folder.glob("ops_*.json")), folder / "cost.json"]:
        found = json.loads(file.read_text())
        where = f"{found['device']}, {found['threads']} thread(s), {found['date']}, {found['command']}"
        body.append(f"<h2>{escape(file.name)}</h2><p>{escape(where)}</p>")
        if file.name == "cost.json":
            body += [cost(section) for section in (*found["reference_pass"], found["training_step"])]
        else:
            body += [operation(row) for row in found["rows"]]
    (folder / "timings.html").write_text(PAGE.format(body="\n".join(body)))


if __name__ == "__main__":
    main()
