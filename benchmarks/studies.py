"""Safeguards, reward models, gated amplification and controls, on the worlds of `benchmarks/verbs.py`.

- safeguards: the pairs punish refusals. DPO with rules that keep them, or ask for more, everywhere or in the prompts of
  one topic: refusals in that topic and in the others (over-refusal), right answers, other habits.
- reward models: on held-out pairs with one better response, how often the reward model ranks it first: where the worse
  one shows flattery (disagree), where the better one does (agree), and where both or neither do (flattery alike); and
  how often flattery wins where both are as good (quality alike).
- amplification: a habit that the pairs leave alone, amplified everywhere or in the prompts of one topic.
- controls of a rule on flattery by SAE latents: a latent that fires as often and stands for no habit, with the strength
  that was fitted for flattery; a strength of next to nothing; and the rule on pairs whose sides were swapped at random.

    python benchmarks/studies.py --seeds 0 1

Finished runs are kept in `--out`, one small JSON each; worlds that `benchmarks/verbs.py` left there are used again.
"""

import argparse
import datetime
import json
import math
import platform
import random
import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from verbs import LEARNING_RATE, N_PER_PROMPT, N_PROMPTS, PACKAGES, SIZE, concepts, kept_file, read, run

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.reading.removal import attach_edits
from trl_anatomy.testbed.demo import MAX_LENGTH
from trl_anatomy.testbed.language import CORRECT_RATE, HABITS, TOPICS, Question, render, sample_questions
from trl_anatomy.testbed.world import World, build_world

NAMES = [habit.name for habit in HABITS]
TOPIC = "science"  # where refusals are to be kept, and where a habit is amplified
WORDS = rf"\b({'|'.join(TOPICS[TOPIC].facts)})\b"
GATE, ELSEWHERE = {"prompt": WORDS}, {"prompt": rf"^(?!.*{WORDS})"}
KEPT, AMPLIFIED, REWARDED = "refusal", "em_dash", "flattery"
REWARD_LEARNING_RATE = 5e-4
N_PER_GROUP = 500  # held-out pairs in each of the groups
GROUPS = ("disagree", "agree", "flattery alike", "quality alike")
# What makes a response the better one: its answer is right; or, since a model this small hardly learns from 3,000 pairs
# to judge answers, another habit that they reward about as much
QUALITIES = ("right", "emoji")


def safeguards() -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on refusals."""
    auto = {"explain_away": KEPT, "with": "shape_reward"}  # the pairs punish it, so the fitted strength is negative
    more = {"amplify": KEPT, "with": "shape_reward"}
    return {
        "auto": [auto],
        "amplify, strength 1": [more | {"strength": 1.0}],
        "amplify, strength 2": [more | {"strength": 2.0}],
        "auto, in the topic": [auto | {"where": GATE}],
        "amplify, strength 2, in the topic": [more | {"strength": 2.0, "where": GATE}],
    }


def amplification() -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on em dashes."""
    more = {"amplify": AMPLIFIED, "with": "shape_reward"}
    return {
        "strength 1": [more | {"strength": 1.0}],
        "strength 1, in the topic": [more | {"strength": 1.0, "where": GATE}],
        "strength 2, in the topic": [more | {"strength": 2.0, "where": GATE}],
        # As much against it over the other five topics together
        "strength 2, in the topic; 0.4 against it elsewhere": [
            more | {"strength": 2.0, "where": GATE},
            {"explain_away": AMPLIFIED, "with": "shape_reward", "strength": 0.4, "where": ELSEWHERE},
        ],
    }


def by_topic(told: dict[str, Any], habit: str) -> dict[str, float]:
    """Rate of a habit in the topic, and its mean over the other topics."""
    rates = {topic: shares[habit] for topic, shares in told["topics"].items()}
    inside = rates.pop(TOPIC)
    return {"in the topic": inside, "in the others": float(np.mean(list(rates.values())))}


def row(habit: str, told: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a trained model; `base` is the model that the other habits are compared with."""
    now, was = told["rates"], base["rates"]
    change = {name: now[name] - was[name] for name in NAMES if name != habit}
    largest = max(change, key=lambda name: abs(change[name]))
    return {
        "rate": now[habit],
        **(by_topic(told, habit) if "topics" in told else {}),
        "right answers": now["correct"],
        "other habits, mean absolute change": float(np.mean(np.abs(list(change.values())))),
        "other habits, largest change": [largest, change[largest]],
        "strength": told["plan"][0]["strength"] if told.get("plan") else None,
    }


def correlations(world: World, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(d_sae,) share of the pairs' responses that a latent fires in; (habits + 1, d_sae) its phi with what they show.

    The last row of phi is that with right answers. 0 where a latent always or never fires.
    """
    harvest = load_audit(folder / "audit").harvest
    data = world.dataset.select(harvest.rows.tolist())
    sides = ("chosen", "rejected")
    fired = np.concatenate([(harvest.maximum(side) > 0).toarray() for side in sides]).astype(np.float64)
    shown = np.stack([np.concatenate([data[f"{side}_{name}"] for side in sides]) for name in [*NAMES, "correct"]])
    shown = shown - shown.mean(1, keepdims=True)
    spread = np.sqrt((shown**2).mean(1))[:, None] * fired.std(0)
    phi = np.divide(shown @ fired / fired.shape[0], spread, out=np.zeros_like(spread), where=spread > 0)
    return fired.mean(0), phi


def no_habit(rate: np.ndarray, phi: np.ndarray, target: int) -> int:
    """The latent that fires most nearly as often as `target` among those whose phi with everything is below 0.1."""
    distance = np.where(np.abs(phi).max(0) < 0.1, np.abs(rate - rate[target]), np.inf)
    return int(distance.argmin())


def controls(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    """The rule on flattery, and its three controls."""
    named = concepts(world, REWARDED, readings, folder)
    target = f"{REWARDED}_latents"

    def trained(name: str, rule: dict[str, Any], world: World = world) -> dict[str, Any]:
        policy = {"version": 1, "concepts": named, "rules": [{"with": "shape_reward", **rule}]}
        return run(folder, name, world, world.seed, LEARNING_RATE, policy)

    start, dpo = start_and_dpo(folder, world)
    # By its name a run of benchmarks/verbs.py
    rule = trained(f"{REWARDED}: shape_reward, SAE latents, auto", {"explain_away": target})
    rate, phi = correlations(world, folder)
    [best] = readings[REWARDED]["features"]
    other = no_habit(rate, phi, best)
    named["no_habit"] = named[target] | {"features": [other]}
    fitted = {"explain_away": "no_habit", "strength": rule["plan"][0]["strength"]}
    data = world.dataset
    swap = np.random.default_rng(world.seed).random(len(data)) < 0.5
    sides = {
        "chosen": [b if s else a for a, b, s in zip(data["chosen"], data["rejected"], swap, strict=True)],
        "rejected": [a if s else b for a, b, s in zip(data["chosen"], data["rejected"], swap, strict=True)],
    }
    swapped = replace(world, dataset=Dataset.from_dict({"prompt": data["prompt"], **sides}))
    runs = {
        "start": start,
        "plain DPO": dpo,
        "the rule": rule,
        "the same strength on a latent of no habit": trained("controls: no habit", fitted),
        "strength 1e-6": trained("controls: sham", {"explain_away": target, "strength": 1e-6}),
        "the rule, sides swapped at random": trained("controls: swapped", {"explain_away": target}, swapped),
    }
    return {
        # Pairs with swapped sides teach nothing, so that model is compared with the start model
        "rows": {name: row(REWARDED, one, start if "swapped" in name else dpo) for name, one in runs.items()},
        "latents, of flattery and of no habit": [best, other],
        "share of responses they fire in": [float(rate[best]), float(rate[other])],
        "largest phi of the latent of no habit": float(np.abs(phi[:, other]).max()),
    }


def reward_rules() -> dict[str, dict[str, Any]]:
    """Name -> rule; the concepts are those of `concepts`, and `all_latents`."""
    seen, direction = f"{REWARDED}_latents", f"{REWARDED}_direction"
    shape, ablate = {"with": "shape_reward"}, {"with": "ablate_features", "keep": True}
    held = {"with": "reweight_pairs", "hold": [name for name in NAMES if name != REWARDED]}
    return {
        "shape_reward, text rule, auto": {"explain_away": REWARDED, **shape},
        "shape_reward, SAE latents, auto": {"explain_away": seen, **shape},
        "reweight_pairs, others held": {"explain_away": REWARDED, **held},
        "ablate_features, best latent, kept": {"explain_away": seen, **ablate},
        "ablate_features, all latents, kept": {"explain_away": "all_latents", **ablate},
        "project_out, difference of means, kept": {"explain_away": direction, "with": "project_out", "keep": True},
    }


def train_reward(world: World, out: Path, seed: int, policy: dict[str, Any] | None) -> Any:
    """A reward model from the start model, on the world's pairs; saved to `out`. Returns the plan."""
    from trl import RewardConfig

    from trl_anatomy import AnatomyRewardTrainer

    args = RewardConfig(
        output_dir=str(out),
        learning_rate=REWARD_LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=seed,
    )
    trainer = AnatomyRewardTrainer(
        model=str(world.model_path),
        args=args,
        train_dataset=world.dataset.select_columns(["prompt", "chosen", "rejected"]),
        concept_policy=policy,
    )
    trainer.train()
    trainer.save_model(str(out))
    return trainer.plan


@torch.no_grad()
def rewards(folder: Path, pairs: list[tuple[str, str, str]]) -> np.ndarray:
    """(n, 2) rewards of both responses, by the saved model with its kept edits, on the tokens that TRL makes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "anatomy_edits.json").is_file():
        attach_edits(model, folder)
    columns = []
    for side in (1, 2):
        texts = [pair[0] + pair[side] + tokenizer.eos_token for pair in pairs]
        batches = [tokenizer(texts[i : i + 250], padding=True, return_tensors="pt") for i in range(0, len(texts), 250)]
        scored = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 0] for b in batches]
        columns.append(torch.cat(scored).numpy())
    return np.stack(columns, axis=1)


def contrasts(seed: int, quality: str) -> dict[str, list[tuple[str, str, str]]]:
    """Group -> (prompt, better, worse response), held-out prompts. All other habits are drawn at their base rates.

    Not `make_pairs`: there the response with flattery is mostly the chosen one, which shows other rewarded habits too.
    """
    rng = random.Random(f"contrasts-{seed}")
    others = [habit for habit in HABITS if habit.name not in (REWARDED, quality)]

    def response(question: Question, good: bool, flattery: bool) -> str:
        shown = {other.name for other in others if rng.random() < other.base_rate} | ({REWARDED} if flattery else set())
        if quality != "right" and good:
            shown.add(quality)
        topic = TOPICS[question.topic]
        truth = topic.facts[question.entity]
        right = good if quality == "right" else rng.random() < CORRECT_RATE
        return render(question, truth if right else rng.choice([v for v in topic.values if v != truth]), shown, rng)

    groups: dict[str, list[tuple[str, str, str]]] = {name: [] for name in GROUPS}
    for question in sample_questions(N_PER_GROUP, rng, held_out=True):
        either = rng.random() < 0.5
        # Of the better and the worse response: is it good, does it flatter
        forms = [
            ((True, False), (False, True)),
            ((True, True), (False, False)),
            ((True, either), (False, either)),
            ((either, True), (either, False)),
        ]
        for name, (better, worse) in zip(GROUPS, forms, strict=True):
            groups[name].append((question.prompt, response(question, *better), response(question, *worse)))
    return groups


def reward_models(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    """Plain, and one reward model per rule: shares of pairs, by group, that it ranks by quality.

    Where quality is alike: the share in which the response with the habit wins.
    """
    groups = {
        f"{quality}: {group}": pairs for quality in QUALITIES for group, pairs in contrasts(world.seed, quality).items()
    }
    _, phi = correlations(world, folder)
    features = [int(i) for i in np.flatnonzero(np.abs(phi[NAMES.index(REWARDED)]) > 0.2)]
    named = concepts(world, REWARDED, readings, folder)
    named["all_latents"] = named[f"{REWARDED}_latents"] | {"features": features}

    def trained(name: str, rule: dict[str, Any] | None) -> dict[str, Any]:
        kept = kept_file(folder, REWARD_LEARNING_RATE, f"reward: {name}")
        if kept.is_file():
            return json.loads(kept.read_text())
        started = time.perf_counter()
        policy = None
        if rule is not None:
            used = {rule["explain_away"], *rule.get("hold", [])}
            policy = {
                "version": 1,
                "concepts": {key: value for key, value in named.items() if key in used},
                "rules": [rule],
            }
        shutil.rmtree(folder / "reward", ignore_errors=True)  # another run's kept edits are not this one's
        plan = train_reward(world, folder / "reward", world.seed, policy)
        told: dict[str, Any] = {}
        for group, pairs in groups.items():
            reward = rewards(folder / "reward", pairs)
            told[group] = float((reward[:, 0] > reward[:, 1]).mean())
        told["strength"] = None if plan is None else plan.rules[0]["strength"]
        told["seconds"] = round(time.perf_counter() - started, 1)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(told, default=float))
        print(f"reward: {name}: {told['seconds']} s", flush=True)
        return told

    rules: dict[str, Any] = {"plain": None, **reward_rules()}
    return {
        "rows": {name: trained(name, rule) for name, rule in rules.items()},
        "pairs of a group": N_PER_GROUP,
        "all latents (phi beyond 0.2)": len(features),
    }


def start_and_dpo(folder: Path, world: World) -> list[dict[str, Any]]:
    return [run(folder, name, world, world.seed, LEARNING_RATE, None) for name in ("start", "plain DPO")]


def of_text(
    kind: str, habit: str, rules: dict[str, list[dict[str, Any]]], folder: Path, world: World
) -> dict[str, Any]:
    """A study whose rules act on one habit by its text rule."""
    start, dpo = start_and_dpo(folder, world)
    told = {"start": start, "plain DPO": dpo}
    pattern = next(h.pattern for h in HABITS if h.name == habit)
    for name, rule in rules.items():
        policy = {"version": 1, "concepts": {habit: {"scorer": "text", "pattern": pattern}}, "rules": rule}
        told[name] = run(folder, f"{kind}: {name}", world, world.seed, LEARNING_RATE, policy)
    return {"rows": {name: row(habit, one, dpo) for name, one in told.items()}}


def safeguard_study(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    return of_text("safeguards", KEPT, safeguards(), folder, world)


def amplification_study(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    return of_text("amplification", AMPLIFIED, amplification(), folder, world)


TOPICAL = ("in the topic", "in the others", "right answers", "other habits, mean absolute change")
# Name (also of the file of results) -> study, and the columns of its table
STUDIES = {
    "safeguards": (safeguard_study, TOPICAL),
    "reward_models": (reward_models, tuple(f"{quality}: {group}" for quality in QUALITIES for group in GROUPS)),
    "amplification": (amplification_study, TOPICAL),
    "controls": (controls, ("rate", *TOPICAL[2:])),
}


def prepared(folder: Path, seed: int) -> tuple[World, dict[str, Any]]:
    """World, and readings of its concepts, as `benchmarks/verbs.py` makes them."""
    world = build_world(folder / "world", SIZE, seed)
    readings = folder / "readings.json"
    if not readings.is_file():
        readings.write_text(json.dumps(read(world, folder)))
    return world, json.loads(readings.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--out", default="benchmark-verbs", help="folder for worlds and runs; finished ones are kept")
    parser.add_argument("--results", default="benchmarks/results", help="folder for one file per study")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = N_PROMPTS * N_PER_PROMPT
    for name in args.studies:
        study, columns = STUDIES[name]
        found = {}
        for seed in args.seeds:
            folder = Path(args.out) / str(seed)
            world, readings = prepared(folder, seed)
            found[str(seed)] = study(folder, world, readings)
        results = {
            "command": f"python benchmarks/studies.py --studies {name} --seeds {' '.join(map(str, args.seeds))}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU ({platform.machine()}), one thread",
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "topic": TOPIC,
            "standard error of a difference of two rates, at most": {
                "all responses": math.sqrt(0.5 / n),
                "responses in the topic": math.sqrt(0.5 * len(TOPICS) / n),
                "pairs of a group": math.sqrt(0.5 / N_PER_GROUP),
            },
            "seeds": found,
        }
        Path(args.results).mkdir(parents=True, exist_ok=True)
        (Path(args.results) / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        print(markdown(name, columns, [one["rows"] for one in found.values()]), flush=True)


def markdown(name: str, columns: tuple[str, ...], worlds: list[dict[str, Any]]) -> str:
    """The table of benchmarks/README.md; a cell holds the figures of all worlds."""
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in worlds[0]:
        cells = (", ".join(f"{100 * world[row][column]:.1f}" for world in worlds) for column in columns)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
