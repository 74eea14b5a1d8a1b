"""The page of plots of all studies on record, the picture of docs/results, and every table that `tables.py` makes.

Reads the files of results and writes `benchmarks/results/studies.html` (plots within, no script), `docs/studies.svg`
and, between their marks in README.md and docs/results, the tables; measures nothing. A test holds pages to the files.

    python benchmarks/studies/page.py
"""

import argparse
import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import BOTH, ODDS, RESULTS, ROOT, filled, pages, read

from trl_anatomy.reading.habits import HABITS

PICTURE = ROOT / "docs" / "studies.svg"
ROLES = {"rewarded": "#c2410c", "punished": "#1d4ed8", "neutral": "#6b7280", "of one topic": "#15803d"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Studies</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2em auto; padding: 0 1em }}
body {{ color: #111; background: #fff }}
img {{ max-width: 100% }} p.made {{ color: #555; font-size: 13px }}
</style></head><body><h1>Studies</h1>
<p>What the software can and cannot do, on cases with known truth. Each figure names the file of results that it shows
and the command that made it; what the studies are, and tables: docs/results; what fails and
why: <a href="../../docs/limits.md">limits</a>. Drawn by <code>python benchmarks/studies/page.py</code>.</p>
{body}
</body></html>
"""


def scatter(axes: Axes, told: Any, seen: Any, **style: Any) -> None:
    """Predicted against observed, with the line on which both are one."""
    axes.scatter(told, seen, linewidths=0, **style)
    axes.axline((0, 0), slope=1, color="#9ca3af", linewidth=0.8, zorder=0)
    axes.axhline(0, color="#e5e7eb", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#e5e7eb", linewidth=0.8, zorder=0)


def role_of(row: dict[str, Any]) -> str:
    return "of one topic" if row["role"].startswith("in ") else row["role"]


def predicted_habits(axes: Axes, found: dict[str, Any]) -> None:
    """Planted habits of all worlds: shift of the best latent in the pairs, shift of the rate under plain DPO."""
    for role, colour in ROLES.items():
        rows = [row for seed in found["seeds"].values() for row in seed["rows"] if role_of(row) == role]
        told = [100 * row["predicted"] for row in rows]
        seen = [100 * (row["dpo"] - row["start"]) for row in rows]
        scatter(axes, told, seen, color=colour, s=22, label=f"{role} ({len(rows)})")
    axes.set_xlabel("the audit, before training: points, chosen − rejected")
    axes.set_ylabel("plain DPO: points, after − before")
    axes.legend(frameon=False, fontsize=8)


def recoveries(found: dict[str, Any]) -> dict[str, list[float]]:
    """Rule -> recovery of every habit and world, the best rule (nearest to 1) last."""
    rules: dict[str, list[float]] = {}
    for seed in found["seeds"].values():
        for rule, of in seed["rules"].items():
            rules.setdefault(rule, []).extend(one["recovery"] for one in of.values() if "recovery" in one)
    whole = max(map(len, rules.values()))
    return dict(
        sorted(
            ((rule, values) for rule, values in rules.items() if 2 * len(values) >= whole),
            key=lambda item: -abs(float(np.median(item[1])) - 1),
        )
    )


def verbs(axes: Axes, found: dict[str, Any]) -> None:
    """Recovery of each habit and world under each rule."""
    rules = recoveries(found)
    for y, values in enumerate(rules.values()):
        axes.plot(values, [y] * len(values), "o", color="#c2410c", markersize=4, alpha=0.5, markeredgewidth=0)
        axes.plot([float(np.median(values))], [y], "|", color="black", markersize=12)
    axes.set_yticks(range(len(rules)), list(rules), fontsize=8)
    axes.axvline(0, color="#9ca3af", linewidth=0.8, zorder=0)
    axes.axvline(1, color="#15803d", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlabel("recovery: 0 plain DPO's rate, 1 the start model's")


@contextmanager
def drawn(width: float, height: float, columns: int = 1, **ratios: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes. Texts stay texts, and the same results give the same bytes."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "studies", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, columns, **ratios)


def svg(figure: Figure) -> str:
    # The layout's solver differs in the last digit from time to time, and names of clips are hashes of positions.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position().bounds, 6).tolist())
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def prediction_figure(found: dict[str, Any]) -> str:
    with drawn(9, 4.2, 2) as (figure, (left, right)):
        predicted_habits(left, found)
        left.set_title("planted habits")
        names = {
            ("concepts", "mean disparity"): "all concepts",
            ("concepts of 4 or more", "mean disparity"): "concepts of 4 latents or more",
            ("concepts", ODDS): "all concepts, by log-odds",
            ("prompt view, inside, reported", "r2"): "prompt view, reported",
            ("prompt view, inside, tested", "r2"): "prompt view, all tested",
            ("concepts", "random clusters of the same sizes"): "random clusters",
            ("concepts", BOTH): "ceiling by noise, all concepts",
            ("concepts", "baseline: correlation with the longer response"): "baseline: length",
            ("concepts", "baseline: how often the concept fires"): "baseline: frequency",
        }
        for y, (part, name) in enumerate(names):
            values = [seed[part][name] for seed in found["seeds"].values()]
            right.plot(values, [y] * len(values), "o", color="#c2410c", markersize=4, alpha=0.6, markeredgewidth=0)
        right.set_yticks(range(len(names)), list(names.values()))
        right.invert_yaxis()
        right.set_xlim(-0.03, 1.03)
        right.set_xlabel("R² of predicted with observed shifts; a dot a world")
        return svg(figure)


def verbs_figure(found: dict[str, Any]) -> str:
    with drawn(9, 0.28 * len(recoveries(found)) + 1) as (figure, axes):
        verbs(axes, found)
        return svg(figure)


def matrix_figure(found: dict[str, Any]) -> str:
    """Target x habit of every rule: points from plain DPO, mean over the worlds."""
    matrix = found["matrix"]
    habits, rules = matrix["habits"], matrix["rules"]
    targets = list(dict.fromkeys(target for of in rules.values() for target in of))
    with drawn(13, 0.2 * len(rules) + 1.6, len(targets), sharey=True) as (figure, panels):
        for axes, target in zip(panels, targets, strict=True):
            shown = np.full((len(rules), len(habits)), np.nan)
            for y, of in enumerate(rules.values()):
                if target in of:
                    shown[y] = np.mean([seed["points"] for seed in of[target].values()], axis=0)
            image = axes.imshow(shown, cmap="RdBu_r", vmin=-50, vmax=50, aspect="auto")
            axes.set_xticks(range(len(habits)), habits, rotation=90, fontsize=7)
            axes.set_yticks(range(len(rules)), list(rules), fontsize=7)
            axes.set_title(f"rules against {target}", fontsize=9)
        figure.colorbar(image, ax=panels, label="points from plain DPO", shrink=0.6)
        return svg(figure)


def dots(axes: Axes, rows: dict[str, dict[str, list[float]]]) -> None:
    """A row for each name, a colour for each of its series, a dot a world."""
    colours = ("#c2410c", "#1d4ed8", "#15803d", "#6b7280")
    for y, series in enumerate(rows.values()):
        for colour, (name, values) in zip(colours, series.items(), strict=False):
            label = name if y == 0 else None
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.7, markeredgewidth=0, label=label)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def rows_figure(*columns: str) -> Callable[[dict[str, Any]], str]:
    """A figure of a study that has rows and shares in columns, for every seed."""

    def figure_of(found: dict[str, Any]) -> str:
        worlds = [seed["rows"] for seed in found["seeds"].values()]
        names = [name for name in worlds[0] if all(name in world for world in worlds)]
        rows = {name: {of: [100 * world[name][of] for world in worlds] for of in columns} for name in names}
        with drawn(9, 0.27 * len(rows) + 0.9) as (figure, axes):
            dots(axes, rows)
            return svg(figure)

    return figure_of


def frontier_figure(found: dict[str, Any]) -> str:
    """Wanted refusals against right answers, everywhere and with a gate, by strength."""
    with drawn(9, 4, len(found["seeds"]), sharey=True) as (figure, panels):
        for axes, (seed, of) in zip(panels, found["seeds"].items(), strict=True):
            rows = {name: row for name, row in of["rows"].items() if name != "start"}
            for colour, gated in (("#c2410c", False), ("#1d4ed8", True)):
                line = [row for name, row in rows.items() if ("in the topic" in name) == gated or name == "plain DPO"]
                line.sort(key=lambda row: abs(row["strength"] or 0))
                x = [100 * row["right answers in the others"] for row in line]
                y = [100 * row["in the topic"] for row in line]
                axes.plot(x, y, "o-", color=colour, label="in the topic only" if gated else "everywhere")
                for row, at in zip(line, zip(x, y, strict=True), strict=True):
                    text = "plain DPO" if row["strength"] is None else f"{abs(row['strength']):.1f}"
                    axes.annotate(text, at, fontsize=7, xytext=(5, 4), textcoords="offset points")
            start = of["rows"]["start"]
            place = 100 * start["right answers in the others"], 100 * start["in the topic"]
            axes.plot(*place, "s", color="#6b7280", label="start model")
            axes.set_title(f"world {seed}", fontsize=9)
            axes.set_xlabel("right answers in the other topics, percent")
        panels[0].set_ylabel("refusals where they are wanted, percent")
        panels[0].legend(frameon=False, fontsize=8, loc="lower left")
        return svg(figure)


TOPICAL = rows_figure("in the topic", "in the others", "right answers")


def real_data_figure(found: dict[str, Any]) -> str:
    """Regular expressions against the audit, for each habit of each set that a concept stands for."""
    verdicts = {"shows up": "#15803d", "quiet, as its counts are": "#6b7280", "missed": "#eab308"}
    verdicts |= {"opposite sign": "#b91c1c", "reported, though its counts do not differ": "#7c3aed"}
    with drawn(6.5, 4.4) as (figure, axes):
        rows = [row for dataset in found["datasets"]["default"].values() for row in dataset["habits"]]
        for verdict, colour in verdicts.items():
            of = [row for row in rows if row["verdict"] == verdict]
            told, seen = [100 * row["difference"] for row in of], [100 * row["predicted"] for row in of]
            axes.scatter(told, seen, color=colour, s=22, linewidths=0, label=f"{verdict} ({len(of)})")
        axes.axhline(0, color="#e5e7eb", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#e5e7eb", linewidth=0.8, zorder=0)
        axes.set_xlabel("counted: points, chosen − rejected")
        axes.set_ylabel("the audit's concept: points")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        return svg(figure)


def real_training_figure(found: dict[str, Any]) -> str:
    """Concepts of real pairs: shift that the audit predicts, and mean shift over the trainings."""
    with drawn(9, 4.2, len(found["prediction"])) as (figure, panels):
        for axes, (name, of) in zip(panels, found["prediction"].items(), strict=True):
            told = [100 * concept["predicted"] for concept in of["concepts"]]
            seen = [100 * np.mean([mean for mean, _, _ in concept["observed"].values()]) for concept in of["concepts"]]
            scatter(axes, told, seen, color="#c2410c", s=10, alpha=0.5)
            r2 = ", ".join(f"{run['r2']:.2f}" for run in of["agreement"].values())
            axes.set_title(f"{name}\nR² {r2}", fontsize=8)
            axes.set_xlabel("predicted, points")
        panels[0].set_ylabel("observed, points")
        return svg(figure)


def foretold_recoveries(axes: Axes, found: dict[str, Any]) -> None:
    """Recovery of the habit that a rule is on, by the first step and after training."""
    told, seen = ([row[f"{what} recovery"] for row in found["rows"]] for what in ("foretold", "observed"))
    scatter(axes, told, seen, color="#c2410c", s=16, alpha=0.6)
    axes.set_xlabel("recovery foretold by the first step")
    axes.set_ylabel("recovery after training")


def foretold_figure(found: dict[str, Any]) -> str:
    """Of every rule: recovery of its habit, and what became of the others, by the first step and by training."""
    with drawn(9, 4.2, 2) as (figure, (left, right)):
        rows = found["rows"]
        foretold_recoveries(left, found)
        left.set_title("recovery of the habit that the rule is on", fontsize=9)
        others = [[name != row["target"] for name in found["habits"]] for row in rows]
        points = (
            np.array([row[f"{what} points"] for row in rows])[np.array(others)] for what in ("foretold", "observed")
        )
        scatter(right, *points, color="#1d4ed8", s=10, alpha=0.5)
        right.set_title("all other habits and right answers, points", fontsize=9)
        right.set_xlabel("foretold by the first step")
        return svg(figure)


def null_figure(found: dict[str, Any]) -> str:
    """How often anything is reported where there is nothing."""
    with drawn(7, 2.2) as (figure, axes):
        shares = found["shares"]
        for y, of in enumerate(shares.values()):
            axes.plot([100 * of["ci_low"], 100 * of["ci_high"]], [y, y], color="#c2410c")
            axes.plot([100 * of["share"]], [y], "o", color="#c2410c", markersize=4)
        axes.axvline(5, color="#15803d", linewidth=0.8, linestyle="--")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, 1, 5, 100], ["0", "1", "5", "100"])
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_xlabel("percent of runs, 95 % interval; dashed: nominal")
        return svg(figure)


def habits_figure(found: dict[str, Any]) -> str:
    """Share of responses on either side, of the three surest habits of each real set."""
    rows: list[tuple[str, float, float]] = []
    for name, kept in found["sets"].items():
        rates = {habit: row for habit, row in kept["differ"].items() if HABITS[habit].kind == "rate"}
        surest = sorted(rates, key=lambda habit: -abs(rates[habit]["z"]))[:3]
        rows += [(f"{name}: {habit}", rates[habit]["chosen"], rates[habit]["rejected"]) for habit in surest]
    with drawn(7.6, 0.21 * len(rows) + 0.8) as (figure, axes):
        names, *sides = zip(*rows, strict=True)
        axes.hlines(range(len(rows)), *([100 * share for share in side] for side in sides), color="#9ca3af", lw=1)
        for side, colour, label in zip(sides, ("#15803d", "#b91c1c"), ("chosen", "rejected"), strict=True):
            axes.plot([100 * share for share in side], range(len(rows)), "o", color=colour, markersize=4, label=label)
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("percent of responses")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return svg(figure)


def choice_figure(found: dict[str, Any]) -> str:
    """Held-out accuracy of the choice in each real set, from length alone and from all named habits."""
    names = list(found["sets"])
    with drawn(7.6, 0.36 * len(names) + 0.9) as (figure, axes):
        for offset, (source, colour) in enumerate((("length", "#6b7280"), ("habits", "#c2410c"))):
            rows = [next(row for row in found["sets"][name]["sources"] if row["source"] == source) for name in names]
            at = [y + 0.24 * (offset - 0.5) for y in range(len(names))]
            low, high = ([100 * row[f"accuracy_{end}"] for row in rows] for end in ("low", "high"))
            axes.hlines(at, low, high, color=colour, linewidth=1.2)
            axes.plot([100 * row["accuracy"] for row in rows], at, "o", color=colour, markersize=4, label=source)
        axes.axvline(50, color="#9ca3af", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("choices told, percent of held-out pairs, with 95 % intervals")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return svg(figure)


def reading_figure(found: dict[str, Any]) -> str:
    """How much of the lists of two halves of each real set is the same, and how often swapped sides list anything."""
    names = list(found["sets"])
    with drawn(7.6, 0.36 * len(names) + 0.9) as (figure, axes):
        for offset, (kind, colour, label) in enumerate(
            (("text", "#c2410c", "habits, the whole set"), ("sae", "#1d4ed8", "with an SAE, 450 pairs"))
        ):
            rows = [(y, found["sets"][name][kind]) for y, name in enumerate(names) if kind in found["sets"][name]]
            if rows:
                at = [y + 0.24 * (offset - 0.5) for y, _ in rows]
                axes.plot(
                    [row["halves"]["jaccard"] for _, row in rows], at, "o", color=colour, markersize=4, label=label
                )
        axes.axvline(0.7, color="#9ca3af", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("share of lines that both halves of the prompts list, mean of ten splits")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        return svg(figure)


SET_COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#6b7280", "#a21caf", "#0e7490")


def real_model_figure(found: dict[str, Any]) -> str:
    """R2 of every rival at the end of each set's first training, over concepts and over named habits."""
    ends = {}
    for name, of in found["sets"].items():
        for seed, doses in of["doses"].items():
            if "end" in doses:
                ends[f"{name}, margin {of['trainings'][seed]['snapshots']['end']['margin']:.1f}"] = doses["end"]
                break
    rivals = list(dict.fromkeys(rival for end in ends.values() for judged in end.values() for rival in judged))
    with drawn(8.6, 0.34 * len(rivals) + 1.1, 2, sharey=True) as (figure, axes):
        for ax, space in zip(axes, ("concepts", "habits"), strict=True):
            for colour, (name, end) in zip(cycle(SET_COLOURS), ends.items()):
                judged = end.get(space, {})
                at = [y for y, rival in enumerate(rivals) if judged.get(rival, {}).get("all") is not None]
                ax.plot([judged[rivals[y]]["all"] for y in at], at, "o", color=colour, markersize=5, label=name)
            ax.set_xlim(-0.03, 1.03)
            ax.set_xlabel(f"R² over all {space}")
        axes[0].set_yticks(range(len(rivals)), rivals, fontsize=8)
        axes[0].invert_yaxis()
        axes[1].legend(frameon=False, fontsize=7, loc="lower right")
        return svg(figure)


def real_rules_figure(found: dict[str, Any]) -> str:
    """Recovery of each habit under each rule, with its interval over prompts; and what moved beside it."""
    names = list(dict.fromkeys(rule for of in found["targets"].values() for rule in of["rules"]))
    with drawn(8.6, 0.3 * len(names) + 1.1, 2, sharey=True) as (figure, (left, right)):
        for colour, (target, of) in zip(cycle(SET_COLOURS), found["targets"].items()):
            for rule, told in of["rules"].items():
                if "refused" in told:
                    continue
                y, (low, high) = names.index(rule), told["recovery, 95 %"]
                left.plot([low, high], [y, y], "-", color=colour, linewidth=1)
                left.plot(told["recovery"], y, "o", color=colour, markersize=5)
                beside = 100 * told["others, mean absolute change from plain DPO"]
                right.plot(beside, y, "o", color=colour, markersize=5)
            left.plot([], [], "o", color=colour, markersize=5, label=target)
        for at in (0, 1):
            left.axvline(at, color="#9ca3af", linewidth=0.8, zorder=0)
        left.set_xlabel("recovery: 0 plain DPO, 1 start model")
        left.set_xlim(-1, 2)
        left.set_yticks(range(len(names)), names, fontsize=8)
        left.invert_yaxis()
        right.set_xlabel("other habits, mean change in points")
        left.legend(frameon=False, fontsize=7, loc="lower left")
        return svg(figure)


def faults_figure(found: dict[str, Any]) -> str:
    """Share of the seeded faults of each kind that were found, over all sets, and the largest share of false alarms."""
    counts: dict[str, list[tuple[int, int, float]]] = {}
    for kept in found["sets"].values():
        parts = [*kept["text"].items(), *kept.get("tokens", {}).items()]
        evident = kept["labels"].get("evident")
        parts += [("improbable_labels", evident)] if isinstance(evident, dict) else []
        for kind, row in parts:
            counts.setdefault(kind, []).append((row["found"], row["put"], row["false_alarm_share"]))
    names = list(counts)
    shares = [100 * sum(row[0] for row in counts[name]) / max(1, sum(row[1] for row in counts[name])) for name in names]
    alarms = [100 * max(row[2] for row in counts[name]) for name in names]
    with drawn(7.6, 0.24 * len(names) + 0.8) as (figure, axes):
        axes.plot(shares, range(len(names)), "o", color="#15803d", markersize=4, label="found")
        axes.plot(alarms, range(len(names)), "o", color="#b91c1c", markersize=4, label="false alarms, worst set")
        axes.axvline(5, color="#9ca3af", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("percent of the seeded faults, and of the other rows (5 % marked)")
        axes.legend(frameon=False, fontsize=8, loc="center")
        return svg(figure)


def sae_figure(found: dict[str, Any]) -> str:
    """Pairs of each source that an SAE was not trained on: variance explained of each span, and cross-entropy lost."""
    spans = {"prompt": "explained, prompts", "chosen": "explained, chosen", "rejected": "explained, rejected"}
    rows = {
        name: {label: [100 * of["variance_explained"][span]] for span, label in spans.items()}
        | {"cross-entropy lost": [100 * of["loss_lost"]]}
        for name, of in found["held_out"]["sources"].items()
    }
    with drawn(9, 0.36 * len(rows) + 0.9) as (figure, axes):
        dots(axes, rows)
        return svg(figure)


def verdicts_figure(found: dict[str, Any]) -> str:
    """What an SAE explains of a real model at least, right and wrong on purpose, and what its reconstruction loses."""
    units = found["units"]
    names = [f"{name}: {unit['verdict']}" for name, unit in units.items()]
    colours = {"fits": "#15803d", "continue training it": "#a16207", "do not use": "#b91c1c"}
    with drawn(9, 0.3 * len(names) + 0.9, 2) as (figure, (left, right)):
        for y, unit in enumerate(units.values()):
            colour = colours[unit["verdict"]]
            shares = [100 * share for share in unit["variance_explained"].values() if share is not None]
            left.plot(shares, [y] * len(shares), "o", color=colour, markersize=4)
            if unit["loss_lost"] is not None:
                right.plot([100 * unit["loss_lost"]], [y], "o", color=colour, markersize=4)
        left.set_xlim(-105, 105)
        left.set_yticks(range(len(names)), names, fontsize=7)
        left.set_xlabel("percent of variance explained: prompt, chosen, rejected")
        right.set_yticks(range(len(names)), [""] * len(names))
        right.set_xlabel("percent of cross-entropy lost")
        left.invert_yaxis()
        right.set_ylim(left.get_ylim())
        return svg(figure)


def picture() -> str:
    """The README's: what was predicted and seen, what the verbs take out, and what is known of that before."""
    with drawn(13, 3.8, 3, width_ratios=[1, 1.1, 0.9]) as (figure, (left, middle, right)):
        predicted_habits(left, read("prediction"))
        left.set_title("what the data will teach, five worlds", loc="left", fontsize=10)
        verbs(middle, read("verbs"))
        middle.set_title("what each verb keeps out", loc="left", fontsize=10)
        foretold_recoveries(right, read("foretold"))
        right.set_title("whether a rule will work", loc="left", fontsize=10)
        return svg(figure)


# Title, name of the file of results, what is seen, figure
FIGURES: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    (
        "Predicted against observed",
        "prediction",
        "Left: each planted habit, the shift of its best latent between chosen and rejected against the shift that DPO "
        "makes in its rate by text rule. Right: how well predictions of all concepts hold.",
        prediction_figure,
    ),
    (
        "Verbs",
        "verbs",
        "A dot is one habit of one world; the bar is the median. Rules nearest to 1 are on top.",
        verbs_figure,
    ),
    (
        "Named habits of real pairs",
        "habits",
        "The three surest habits of each set, as the audit counts them without a model; the control set shows none.",
        habits_figure,
    ),
    (
        "What the choice is made of",
        "choice",
        "How often length alone, and all named habits, tell the chosen response of a held-out pair.",
        choice_figure,
    ),
    (
        "The list of findings, twice",
        "reading",
        "Whether two halves of the prompts list the same findings; the goal is 0.7. The control set lists nothing.",
        reading_figure,
    ),
    (
        "Seeded faults in real pairs",
        "faults",
        "Twenty faults of each kind put into five real sets, read with and without a tokenizer; labels are turned at "
        "pairs whose label is at least 90 % probable.",
        faults_figure,
    ),
    (
        "An SAE made for a model",
        "sae",
        "Pairs of sources that the SAE was not trained on: the share of the variance that it explains, and the "
        "cross-entropy lost when its reconstruction takes the place of the layer's output.",
        sae_figure,
    ),
    (
        "SAEs that are wrong on purpose",
        "sae_verdicts",
        "Each line is an SAE on a real chat model with the verdict it got. Below -100 % is not drawn.",
        verdicts_figure,
    ),
    (
        "The style matrix",
        "verbs",
        "What a rule against one habit does to every other habit and to right answers, against plain DPO.",
        matrix_figure,
    ),
    (
        "Safeguards",
        "safeguards",
        "Refusals in the topic of the gate and in the others, and right answers.",
        TOPICAL,
    ),
    (
        "Refusals where they are wanted",
        "refusals",
        "Refusals stand in place of an answer: in the topic in which they are wanted, and in the others, where they "
        "are over-refusals; and right answers in the others.",
        rows_figure("in the topic", "in the others", "right answers in the others"),
    ),
    (
        "Strength against right answers",
        "refusals",
        "The same: a line joins rules of growing strength, from plain DPO on.",
        frontier_figure,
    ),
    (
        "Reward models",
        "reward_models",
        "Share of held-out pairs in which the better response (with an emoji) gets the higher reward: where the worse "
        "one flatters and where the better one does; and in which flattery wins where both are as good.",
        rows_figure("emoji: disagree", "emoji: agree", "emoji: quality alike"),
    ),
    (
        "Amplification, and what a gate does",
        "amplification",
        "Em dashes in the topic of the gate and in the others, and right answers.",
        TOPICAL,
    ),
    (
        "Controls",
        "controls",
        "Flattery under a rule by SAE latents and under its controls, and right answers.",
        rows_figure("rate", "right answers"),
    ),
    (
        "The audit of real data",
        "real_data",
        "Habits of eight sets of real pairs: the difference of their counts by regular expression, and the shift of "
        "the concept that stands for them.",
        real_data_figure,
    ),
    (
        "Training on real data",
        "real_training",
        "Concepts of an SAE, a point each, in real pairs and after plain DPO of a small real model on them.",
        real_training_figure,
    ),
    (
        "Predictions on a real chat model",
        "real_model",
        "SmolLM2-135M-Instruct after plain DPO with LoRA on real pairs, a dot a set: how well each prediction says "
        "what changed in 64 responses to held-out prompts. Beside them, as noisy as the pilot: what the same training "
        "changed in 64 responses to others.",
        real_model_figure,
    ),
    (
        "Rules on a real chat model",
        "real_rules",
        "SmolLM2-135M-Instruct after DPO with LoRA under a rule each: how much of what plain DPO does to the habit is "
        "taken back, with 95 % intervals over 64 prompts, and what it does to the other habits.",
        real_rules_figure,
    ),
    (
        "What the first step foretells of rules",
        "foretold",
        "A dot is a rule on a habit of a world, on the right one for each other habit: what the first step of training "
        "says before, and what training did (verbs.json).",
        foretold_figure,
    ),
    (
        "Where there is nothing to find",
        "null",
        "Share of runs that report anything on pairs with shuffled sides, and of contexts drawn at random.",
        null_figure,
    ),
)


def page() -> str:
    parts = []
    for title, name, caption, figure in FIGURES:
        found = read(name)
        image = base64.b64encode(figure(found).encode()).decode()
        made = f"{found['command']} · {name}.json · {found['date']} · {found.get('device', 'CPU')}"
        parts.append(
            f"<h2>{escape(title)}</h2><p>{escape(caption)}</p>"
            f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{image}">'
            f'<p class="made">{escape(made)}</p>'
        )
    return PAGE.format(body="\n".join(parts))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (RESULTS / "studies.html").write_text(page(), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
    for file in pages():
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
