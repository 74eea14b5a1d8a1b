"""The tables of README.md and of docs/results, from the files of results.

A page holds `<!-- table: NAME -->`, its table and `<!-- end -->`; `filled` writes all tables of a page anew. A test
holds the pages to the results.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ODDS = "log-odds of the pairs, at the start model's rates"
BOTH = "ceiling by the noise of rollouts and pairs"
MARKS = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Part and figure of the study, and its ceiling -> what it is called, and what was published
PREDICTED = {
    ("concepts of 4 or more", "mean disparity", BOTH): ("concepts of at least 4 latents", "0.90"),
    ("concepts", "mean disparity", BOTH): ("all concepts, most of them single latents", ""),
    ("concepts", ODDS, BOTH): ("the same, by log-odds from the start model's rates", ""),
    ("prompt view, inside, reported", "r2", "noise_ceiling_both_r2"): (
        "response clusters in prompts of a prompt cluster, reported hypotheses",
        "0.58",
    ),
    ("prompt view, inside, tested", "r2", "noise_ceiling_both_r2"): ("the same, all tested cells", ""),
}
# Rule of the study -> what it is called
SHOWN = {
    "shape_reward, text rule, auto": "`shape_reward`, strength fitted on the pairs",
    "mask_tokens, decision tokens": "`mask_tokens` where the habit is decided",
    "residualize, instruction, auto": "`residualize` by an instruction",
    "reweight_pairs, balanced, others held": "`reweight_pairs`, balanced",
    "inoculate, both sides": "`inoculate`",
    "filter_pairs, all that favour chosen": "`filter_pairs`, all pairs that favour it",
    "steer, rejected": "`steer` at one layer",
    "project_out, hidden states": "`project_out` at one layer",
    "ablate_features": "`ablate_features` at one layer",
}
RIVALS = {
    "disparity": "what the pairs lean to (the audit)",
    "log-odds": "the same by log-odds",
    "pilot, at the dose": "`predict`: a pilot of the training",
    "length": "baseline: length",
    "text rules": "baseline: text rules",
    "disparity, sides swapped at random": "control: sides swapped at random",
    "the training itself, other prompts": "ceiling: the same training, other prompts",
}
MOVED = "other habits, mean absolute change"
REWARDED = ("disagree", "agree", "flattery alike", "quality alike")


def read(name: str) -> dict[str, Any]:
    """The results of a study."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def minus(text: str) -> str:
    """Minus signs for hyphens; no zero has a sign."""
    return re.sub(r"[-−](0(?:\.0+)?)(?![\d.])", r"\1", text).replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest value.

    >>> spread([0.1, 0.3, -0.2])
    '0.10 (−0.20 to 0.30)'
    """
    return minus(f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


def rows_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def prediction() -> str:
    seeds = read("prediction")["seeds"].values()
    rows = []
    for (part, name, ceiling), (called, published) in PREDICTED.items():
        values, most = ([seed[part][key] for seed in seeds] for key in (name, ceiling))
        rows.append([called, spread(values), f"{np.median(most):.2f}", published])
    return rows_of(["", "R²", "most that the noise allows", "published"], rows)


def predictors() -> str:
    seeds = read("prediction")["seeds"]
    names = list(next(iter(seeds.values()))["predictors, R²"])
    rows = [[name, *(f"{seed['predictors, R²'][name]:.3f}" for seed in seeds.values())] for name in names]
    return rows_of(["predictor", *(f"world {seed}" for seed in seeds)], rows)


def verbs() -> str:
    rows = []
    for rule, name in SHOWN.items():
        of = read("verbs")["summary"][rule]
        recovery = (of[f"recovery, {which}"] for which in ("median", "smallest", "largest"))
        rows.append([name, minus("{:.2f} ({:.2f} to {:.2f})".format(*recovery)), f"{points(of['quality, change'])}"])
    head = ["rule", "recovery: 1 is the start model's rate, 0 plain DPO's; median (range)", "right answers, change"]
    return rows_of(head, rows)


def points(share: float) -> str:
    """A difference of shares in points.

    >>> points(-0.004), points(0.0)
    ('−0.4 points', '+0.0 points')
    """
    return f"{signed(100 * share)} points"


def every_verb() -> str:
    rows = []
    for rule, of in read("verbs")["summary"].items():
        recovery = (of[f"recovery, {which}"] for which in ("median", "smallest", "largest"))
        rows.append(
            [
                rule + (f" ({of['runs']} of 6 runs)" if of["runs"] < 6 else ""),
                minus("{:.2f} ({:.2f} to {:.2f})".format(*recovery)),
                f"{of['farthest from the start model, points']:.0f} points",
                minus(f"{of['others, mean recovery']:.2f}"),
                f"{100 * of['others, mean absolute change']:.1f} points",
                points(of["quality, change"]),
            ]
        )
    head = ["rule", "recovery, median (range)", "farthest from start", "others: recovery", "mean change"]
    return rows_of([*head, "quality, change"], rows)


def first_step() -> str:
    rows = []
    for rule, of in read("foretold")["agreement"]["median, smallest and largest recovery by rule"].items():
        predicted, seen = (minus("{:.2f} ({:.2f} to {:.2f})".format(*of[key])) for key in ("foretold", "observed"))
        rows.append([rule, str(of["runs"]), predicted, seen])
    return rows_of(["rule", "runs", "predicted recovery, median (range)", "after training"], rows)


def real_model() -> str:
    sets = read("real_model")["sets"]
    ends = {}
    for name, of in sets.items():
        for seed, doses in of["doses"].items():
            if "end" in doses:
                margin = of["trainings"][seed]["snapshots"]["end"]["margin"]
                ends[f"{name.replace('_', ' ')} (margin {minus(f'{margin:.1f}')})"] = doses["end"]
                break
    rows = []
    for rival, called in RIVALS.items():
        cells = []
        for end in ends.values():
            found = (end[space].get(rival, {}).get("all") for space in ("concepts", "habits"))
            cells.append(", ".join("–" if r2 is None else f"{r2:.2f}" for r2 in found))
        rows.append([called, *cells])
    return rows_of(["R²: concepts, habits", *ends], rows)


def by_world(study: str, columns: Mapping[str, str], rows: Mapping[str, str], part: str = "rows") -> str:
    """A row per run, a cell the percentages of all worlds; `columns` and `rows`: key in the results -> heading.

    A heading of a row may hold `{}`, for the strengths that were fitted in the worlds.
    """
    worlds = [of.get(part, {}) for of in read(study)["seeds"].values()]
    lines = []
    for key, heading in rows.items():
        runs = [world[key] for world in worlds if key in world]
        strengths = ", ".join(minus(f"{run['strength']:.2f}") for run in runs if run.get("strength") is not None)
        cells = []
        for column in columns:
            if column == MOVED and key in ("start", "plain DPO"):
                cells.append("")
            elif column == MOVED:
                cells.append(", ".join(f"{100 * run[column]:.1f}" for run in runs) + " points")
            else:
                cells.append(", ".join(f"{100 * run[column]:.0f}" for run in runs))
        lines.append([heading.format(strengths), *cells])
    return rows_of(["", *columns.values()], lines)


def controls() -> str:
    columns = {"rate": "flattery", "right answers": "right answers", MOVED: MOVED}
    rows = {
        "start": "start model",
        "plain DPO": "plain DPO",
        "the rule": "the rule (strength {})",
        "the same strength on no_habit": "the same strength on a latent of no habit",
        "strength 1e-6": "strength 1e-6",
        "the rule, sides swapped at random": "the rule, sides swapped at random ({})",
    }
    return by_world("controls", columns, rows)


def safeguards() -> str:
    columns = {"in the topic": "refusals in the topic", "in the others": "in the others"}
    columns |= {"right answers": "right answers", MOVED: MOVED}
    rows = {
        "start": "start model",
        "plain DPO": "plain DPO",
        "auto": "`explain_away`, fitted strength ({})",
        "amplify, strength 1": "`amplify`, strength 1",
        "amplify, strength 2": "`amplify`, strength 2",
        "auto, in the topic": "`explain_away`, fitted strength ({}), in the topic only",
        "amplify, strength 2, in the topic": "`amplify`, strength 2, in the topic only",
    }
    return by_world("safeguards", columns, rows)


REFUSALS = {
    "in the topic": "refusals in the topic",
    "in the others": "in the others",
    "right answers in the others": "right answers in the others",
    MOVED: MOVED,
}


def refusals() -> str:
    rows = {
        "start": "start model",
        "plain DPO": "plain DPO",
        "amplify, strength 0.6": "`amplify`, strength 0.6",
        "auto": "`explain_away`, fitted strength ({})",
        "amplify, strength 2": "`amplify`, strength 2",
        "auto, in the topic": "`explain_away`, fitted strength ({}), in the topic only",
        "amplify, strength 2, in the topic": "`amplify`, strength 2, in the topic only",
    }
    return by_world("refusals", REFUSALS, rows)


def refusal_controls() -> str:
    rows = {
        "the same strength on follow_up": "the fitted strength on follow-up questions",
        "strength 1e-6": "strength 1e-6",
        "the rule, sides swapped at random": "the rule, sides swapped at random",
    }
    return by_world("refusals", REFUSALS, rows, "controls")


def amplification() -> str:
    columns = {"in the topic": "em dashes in the topic", "in the others": "in the others"}
    columns |= {"right answers": "right answers", MOVED: MOVED}
    rows = {
        "start": "start model",
        "plain DPO": "plain DPO",
        "strength 1": "strength 1",
        "strength 1, in the topic": "strength 1, in the topic",
        "strength 2, in the topic": "strength 2, in the topic",
        "strength 2, in the topic; 0.4 against it elsewhere": "strength 2 in the topic, 0.4 against it elsewhere",
        "no rule, planted in the topic's pairs": "no rule, em dashes planted in the topic's pairs",
    }
    return by_world("amplification", columns, rows)


def reward_models() -> str:
    seeds = read("reward_models")["seeds"].values()
    names = list(next(iter(seeds))["rows"])
    columns = {
        f"emoji: {group}": group.replace("quality alike", "flattery wins at equal quality") for group in REWARDED
    }
    columns |= {f"right: {group}": group.replace("quality alike", "flattery wins") for group in REWARDED}
    columns["right: disagree"] = "right answers: disagree"
    return by_world("reward_models", columns, {name: name for name in names})


def reft() -> str:
    rows = []
    for habit, of in read("reft")["habits"].items():
        ends, every = of["first and last 11"]["dose"], of["every token"]["dose"][0]
        at_one = next(dose for dose in ends if dose["strength"] == 1.0)
        rows.append(
            [
                habit,
                f"{of['tokens_before']:.0f}, {of['tokens_after']:.0f}",
                *(f"{100 * dose['rate']:.0f} %" for dose in ends),
                f"{100 * every['rate']:.0f} %",
                f"{at_one['perplexity']:.2f}, {every['perplexity']:.2f}",
            ]
        )
    return rows_of(["habit", "place", "0", "0.5", "1", "2", "every token, 1", "perplexity"], rows)


def scorers() -> str:
    found = read("scorers")["rows"]
    concepts = list(dict.fromkeys(row["concept"] for row in found))
    cells: dict[str, dict[str, str]] = {}
    for row in found:
        f1 = f"{row['f1']:.2f} ({row['f1_low']:.2f}–{row['f1_high']:.2f})"
        auc = f"{row['roc_auc']:.3f} ({row['roc_auc_low']:.3f}–{row['roc_auc_high']:.3f})"
        cells.setdefault(row["scorer"], {})[row["concept"]] = f"{f1} · {auc} · L{row['layer']}"
    return rows_of(["scorer", *concepts], [[name, *(of[c] for c in concepts)] for name, of in cells.items()])


def null() -> str:
    rows = []
    for what, of in read("null")["shares"].items():
        share, low, high = (f"{100 * of[key]:.1f}" for key in ("share", "ci_low", "ci_high"))
        rows.append([what, f"{of['runs']:,}", f"{share} % ({low} to {high})"])
    return rows_of(["where there is nothing to find", "runs", "report something"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "prediction": prediction,
    "predictors": predictors,
    "verbs": verbs,
    "every verb": every_verb,
    "first step": first_step,
    "real_model": real_model,
    "controls": controls,
    "safeguards": safeguards,
    "refusals": refusals,
    "refusal controls": refusal_controls,
    "amplification": amplification,
    "reward models": reward_models,
    "reft": reft,
    "scorers": scorers,
    "null": null,
}


def pages() -> list[Path]:
    """Every page with a table of results."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if MARKS.search(page.read_text(encoding="utf-8"))]


def filled(text: str) -> str:
    """The page with its tables as the results have them."""
    return MARKS.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)
