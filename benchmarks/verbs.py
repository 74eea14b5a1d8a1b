"""What each verb of a policy takes out, and what else it changes: on worlds with planted habits.

Per seed one world whose start model also obeys instructions (`asking`), plain DPO, and DPO once per rule and habit,
all with the demo's settings but a gentler learning rate: at the demo's, training moves habits by about a third more
than the pairs say, and a strength fitted on the pairs takes out what they say. Then the rates of all habits and of
right values in rollouts on held-out prompts. Recorded for each rule: the habit's rate, its recovery (0 at plain DPO's
rate, 1 at the start model's), the mean absolute change of the other habits and the change of the quality signal against
plain DPO, and the standard error of a difference of two rates.

    python benchmarks/verbs.py --seeds 0 1

Finished runs are kept in `--out`, one small JSON each, so that an interrupted benchmark goes on where it was.
"""

import argparse
import datetime
import json
import math
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.checking.rates import off_target
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.reading.fit import fit_concept, read_examples, read_hidden
from trl_anatomy.testbed.demo import MAX_NEW_TOKENS, rates, train
from trl_anatomy.testbed.language import HABITS, INSTRUCTIONS, TOPICS, question_of
from trl_anatomy.testbed.sae import habit_latents
from trl_anatomy.testbed.world import DEMO, World, build_world

PACKAGES = ("trl", "transformers", "torch", "sae-lens", "numpy", "scipy", "scikit-learn")
SIZE = replace(DEMO, asking=0.15)
TARGETS = tuple(INSTRUCTIONS)  # three rewarded habits, which plain DPO raises by far more than 20 points
N_PROMPTS, N_PER_PROMPT = 500, 3
LEARNING_RATE = 2e-4


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


def concepts(world: World, habit: str, readings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All habits by text rule, and the target by its latents and by a difference of means."""
    return {
        **{h.name: {"scorer": "text", "pattern": h.pattern} for h in HABITS},
        f"{habit}_latents": {
            "scorer": "features",
            "features": readings[habit]["features"],
            "sae": {"path": str(world.sae_path)},
            "layer": world.layer,
        },
        f"{habit}_direction": {"scorer": "direction", "path": str(folder / f"direction-{habit}")},
    }


def read(world: World, folder: Path) -> dict[str, Any]:
    """Per target: its best latents over the pairs' responses, and a stored direction with the gap of its classes."""
    from scipy.sparse import csr_array, vstack

    from trl_anatomy.audit.config import AuditConfig
    from trl_anatomy.audit.run import run_audit

    config = AuditConfig(
        model=str(world.model_path), dataset=None, sae=str(world.sae_path), out=str(folder / "audit"), max_length=128
    )
    dataset = world.dataset.select_columns(["prompt", "chosen", "rejected"])
    audit = run_audit(config, dataset=dataset, progress=False)
    data = world.dataset.select(audit.harvest.rows.tolist())
    sides = ("chosen", "rejected")
    fired = csr_array(vstack([audit.harvest.maximum(side) > 0 for side in sides]))
    shows = {habit: np.concatenate([np.array(data[f"{side}_{habit}"]) for side in sides]) for habit in TARGETS}
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    rows = Dataset.from_dict(
        {
            "prompt": list(data["prompt"]) * 2,
            "response": [text for side in sides for text in data[side]],
            "label": [0] * len(data) * 2,
        }
    )
    hidden = None
    found = {}
    for habit, latent in habit_latents(fired, shows).items():
        labelled = rows.remove_columns("label").add_column("label", shows[habit].astype(int).tolist())
        examples = read_examples(labelled, tokenizer, max_length=128)
        hidden = hidden or read_hidden(model, examples, [world.layer], progress=False)
        scorer = fit_concept(
            model, examples, scorer="direction", layers=[world.layer], read=hidden, progress=False
        ).scorer
        scorer.save(folder / f"direction-{habit}")
        # What one unit of steering is: the difference of the classes' mean projections
        states, bounds = hidden
        projection = states[world.layer].double().numpy() @ scorer.tensors["direction"].double().numpy()
        mean = np.add.reduceat(projection, bounds[:-1]) / np.diff(bounds)
        gap = mean[shows[habit].astype(bool)].mean() - mean[~shows[habit].astype(bool)].mean()
        found[habit] = {"features": [latent.feature], "phi": latent.phi, "gap": float(gap)}
    return found


def measure(model_path: Path, world: World) -> dict[str, Any]:
    """Rates of all habits, and of right values, in rollouts on held-out prompts; and the same by topic."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    prompts = world.prompts[:N_PROMPTS]
    texts = rollouts(model, tokenizer, prompts, n_per_prompt=N_PER_PROMPT, max_new_tokens=MAX_NEW_TOKENS, seed=0)
    said = [(prompt, text) for prompt, group in zip(prompts, texts, strict=True) for text in group]

    def shares(said: list[tuple[str, str]]) -> dict[str, float]:
        return {name: rate.share for name, rate in rates(*zip(*said, strict=True)).items() if rate.n}

    topics = {topic: shares([row for row in said if question_of(row[0]).topic == topic]) for topic in TOPICS}
    return {"rates": shares(said), "topics": topics}


def kept_file(folder: Path, learning_rate: float, name: str) -> Path:
    """Where the figures of a run are kept."""
    return folder / f"runs-{learning_rate:g}" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"


def run(
    folder: Path, name: str, world: World, seed: int, learning_rate: float, policy: dict[str, Any] | None
) -> dict[str, Any]:
    """Train (unless `policy` is the start model's empty dict), measure, and keep the figures."""
    kept = kept_file(folder, learning_rate, name)
    if kept.is_file():
        return json.loads(kept.read_text())
    started = time.perf_counter()
    told: dict[str, Any] = {}
    if name == "start":
        told |= measure(world.model_path, world)
    else:
        try:
            plan = train(world, folder / "model", seed, learning_rate=learning_rate, concept_policy=policy)
        except Exception as error:
            # A rule that cannot run on this world is a finding, with its reason; the next one still runs.
            told["refused"] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            told |= measure(folder / "model", world)
            told["plan"] = None if plan is None else plan.rules
    told["seconds"] = round(time.perf_counter() - started, 1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(told, default=float))
    print(f"{name}: {told['seconds']} s {told.get('refused', '')}", flush=True)
    return told


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
    parser.add_argument("--out", default="benchmark-verbs", help="folder for worlds and runs; finished ones are kept")
    parser.add_argument("--results", default="benchmarks/results/verbs.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = args.learning_rate
    seeds = {}
    for seed in args.seeds:
        folder = Path(args.out) / str(seed)
        world = build_world(folder / "world", SIZE, seed)
        readings_file = folder / "readings.json"
        if not readings_file.is_file():
            readings_file.write_text(json.dumps(read(world, folder)))
        readings = json.loads(readings_file.read_text())
        start = run(folder, "start", world, seed, rate, None)["rates"]
        dpo = run(folder, "plain DPO", world, seed, rate, None)["rates"]
        n = N_PROMPTS * N_PER_PROMPT
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
            "standard error of a difference, at most": math.sqrt(0.5 / n),
            "latents' phi": {habit: readings[habit]["phi"] for habit in TARGETS},
            "rules": found,
        }
    results = {
        "command": f"python benchmarks/verbs.py --seeds {' '.join(map(str, args.seeds))}",
        "learning rate": rate,
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "summary": summary(seeds),
        "seeds": seeds,
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")
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
