"""What the studies share: worlds, their readings, training with a policy, rates of habits, and the file of results.

A world of the studies has a start model that also obeys instructions (`asking`), and is trained with a gentler learning
rate than the demo's, which moves habits by about a third more than the pairs say: a strength fitted on the pairs takes
out what they say. Worlds, readings and finished runs are kept in `--out`, one small JSON a run, so that an interrupted
study goes on where it was, and the studies share what is the same (the start model, plain DPO).
"""

import argparse
import datetime
import json
import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.reading.fit import fit_concept, read_examples, read_hidden
from trl_anatomy.testbed.demo import MAX_NEW_TOKENS, rates, train
from trl_anatomy.testbed.language import HABITS, INSTRUCTIONS, TOPICS, question_of
from trl_anatomy.testbed.sae import habit_latents
from trl_anatomy.testbed.world import DEMO, World, build_world

PACKAGES = ("trl", "transformers", "torch", "sae-lens", "numpy", "scipy", "scikit-learn", "scikit-network")
RESULTS = Path(__file__).parents[1] / "results"
SIZE = replace(DEMO, asking=0.15)
NAMES = [habit.name for habit in HABITS]
TARGETS = tuple(INSTRUCTIONS)  # three rewarded habits, which plain DPO raises by far more than 20 points
SIBLINGS = dict(zip(TARGETS, TARGETS[1:] + TARGETS[:1], strict=True))  # what a scorer of two habits takes along
N_PROMPTS, N_PER_PROMPT = 500, 3
LEARNING_RATE = 2e-4
TOPIC = "science"  # where a gate opens
# A start model that refuses in that topic instead of answering, and elsewhere seldom. The rules there read text, so its
# SAE is next to nothing.
FORBIDDING = replace(DEMO, forbidden=TOPIC, n_pairs=2_000, n_sae_texts=100, sae_tokens=20_000)
NEUTRAL = "follow_up"  # the pairs leave it alone; about as frequent as the habits that it stands beside as a control
SWAPPED = "sides swapped at random"
WORDS = rf"\b({'|'.join(TOPICS[TOPIC].facts)})\b"
GATE, ELSEWHERE = {"prompt": WORDS}, {"prompt": rf"^(?!.*{WORDS})"}
TOPICAL = ("in the topic", "in the others", "right answers", "other habits, mean absolute change")  # columns of a table
N_GRADIENTS = 25  # responses of a topic, for `carried_over`
FINISHED = False  # train nothing, record the runs that are there; `study` sets it
# Of a difference of two rates, at most
STANDARD_ERROR = {
    "all responses": math.sqrt(0.5 / (N_PROMPTS * N_PER_PROMPT)),
    "responses in the topic": math.sqrt(0.5 * len(TOPICS) / (N_PROMPTS * N_PER_PROMPT)),
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


def prepared(folder: Path, seed: int) -> tuple[World, dict[str, Any]]:
    """World, and readings of its concepts, made where they are not there yet."""
    world = build_world(folder / "world", SIZE, seed)
    readings = folder / "readings.json"
    if not readings.is_file():
        readings.write_text(json.dumps(read(world, folder)))
    return world, json.loads(readings.read_text())


def read(world: World, folder: Path) -> dict[str, Any]:
    """Per target: its best latents over the pairs' responses, and a stored direction with the gap of its classes.

    Stored as well: probes, and one whose labels cannot tell the habit from its sibling, since all of its texts show
    both or neither.
    """
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
        settings: dict[str, Any] = {"layers": [world.layer], "progress": False}
        for kind in ("attention_probe", "probe", "direction"):
            scorer = fit_concept(model, examples, scorer=kind, read=hidden, **settings).scorer
            scorer.save(folder / f"{kind}-{habit}")
        alike = labelled.select(np.flatnonzero(shows[habit] == shows[SIBLINGS[habit]]))
        both = fit_concept(model, read_examples(alike, tokenizer, max_length=128), scorer="probe", **settings)
        both.scorer.save(folder / f"both-{habit}")
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
    """Train (unless it is the start model), measure, and keep the figures; {} where only finished runs are wanted."""
    kept = kept_file(folder, learning_rate, name)
    if kept.is_file():
        return json.loads(kept.read_text())
    if FINISHED:
        return {}
    if folder / "model" == world.model_path:
        raise ValueError(f"{folder / 'model'} is the start model: what is trained would take its place")
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


def start_and_dpo(folder: Path, world: World) -> list[dict[str, Any]]:
    return [run(folder, name, world, world.seed, LEARNING_RATE, None) for name in ("start", "plain DPO")]


def of_text(
    kind: str, habit: str, rules: dict[str, list[dict[str, Any]]], controlled: str, folder: Path, world: World
) -> dict[str, Any]:
    """A study whose rules act on one habit by its text rule, and the controls of one of them."""
    start, dpo = start_and_dpo(folder, world)
    told = {"start": start, "plain DPO": dpo}
    concepts = {h.name: {"scorer": "text", "pattern": h.pattern} for h in HABITS if h.name in (habit, NEUTRAL)}

    def trained(name: str, rule: list[dict[str, Any]], world: World = world) -> dict[str, Any]:
        policy = {"version": 1, "concepts": concepts, "rules": rule}
        return run(folder, f"{kind}: {name}", world, world.seed, LEARNING_RATE, policy)

    for name, rule in rules.items():
        told[name] = trained(name, rule)
    strength = told[controlled]["plan"][0]["strength"]
    found = checks(rules[controlled][0], habit, NEUTRAL, strength, world)
    against = {name: trained(name, [rule], other) for name, (rule, other) in found.items()}
    return {
        "rows": {name: row(habit, one, dpo) for name, one in told.items() if one},
        "controls": {name: row(habit, one, start if SWAPPED in name else dpo) for name, one in against.items() if one},
    }


def checks(
    rule: dict[str, Any], concept: str, other: str, strength: float, world: World
) -> dict[str, tuple[dict[str, Any], World]]:
    """Name -> rule and world of the controls of a shaping rule on `concept`, which had this strength.

    The strength on another concept; next to none; and the rule on pairs that say nothing, whose model is to be compared
    with the start model.
    """
    sign = "explain_away" if strength > 0 else "amplify"
    return {
        f"the same strength on {other}": ({sign: other, "with": "shape_reward", "strength": abs(strength)}, world),
        "strength 1e-6": ({sign: concept, "with": "shape_reward", "strength": 1e-6}, world),
        f"the rule, {SWAPPED}": (rule, swapped(world)),
    }


def swapped(world: World) -> World:
    """The world, the sides of half of its pairs exchanged."""
    data = world.dataset
    swap = np.random.default_rng(world.seed).random(len(data)) < 0.5
    sides = {
        "chosen": [b if s else a for a, b, s in zip(data["chosen"], data["rejected"], swap, strict=True)],
        "rejected": [a if s else b for a, b, s in zip(data["chosen"], data["rejected"], swap, strict=True)],
    }
    return replace(world, dataset=Dataset.from_dict({"prompt": data["prompt"], **sides}))


def carried_over(world: World, openings: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Per habit (its topic, what opens it): what a small step that raises it there does to it elsewhere, as a share.

    Raised are the log-odds of the token that opens the habit, where it is taken; g is their gradient over the
    parameters, summed over `N_GRADIENTS` responses of a topic. A step along g raises them by g·g in the topic and by
    g·g' in another: the share is g·g' / g·g, mean over the others. `cosine` is that of g and g', mean over the others.
    """
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)

    def gradient(topic: str, opening: str) -> torch.Tensor:
        model.zero_grad()
        pairs = [(pair, re.search(opening, pair["chosen"])) for pair in world.dataset if pair["topic"] == topic]
        for pair, found in [(pair, found) for pair, found in pairs if found][:N_GRADIENTS]:
            before = tokenizer(pair["prompt"] + pair["chosen"][: found.start()]).input_ids
            token = tokenizer(pair["prompt"] + pair["chosen"][: found.end()]).input_ids[len(before)]
            logits = model(torch.tensor([before])).logits[0, -1]
            others = torch.cat([logits[:token], logits[token + 1 :]])
            (logits[token] - torch.logsumexp(others, 0)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    told = {}
    for habit, (topic, opening) in openings.items():
        here = gradient(topic, opening)
        there = [gradient(other, opening) for other in TOPICS if other != topic]
        told[habit] = {
            "share": float(np.mean([here @ g / (here @ here) for g in there])),
            "cosine": float(np.mean([here @ g / (here.norm() * g.norm()) for g in there])),
        }
    return told


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


def by_topic(told: dict[str, Any], habit: str) -> dict[str, float]:
    """Rate of a habit in the topic, and its mean over the other topics; and that of right answers there."""
    others = [shares for topic, shares in told["topics"].items() if topic != TOPIC]
    return {
        "in the topic": told["topics"][TOPIC][habit],
        "in the others": float(np.mean([shares[habit] for shares in others])),
        "right answers in the others": float(np.mean([shares["correct"] for shares in others])),
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


def made_by(command: str) -> dict[str, Any]:
    """What every file of results begins with."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def save(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, default=float) + "\n", encoding="utf-8")


def study(
    name: str,
    about: str | None,
    of: Callable[[Path, World, dict[str, Any]], dict[str, Any]],
    columns: tuple[str, ...],
    prepare: Callable[[Path, int], tuple[World, dict[str, Any]]] = prepared,
) -> None:
    """The command line of a study: `of` (folder, world, readings) for each seed, saved, and printed as a table."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--finished", action="store_true", help="train nothing, record the runs that are finished")
    parser.add_argument("--out", default="benchmark-studies", help="folder for worlds and runs; finished ones are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.json")
    args = parser.parse_args()
    global FINISHED
    FINISHED = args.finished
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        folder = Path(args.out) / str(seed)
        found[str(seed)] = of(folder, *prepare(folder, seed))
        made = made_by(f"python benchmarks/studies/{name}.py --seeds {' '.join(found)}")
        save(args.results, made | {"standard error of a difference, at most": STANDARD_ERROR, "seeds": found})
    print(markdown(name, columns, [one["rows"] | one.get("controls", {}) for one in found.values()]), flush=True)


def markdown(name: str, columns: tuple[str, ...], worlds: list[dict[str, Any]]) -> str:
    """The table of docs/results/predictors.md; a cell holds the figures of all worlds."""
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in worlds[0]:
        told = [world[row] for world in worlds if row in world]
        cells = (", ".join(f"{100 * one[column]:.1f}" for one in told) for column in columns)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)
