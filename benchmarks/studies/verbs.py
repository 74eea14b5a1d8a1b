"""What each verb of a policy takes out, with each scorer, and what else it changes: on worlds with planted habits.

Plain DPO, and DPO once per rule and habit; then the rates of all habits and of right values in rollouts on held-out
prompts. Recorded for each rule: the habit's rate, its recovery (0 at plain DPO's rate, 1 at the start model's), the
mean absolute change of the other habits and the change of the quality signal against plain DPO; and the style matrix,
which is target x habit of every rule.

Structured concepts are the rules with `given`: on scorers that take a second habit along (the sum of the latents of
two habits; a probe fitted on texts that show both or neither) and on a difference of means. The controls of
`benchmarks/studies/controls.py` are rows as well.

The file of results (`results/verbs.json`):

    matrix: habits    names in the order of all lists below; the last is "correct", the share of right answers
            seeds: <seed>: standard error, at most; moved by plain DPO    lists, in points
            rules: <rule>: <target>: <seed>: points      list: rate less plain DPO's, in points
                                             recovery    list: share of the way back to the start model; null where
                                                         plain DPO moves the habit by less than 10 points, since that
                                                         is a ratio of noise
    off target                  list: rule, target, habit, points by seed, for the habits that a rule against another
                                one moved by more than 3.5 standard errors, mean over the seeds
    summary: <rule>             over seeds and targets, what the table of docs/results/verbs.md tells
    seeds: <seed>: start, plain DPO, rules: <rule>: <target>

    python benchmarks/studies/verbs.py --seeds 0 1
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import REWARDED, controls
from worlds import (
    LEARNING_RATE,
    N_PER_PROMPT,
    N_PROMPTS,
    NAMES,
    RESULTS,
    SIBLINGS,
    TARGETS,
    World,
    concepts,
    kept_file,
    made_by,
    prepared,
    run,
    save,
)

from trl_anatomy.checking.rates import off_target
from trl_anatomy.testbed.language import HABITS, INSTRUCTIONS, question_of

COLUMNS = [*NAMES, "correct"]
MOVED = 10  # points: what plain DPO has to move a habit by, so that a share of it is no ratio of noise
CLEAR = 3.5  # standard errors: less than one of 600 cells of noise lies beyond
STORED = ("direction", "probe", "attention_probe", "both")  # scorers that `worlds.prepared` fits, "both" on two habits
CONTROLS = {"control: strength 1e-6": "controls: sham", "control: a latent of no habit": "controls: no habit"}


def rules(habit: str, readings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on one habit. The concepts they name are those of `concepts`."""

    def away(verb: str, concept: str = habit, **keys: Any) -> list[dict[str, Any]]:
        return [{"explain_away": concept, "with": verb, **keys}]

    seen, direction, gap = f"{habit}_latents", f"{habit}_direction", readings[habit]["gap"]
    others, sibling = [name for name in NAMES if name != habit], SIBLINGS[habit]
    asked = INSTRUCTIONS[habit]
    written = {"from": "gradient", "weights": r"(o_proj|down_proj)\.weight$"}
    return {
        # one of each verb first
        "shape_reward, text rule, auto": away("shape_reward"),
        "reweight_pairs, balanced, others held": away("reweight_pairs", hold=others),
        "filter_pairs, all that favour chosen": away("filter_pairs", above=0),
        "mask_tokens, decision tokens": away("mask_tokens", positions="decided"),
        "inoculate, both sides": away("inoculate", instruction=asked),
        "residualize, instruction, auto": away("residualize", instruction=asked),
        "ablate_features": away("ablate_features", seen),
        "project_out, hidden states": away("project_out", direction),
        "steer, rejected": away("steer", direction, side="rejected", strength=4 * gap),
        "mask_tokens, text rule": away("mask_tokens"),
        "shape_reward, SAE latents, auto": away("shape_reward", seen),
        "shape_reward, difference of means, auto": away("shape_reward", direction),
        "shape_reward, difference of means, given the others": away("shape_reward", "direction_given"),
        "shape_reward, probe, auto": away("shape_reward", "probe"),
        "shape_reward, attention probe, auto": away("shape_reward", "attention_probe"),
        "shape_reward, two latents, auto": away("shape_reward", "two_latents"),
        "shape_reward, two latents, given the sibling": away("shape_reward", "two_latents_given"),
        "shape_reward, two-habit probe, auto": away("shape_reward", "two_probe"),
        "shape_reward, two-habit probe, given the sibling": away("shape_reward", "two_probe_given"),
        "reweight_pairs, two latents, none held": away("reweight_pairs", "two_latents", hold=[]),
        "reweight_pairs, two latents, sibling held": away("reweight_pairs", "two_latents", hold=[sibling]),
        "reweight_pairs, balanced, none held": away("reweight_pairs", hold=[]),
        "inoculate, chosen side": away("inoculate", instruction=asked, side="chosen"),
        "residualize, steered, auto": away("residualize", direction, steer=4 * gap),
        "steer, chosen": away("steer", direction, side="chosen", strength=4 * gap),
        "project_out, gradient": away("project_out", direction, **written),
        "filter_pairs, top 5 %": away("filter_pairs", fraction=0.05),
        "shape_reward, text rule, strength 1": away("shape_reward", strength=1.0),
    }


def scored(world: World, habit: str, readings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Concepts: those of all studies, probes, and two scorers that take the sibling along, with and without `given`."""
    sibling, told = SIBLINGS[habit], concepts(world, habit, readings, folder)
    two = {
        # Summed over tokens too, so that the score is that of one habit plus that of the other
        "two_latents": told[f"{habit}_latents"]
        | {"features": readings[habit]["features"] + readings[sibling]["features"], "reduce": "sum"},
        "two_probe": {"scorer": "probe", "path": str(folder / f"both-{habit}")},
    }
    others = [name for name in NAMES if name != habit]
    return {
        **told,
        "direction_given": told[f"{habit}_direction"] | {"given": others},
        **{kind: {"scorer": kind, "path": str(folder / f"{kind}-{habit}")} for kind in ("probe", "attention_probe")},
        **two,
        **{f"{name}_given": concept | {"given": [sibling]} for name, concept in two.items()},
    }


def figures(habit: str, start: dict[str, float], dpo: dict[str, float], run: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of one rule; its `points` and `recoveries` go into the matrix."""
    if "refused" in run:
        return {"refused": run["refused"]}
    now = run["rates"]
    effects = off_target(start, dpo, {habit: now})[habit]
    others = {name: effects[name]["change"] for name in NAMES if name != habit}
    moved = {name: abs(100 * (dpo[name] - start[name])) >= MOVED for name in COLUMNS}
    record = run["plan"][0] if run["plan"] else {}
    return {
        "rate": now[habit],
        "recovery": effects[habit]["recovery"],
        "points from the start model": 100 * (now[habit] - start[habit]),
        "others, mean recovery": float(np.mean([effects[name]["recovery"] for name in others if moved[name]])),
        "others, mean absolute change": float(np.mean(np.abs(list(others.values())))),
        "others, largest change": max(((change, name) for name, change in others.items()), key=lambda x: abs(x[0])),
        "quality": now["correct"],
        "quality, change": effects["correct"]["change"],
        "strength": record.get("strength"),
        "points": [round(100 * effects[name]["change"], 2) for name in COLUMNS],
        "recoveries": [round(effects[name]["recovery"], 3) if moved[name] else None for name in COLUMNS],
    }


def errors(world: World) -> list[float]:
    """Of each habit, the standard error of a difference of two rates, at most, in points."""
    topics = [question_of(prompt).topic for prompt in world.prompts[:N_PROMPTS]]
    shown = {habit.name: topics.count(habit.topic) for habit in HABITS if habit.topic}
    return [round(100 * math.sqrt(0.5 / (shown.get(name, N_PROMPTS) * N_PER_PROMPT)), 2) for name in COLUMNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--only", default="", help="run only the rules whose name holds this")
    parser.add_argument("--finished", action="store_true", help="train nothing, record the runs that are finished")
    parser.add_argument("--out", default="benchmark-studies", help="folder for worlds and runs; finished ones are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "verbs.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = args.learning_rate
    seeds = {}
    for seed in args.seeds:
        folder = Path(args.out) / str(seed)
        world, readings = prepared(folder, seed)
        start = run(folder, "start", world, seed, rate, None)["rates"]
        dpo = run(folder, "plain DPO", world, seed, rate, None)["rates"]
        found: dict[str, Any] = {}
        for name in rules(TARGETS[0], readings):
            for habit in TARGETS:
                finished = kept_file(folder, rate, f"{habit}: {name}").is_file()
                if args.only not in f"{habit}: {name}" or (args.finished and not finished):
                    continue
                rule = rules(habit, readings)[name]
                policy = {"version": 1, "concepts": scored(world, habit, readings, folder), "rules": rule}
                done = run(folder, f"{habit}: {name}", world, seed, rate, policy)
                found.setdefault(name, {})[habit] = figures(habit, start, dpo, done)
        if not (args.finished or args.only):
            controls(folder, world, readings)
        for name, kept in CONTROLS.items():
            file = kept_file(folder, rate, kept)
            if file.is_file() and args.only in name:
                found[name] = {REWARDED: figures(REWARDED, start, dpo, json.loads(file.read_text()))}
        seeds[str(seed)] = {
            "start": start,
            "plain DPO": dpo,
            "standard error of a change, at most, points": errors(world),
            "scorers' held-out F1": {
                name: json.loads((folder / name / "card.json").read_text())["held_out"]["f1"]
                for name in (f"{kind}-{habit}" for kind in STORED for habit in TARGETS)
            },
            "latents' phi": {habit: readings[habit]["phi"] for habit in TARGETS},
            "rules": found,
        }
    command = f"python benchmarks/studies/verbs.py --seeds {' '.join(map(str, args.seeds))}"
    told = matrix(seeds)
    results = {"learning rate": rate, "summary": summary(seeds), "matrix": told, "off target": moved_along(told)}
    save(args.results, made_by(command) | results | {"seeds": seeds})
    print("\n\n".join((markdown(results["summary"]), matrix_markdown(told), *map(str, results["off target"]))))


def matrix(seeds: dict[str, Any]) -> dict[str, Any]:
    """The style matrix; its form is told above. Takes `points` and `recoveries` out of the seeds' rules."""
    told: dict[str, Any] = {}
    for seed, one in seeds.items():
        for rule, rows in one["rules"].items():
            for target, row in rows.items():
                if "refused" not in row:
                    cell = {"points": row.pop("points"), "recovery": row.pop("recoveries")}
                    told.setdefault(rule, {}).setdefault(target, {})[seed] = cell
    return {
        "habits": COLUMNS,
        "seeds": {
            seed: {
                "standard error, at most": one.pop("standard error of a change, at most, points"),
                "moved by plain DPO": [
                    round(100 * (one["plain DPO"][name] - one["start"][name]), 2) for name in COLUMNS
                ],
            }
            for seed, one in seeds.items()
        },
        "rules": told,
    }


def moved_along(matrix: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells off target that stand out of the noise; the error is that of rates alone, not of trainings."""
    found = []
    for rule, targets in matrix["rules"].items():
        for target, by_seed in targets.items():
            points = np.array([cell["points"] for cell in by_seed.values()])
            error = np.array([matrix["seeds"][seed]["standard error, at most"] for seed in by_seed])
            clear = np.abs(points.mean(0)) > CLEAR * np.sqrt((error**2).sum(0)) / len(error)
            found += [
                {"rule": rule, "target": target, "habit": habit, "points": dict(zip(by_seed, row, strict=True))}
                for habit, row, stands in zip(matrix["habits"], points.T.tolist(), clear, strict=True)
                if stands and habit != target
            ]
    return found


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Per rule, over seeds and habits: median, smallest and largest recovery; medians of the rest."""
    out = {}
    for name in dict.fromkeys(name for seed in seeds.values() for name in seed["rules"]):
        rows = [row for seed in seeds.values() for row in seed["rules"].get(name, {}).values()]
        ran = [row for row in rows if "refused" not in row]
        if not ran:
            out[name] = {"refused": rows[0]["refused"]}
            continue
        recovery = [row["recovery"] for row in ran]
        out[name] = {
            "runs": len(ran),
            "recovery, median": float(np.median(recovery)),
            "recovery, smallest": min(recovery),
            "recovery, largest": max(recovery),
            "farthest from the start model, points": max(abs(row["points from the start model"]) for row in ran),
            "others, mean recovery": float(np.median([row["others, mean recovery"] for row in ran])),
            "others, mean absolute change": float(np.median([row["others, mean absolute change"] for row in ran])),
            "others, largest change": max((row["others, largest change"] for row in ran), key=lambda x: abs(x[0])),
            "quality, change": float(np.median([row["quality, change"] for row in ran])),
        }
    return out


def markdown(summary: dict[str, Any]) -> str:
    """The table of docs/results/verbs.md."""
    lines = [
        "| rule | recovery, median (range) | farthest from start | others: recovery | mean change | quality, change |",
        "|---|---|---|---|---|---|",
    ]
    most = max(row.get("runs", 0) for row in summary.values())
    for name, row in summary.items():
        if "refused" in row:
            lines.append(f"| {name} | did not run: {row['refused'][:80]} | | | | |")
            continue
        low, high = row["recovery, smallest"], row["recovery, largest"]
        few = f" ({row['runs']} of {most} runs)" if row["runs"] < most else ""
        lines.append(
            f"| {name}{few} | {row['recovery, median']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['farthest from the start model, points']:.0f} points | {row['others, mean recovery']:.2f} "
            f"| {100 * row['others, mean absolute change']:.1f} points | {100 * row['quality, change']:+.1f} points |"
        )
    return "\n".join(lines)


def matrix_markdown(matrix: dict[str, Any]) -> str:
    """The style matrix of every rule in points, means over the seeds; the first row is what plain DPO moved."""
    seeds = matrix["seeds"].values()

    def line(name: str, lists: list[list[float]]) -> str:
        return f"| {name} | {' | '.join(f'{x:+.0f}' for x in np.mean(lists, axis=0))} |"

    lines = [f"| target: rule | {' | '.join(matrix['habits'])} |", "|---" * (len(matrix["habits"]) + 1) + "|"]
    lines += [
        line("plain DPO, against the start model", [one["moved by plain DPO"] for one in seeds]),
        line("standard error, at most", [one["standard error, at most"] for one in seeds]),
    ]
    for rule, targets in matrix["rules"].items():
        lines += [line(f"{target}: {rule}", [one["points"] for one in row.values()]) for target, row in targets.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
