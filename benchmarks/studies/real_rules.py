"""What each verb of a policy takes out of a real chat model, and what else it changes.

Of habits that plain DPO of real_model.py moves by ten points or more, a rule against each is trained with the same
recipe, pairs, order and number of steps; besides a sham (the weights of the balancing rule, dealt to pairs at random)
and a rule on latents drawn at random. Recorded of each: the habit's rate in responses to held-out prompts and its
recovery (0 at plain DPO's rate, 1 at the start model's), the other habits, the log-probability of held-out chosen
responses, the share of two-choice questions that the model gets right, and the probability of keeping to a format
that is asked for. What the plan said beforehand stands beside it.

    python benchmarks/studies/real_rules.py --model SMOLLM2 --sae SAE --out FOLDER

Units are kept in `--out`, which is that of real_model.py, and never made twice; a rule takes some eight minutes of one
core. `--table` records what is finished. Results hold numbers, no text.
"""

import argparse
import datetime
import gzip
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from habits import load
from real_model import RATES, done, habit_values, habits_of_sides
from real_runs import TOKENS, Place, Run, adapted, conversations, dpo_trainer, made_once

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.checking.likelihood import log_likelihoods
from trl_anatomy.checking.rates import recovery
from trl_anatomy.checking.responses import sampled_responses, slug
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.files import without_nan
from trl_anatomy.reading.fit import fit_concept, read_examples, read_hidden
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.weights import balanced_weights

RESULT = Path(__file__).parents[1] / "results" / "real_rules.json"
_PACKAGES = ("trl_anatomy", "torch", "transformers", "trl", "peft", "numpy", "scipy")
# Set and habit -> what asks for the habit. Plain DPO moves each by ten points or more.
TARGETS = {
    ("alpaca_eval2_cross_model", "bold"): "Set important words in bold.",
    ("alpaca_eval2_cross_model", "bullet"): "Use a list with bullets.",
    ("hh_helpful_test", "first_person"): "Speak of yourself.",
}
LAYERS = (10, 15, 19, 23)
LIKELY, CHOICES = 48, 150  # pairs, and two-choice questions
# Questions whose answer starts with one of a few tokens: what a model that keeps to a format writes first.
FORMATS = {
    "Answer with yes or no only.": ("Yes", "No", "yes", "no", "YES", "NO"),
    "Answer with a number only.": tuple("0123456789"),
    "Answer with the letter A or B only.": ("A", "B"),
}
ASKED = {
    "Answer with yes or no only.": [
        f"Is {a} larger than {b}?" for a, b in ((3, 2), (1, 9), (40, 4), (7, 12), (100, 99), (5, 50))
    ]
    + [f"Is {what}?" for what in ("water wet", "snow black", "iron a metal", "Paris in France", "a whale a fish")],
    "Answer with a number only.": [
        f"What is {a} plus {b}?" for a, b in ((1, 2), (3, 3), (10, 5), (7, 2), (20, 20), (6, 1))
    ]
    + [f"How many {what}?" for what in ("days has a week", "legs has a cat", "months has a year", "wheels has a car")],
    "Answer with the letter A or B only.": [
        f"Which is {what}? A: {a} B: {b}"
        for what, a, b in (
            ("an animal", "dog", "table"),
            ("a colour", "chair", "blue"),
            ("a fruit", "apple", "stone"),
            ("a city", "bread", "London"),
            ("hot", "ice", "fire"),
            ("a number", "seven", "moon"),
        )
    ],
}


# --- rules ---


def concepts(place: Place, name: str, habit: str) -> dict[str, dict[str, Any]]:
    """The habit, counted in text and read off hidden states; and as many latents drawn at random."""
    fitted = place.out / "rules" / slug(name) / habit / "fit"
    found: dict[str, dict[str, Any]] = {
        "habit": {"scorer": "habit", "name": habit},
        "direction": {"scorer": "direction", "path": str(fitted / "direction")},
        "latents": {"scorer": "features", "path": str(fitted / "features")},
    }
    n = len(FeaturesScorer.load(fitted / "features").features)
    drawn = np.random.default_rng(5).permutation(place.sae.d_sae)[:n].tolist()
    found["random"] = {"scorer": "features", "features": drawn, "sae": {"path": place.sae_path}}
    return found


def rules(asks: str, gap: float) -> dict[str, list[dict[str, Any]]]:
    """Name -> rules; those worth having first stand first. `gap` is between the means of hidden states."""

    def away(verb: str, concept: str = "habit", **keys: Any) -> list[dict[str, Any]]:
        return [{"explain_away": concept, "with": verb, **keys}]

    return {
        "shape_reward, habit": away("shape_reward"),
        "reweight_pairs, habit": away("reweight_pairs"),
        "filter_pairs, habit": away("filter_pairs", above=0.5),
        "mask_tokens, habit": away("mask_tokens"),
        "inoculate, habit": away("inoculate", instruction=asks),
        "residualize, habit": away("residualize", instruction=asks),
        "control: weights at random": [{"with": "reweight_pairs", "column": "dealt"}],
        "control: shape_reward, random latents": away("shape_reward", "random"),
        "shape_reward, latents": away("shape_reward", "latents"),
        "shape_reward, direction": away("shape_reward", "direction"),
        "project_out, direction": away("project_out", "direction"),
        "ablate_features, latents": away("ablate_features", "latents"),
        "steer, direction": away("steer", "direction", side="rejected", strength=gap),
        "mask_tokens decided, habit": away("mask_tokens", positions="decided"),
    }


def fit_unit(place: Place, name: str, habit: str) -> bool:
    """The habit as a direction and as latents, fitted on the responses of the pairs."""
    folder = place.out / "rules" / slug(name) / habit / "fit"

    def make() -> dict[str, Any]:
        clock = time.process_time()
        rows, _ = place.rows(name)
        shown = habits_of_sides(place, name)
        column = list(RATES).index(habit)
        labelled = Dataset.from_list(
            [
                {"prompt": row["prompt"], "response": row[side], "label": int(values[i, column])}
                for i, row in enumerate(rows)
                for side, values in zip(("chosen", "rejected"), shown, strict=True)
            ]
        )
        examples = read_examples(labelled, place.tokenizer, max_length=TOKENS)
        read = read_hidden(place.model, examples, sorted({*LAYERS, place.layer}), progress=False)
        told: dict[str, Any] = {}
        for scorer in ("direction", "features"):
            more = {"sae": place.sae} if scorer == "features" else {"layers": LAYERS}
            fitted = fit_concept(place.model, examples, scorer=scorer, read=read, progress=False, **more)
            fitted.scorer.save(folder / scorer)
            told[scorer] = {"layer": fitted.scorer.layer, "roc_auc": fitted.scorer.card["held_out"]["roc_auc"]}
        hidden, bounds = read[0][told["direction"]["layer"]], read[1]
        means = np.stack([hidden[a:b].float().mean(0).numpy() for a, b in pairwise(bounds)])
        gap = means[examples.labels].mean(axis=0) - means[~examples.labels].mean(axis=0)
        return told | {"gap": float(np.linalg.norm(gap)), "cpu_seconds": time.process_time() - clock}

    return made_once(folder, make)


def train_rule(place: Place, run: Run, habit: str, told: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """DPO under rules for as many steps as plain DPO took to its last dose; what the plan says of them."""
    began = time.process_time()
    steps = (done(place, f"trainings/{slug(run.name)}") or {})["snapshots"]["end"]["step"]
    known = concepts(place, run.of, habit)
    named = {rule["explain_away"] for rule in told if "explain_away" in rule}
    policy = {"version": 1, "concepts": {name: known[name] for name in sorted(named)}, "rules": told}
    try:
        trainer = dpo_trainer(
            place,
            run,
            out / "trainer",
            [],
            of=AnatomyDPOTrainer,
            rows=dealt(place, run, habit) if any("column" in rule for rule in told) else None,
            max_steps=steps,
            concept_policy=policy,
        )
    except AnatomyError as error:  # weights that do not exist, say: a finding about the verb
        return {"refused": str(error)}
    trainer.train()
    trainer.model.save_pretrained(out / "end")
    history = [log for log in trainer.state.log_history if "rewards/margins" in log]
    keys = ("rows", "strength", "effective_pairs", "token_share")
    return {
        "steps": steps,
        "margins": [log["rewards/margins"] for log in history],
        "plan": [{key: rule[key] for key in keys if rule.get(key) is not None} for rule in trainer.plan.rules],
        "gaps": [[row["predicted"], row["predicted_under_policy"]] for row in trainer.plan.concepts],
        "cpu_seconds": time.process_time() - began,
    }


def dealt(place: Place, run: Run, habit: str) -> Dataset:
    """The pairs with the weights that the balancing rule gives, dealt anew among all pairs: a sham of that rule."""
    rows, _ = place.rows(run.of)
    chosen, rejected = habits_of_sides(place, run.of)
    x = np.stack([np.ones(len(rows)), (chosen - rejected)[:, list(RATES).index(habit)]], axis=1)
    eta = balanced_weights(x, np.array([len(rows), 0.0]), np.ones(len(rows)))
    if eta is None:
        raise AnatomyError(f"No weights balance {habit} in {run.of}.")
    return rows.add_column("dealt", np.random.default_rng(6).permutation(np.exp(x @ eta)).tolist())


def rule_unit(place: Place, run: Run, habit: str, rule: str) -> bool:
    """One training under a rule, its responses, and what it is worth otherwise."""
    of = place.out / "rules" / slug(run.of) / habit
    fitted = done(place, str((of / "fit").relative_to(place.out)))
    if fitted is None or done(place, f"trainings/{slug(run.name)}") is None:
        return False
    folder = of / slug(f"{rule}, seed {run.seed}")

    def make() -> dict[str, Any]:
        told = train_rule(place, run, habit, rules(TARGETS[run.of, habit], fitted["gap"])[rule], folder)
        if "refused" in told:
            return told
        clock, model = time.process_time(), adapted(place, folder / "end")
        place.said(model, place.asked(run.of), folder / "responses.json", 0)
        told["sampling_cpu_seconds"] = time.process_time() - clock
        return told | {"worth": worth(place, run.of, model)}

    return made_once(folder, make)


# --- worth ---


@cache
def held_pairs(place: Place, name: str) -> Any:
    """Pairs of the prompts that were held out."""
    _, held = place.rows(name)
    asked = {prompt[0]["content"] for prompt in held}
    texts = [text for text in load(place.shared, name) if text[0] in asked and all(part.strip() for part in text)]
    drawn = np.random.default_rng(7).permutation(len(texts))[:LIKELY]
    return read_pairs(
        conversations([texts[i] for i in np.sort(drawn)]), place.tokenizer, max_length=TOKENS, truncation="keep_start"
    )


@cache
def two_choices(place: Place) -> Any:
    """Questions with a right and a wrong answer (TruthfulQA), as pairs."""
    file = place.shared / "data" / "pairs" / "permissive_upstream" / "truthfulqa_pairs.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    drawn = np.sort(np.random.default_rng(8).permutation(len(rows))[:CHOICES])
    return read_pairs(
        conversations([[rows[i][side] for side in ("prompt", "chosen", "rejected")] for i in drawn]),
        place.tokenizer,
        max_length=TOKENS,
        truncation="keep_start",
    )


@torch.no_grad()
def kept_format(place: Place, model: Any) -> list[float]:
    """Of each question, the probability that the first token is one of those asked for."""
    found = []
    for asks, allowed in FORMATS.items():
        tokens = [
            ids[0] for word in allowed if len(ids := place.tokenizer(word, add_special_tokens=False).input_ids) == 1
        ]
        for question in ASKED[asks]:
            turn = [{"role": "user", "content": f"{question} {asks}"}]
            ids = place.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            found.append(float(logits.softmax(-1)[tokens].sum()))
    return found


def worth(place: Place, name: str, model: Any) -> dict[str, Any]:
    """Mean log-probability per token of held-out chosen responses; each question's choice and format."""
    held, asked = held_pairs(place, name), two_choices(place)
    likely = log_likelihoods(model, held, range(len(held)), progress=False)
    choice = log_likelihoods(model, asked, range(len(asked)), progress=False)
    return {
        "chosen": likely[:, 0].tolist(),
        "rejected": likely[:, 1].tolist(),
        "right": (choice[:, 0] > choice[:, 1]).tolist(),
        "format": kept_format(place, model),
    }


def worth_unit(place: Place, run: Run, trained: bool) -> bool:
    """The same of the start model, or of plain DPO."""
    if trained and done(place, f"trainings/{slug(run.name)}") is None:
        return False

    def make() -> dict[str, Any]:
        model = adapted(place, place.out / "trainings" / slug(run.name) / "end") if trained else place.model
        return {"worth": worth(place, run.of, model)}

    return made_once(place.out / "rules" / slug(run.of) / (f"plain-{run.seed}" if trained else "start"), make)


# --- judging ---


def figures(place: Place, run: Run, habit: str, rule: str) -> dict[str, Any] | None:
    folder = place.out / "rules" / slug(run.of) / habit / slug(f"{rule}, seed {run.seed}")
    told = done(place, str(folder.relative_to(place.out)))
    if told is None or "refused" in told:
        return told
    of = place.out / "responses" / f"{slug(run.name)}-0"
    start = habit_values(list(map(str, sampled_responses(place.out / "start" / slug(run.of), "responses-0"))))
    plain = habit_values(list(map(str, sampled_responses(of, "end"))))
    ruled = habit_values(list(map(str, sampled_responses(folder, "responses"))))
    k, rest = list(RATES).index(habit), np.arange(len(RATES)) != list(RATES).index(habit)
    rates = [values.mean(axis=0) for values in (start, plain, ruled)]
    worths = {
        name: (done(place, f"rules/{slug(run.of)}/{of}") or {})["worth"]
        for name, of in (("start", "start"), ("plain DPO", f"plain-{run.seed}"))
    } | {"rule": told["worth"]}
    plan = told["plan"][0] if told["plan"] else {}
    return {
        "start": rates[0][k],
        "plain DPO": rates[1][k],
        "rate": rates[2][k],
        "error": math.sqrt(rates[2][k] * (1 - rates[2][k]) / len(ruled)),
        "recovery": recovery(*(float(rate[k]) for rate in rates)),
        "recovery, 95 %": resampled(place, run, start[:, k], plain[:, k], ruled[:, k]),
        "others, mean absolute change from plain DPO": float(np.abs(rates[2] - rates[1])[rest].mean()),
        "others, largest": float(np.abs(rates[2] - rates[1])[rest].max()),
        "plan": plan,
        "mean score gap, of all pairs and with the policy": told["gaps"][0] if told["gaps"] else None,
        "steps": told["steps"],
        "margin": float(np.mean(told["margins"][-4:])),
        "cpu_seconds": told["cpu_seconds"],
        "worth": {key: {name: float(np.mean(of[key])) for name, of in worths.items()} for key in worths["rule"]},
    }


def resampled(place: Place, run: Run, *values: np.ndarray) -> list[float]:
    """Interval of the recovery over prompts."""
    asked = np.unique([json.dumps(prompt) for prompt in place.asked(run.of)], return_inverse=True)[1]
    sums = [np.bincount(asked, each) for each in values]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        drawn = rng.integers(len(sums[0]), size=len(sums[0]))
        a, b, c = (float(each[drawn].sum()) for each in sums)
        found.append((b - c) / (b - a) if b != a else math.nan)
    return [float(np.nanquantile(found, q)) for q in (0.025, 0.975)]


# --- all of it ---


def units(place: Place, seed: int) -> Iterator[bool]:
    for (name, habit), asks in TARGETS.items():
        run = Run(name, seed)
        yield fit_unit(place, name, habit)
        for trained in (False, True):
            yield worth_unit(place, run, trained)
        for rule in rules(asks, 1.0):
            yield rule_unit(place, run, habit, rule)


def table(place: Place, seed: int) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for (name, habit), asks in TARGETS.items():
        told = {rule: figures(place, Run(name, seed), habit, rule) for rule in rules(asks, 1.0)}
        if any(told.values()):
            fitted = done(place, f"rules/{slug(name)}/{habit}/fit")
            found[f"{name}, {habit}"] = {"fit": fitted, "rules": {rule: of for rule, of in told.items() if of}}
    return found


def printed(found: Mapping[str, Any]) -> str:
    lines = []
    for name, of in found.items():
        lines.append(f"{name}\n{'':40}rate  recovery          others  right  format  likelihood")
        for rule, told in of["rules"].items():
            if "refused" in told:
                lines.append(f"  {rule:38}refused")
                continue
            low, high = told["recovery, 95 %"]
            worth = {key: each["rule"] for key, each in told["worth"].items()}
            lines.append(
                f"  {rule:38}{told['rate']:4.0%}  {told['recovery']:4.2f} [{low:5.2f}, {high:5.2f}]"
                f"  {told['others, mean absolute change from plain DPO']:5.1%}"
                f"  {worth['right']:5.1%}  {worth['format']:5.1%}  {worth['chosen']:6.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--sae", required=True, help="its SAE, as `trl-anatomy sae` makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the units of real_model.py; it holds text")
    parser.add_argument("--shared", type=Path, default=os.environ.get("TRL_ANATOMY_SHARED", "../shared"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="make nothing; record what is finished")
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = Place(given.model, given.sae, Path(given.shared), given.out)
    if not given.table:
        while not all([*units(place, given.seed)]):
            time.sleep(10)
    found = table(place, given.seed)
    print(printed(found))
    record = {
        "command": "python benchmarks/studies/real_rules.py --model SMOLLM2 --sae SAE --out FOLDER",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread",
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "seed": given.seed,
        "targets": found,
    }
    RESULT.write_text(json.dumps(without_nan(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
