"""What each verb of a policy takes out, and what else it changes: on worlds with planted habits.

Plain DPO, and DPO once per rule and habit; then the rates of all habits and of right values in rollouts on held-out
prompts. Recorded for each rule: the habit's rate, its recovery (0 at plain DPO's rate, 1 at the start model's), the
mean absolute change of the other habits and the change of the quality signal against plain DPO, and the standard error
of a difference of two rates.

    python benchmarks/studies/verbs.py --seeds 0 1
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import (
    LEARNING_RATE,
    RESULTS,
    STANDARD_ERROR,
    TARGETS,
    concepts,
    kept_file,
    made_by,
    prepared,
    run,
    save,
)

from trl_anatomy.checking.rates import off_target
from trl_anatomy.testbed.language import HABITS, INSTRUCTIONS


def rules(habit: str, readings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on one habit. The concepts they name are those of `concepts`."""

    def away(verb: str, concept: str = habit, **keys: Any) -> list[dict[str, Any]]:
        return [{"explain_away": concept, "with": verb, **keys}]

    seen, direction, gap = f"{habit}_latents", f"{habit}_direction", readings[habit]["gap"]
    others = [h.name for h in HABITS if h.name != habit]
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
        "reweight_pairs, balanced, none held": away("reweight_pairs", hold=[]),
        "inoculate, chosen side": away("inoculate", instruction=asked, side="chosen"),
        "residualize, steered, auto": away("residualize", direction, steer=4 * gap),
        "steer, chosen": away("steer", direction, side="chosen", strength=4 * gap),
        "project_out, gradient": away("project_out", direction, **written),
        "filter_pairs, top 5 %": away("filter_pairs", fraction=0.05),
        "shape_reward, text rule, strength 1": away("shape_reward", strength=1.0),
    }


def figures(habit: str, start: dict[str, float], dpo: dict[str, float], run: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of one rule."""
    if "refused" in run:
        return {"refused": run["refused"]}
    now = run["rates"]
    effects = off_target(start, dpo, {habit: now})[habit]
    others = {h.name: effects[h.name]["change"] for h in HABITS if h.name != habit}
    record = run["plan"][0] if run["plan"] else {}
    return {
        "rate": now[habit],
        "recovery": effects[habit]["recovery"],
        "points from the start model": 100 * (now[habit] - start[habit]),
        "others, mean absolute change": float(np.mean(np.abs(list(others.values())))),
        "others, largest change": max(((change, name) for name, change in others.items()), key=lambda x: abs(x[0])),
        "quality": now["correct"],
        "quality, change": effects["correct"]["change"],
        "strength": record.get("strength"),
    }


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
                if args.only not in name or (args.finished and not finished):
                    continue
                rule = rules(habit, readings)[name]
                policy = {"version": 1, "concepts": concepts(world, habit, readings, folder), "rules": rule}
                done = run(folder, f"{habit}: {name}", world, seed, rate, policy)
                found.setdefault(name, {})[habit] = figures(habit, start, dpo, done)
        seeds[str(seed)] = {
            "start": start,
            "plain DPO": dpo,
            "standard error of a difference, at most": STANDARD_ERROR["all responses"],
            "latents' phi": {habit: readings[habit]["phi"] for habit in TARGETS},
            "rules": found,
        }
    command = f"python benchmarks/studies/verbs.py --seeds {' '.join(map(str, args.seeds))}"
    results = {"learning rate": rate, "summary": summary(seeds), "seeds": seeds}
    save(args.results, made_by(command) | results)
    print(markdown(results["summary"]))


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
            "others, mean absolute change": float(np.median([row["others, mean absolute change"] for row in ran])),
            "quality, change": float(np.median([row["quality, change"] for row in ran])),
        }
    return out


def markdown(summary: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    lines = [
        "| rule | recovery, median (range) | farthest from start | other habits, mean change | quality, change |",
        "|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        if "refused" in row:
            lines.append(f"| {name} | did not run: {row['refused'][:80]} | | | |")
            continue
        low, high = row["recovery, smallest"], row["recovery, largest"]
        lines.append(
            f"| {name} | {row['recovery, median']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['farthest from the start model, points']:.0f} points "
            f"| {100 * row['others, mean absolute change']:.1f} points | {100 * row['quality, change']:+.1f} points |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
