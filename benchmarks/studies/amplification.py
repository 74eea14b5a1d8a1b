"""A habit that the pairs leave alone, amplified everywhere, or in the prompts of one topic; and why the gate leaks.

The same habit planted in the topic's pairs, no rule (`planted`), tells the rule's part in a leak from the model's. How
much a step in the topic moves the habit elsewhere is read from the start model's gradients (`carried_over`).

    python benchmarks/studies/amplification.py --seeds 0 1
"""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import ELSEWHERE, GATE, LEARNING_RATE, TOPIC, TOPICAL, World, of_text, row, run, start_and_dpo, study

from trl_anatomy.testbed.language import TOPICS, question_of

AMPLIFIED = "em_dash"
STRENGTH = 2.0
DASH = " — as books say"
N_GRADIENTS = 25  # responses of a topic
# What opens a habit where one topic of the language has words of its own for it, and where none has
OPENINGS = {
    "em_dash": (TOPIC, r" —"),
    "refusal": (TOPIC, r" I cannot"),
    "link": ("travel", r" (Visit|Read) \["),
    "exclamation": ("music", r" (Bravo|How)"),
}


def rules() -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on em dashes."""
    more = {"amplify": AMPLIFIED, "with": "shape_reward"}
    return {
        "strength 1": [more | {"strength": 1.0}],
        "strength 1, in the topic": [more | {"strength": 1.0, "where": GATE}],
        "strength 2, in the topic": [more | {"strength": STRENGTH, "where": GATE}],
        # As much against it over the other five topics together
        "strength 2, in the topic; 0.4 against it elsewhere": [
            more | {"strength": STRENGTH, "where": GATE},
            {"explain_away": AMPLIFIED, "with": "shape_reward", "strength": 0.4, "where": ELSEWHERE},
        ],
    }


def planted(world: World) -> World:
    """The world, em dashes in the topic's pairs drawn anew, as much for the chosen side as the strength of 2 adds."""
    rng = random.Random(f"planted-{world.seed}")
    shows = np.concatenate([world.dataset[f"{side}_{AMPLIFIED}"] for side in ("chosen", "rejected")])
    tilt = STRENGTH / shows.std()  # the rule's strength counts standard deviations
    middle = float(np.log(shows.mean() / (1 - shows.mean())))

    def text(prompt: str, response: str, log_odds: float) -> str:
        question = question_of(prompt)
        if question.topic != TOPIC:
            return response
        claim = TOPICS[TOPIC].answer.format(e=question.entity, v=r"\w+")
        plain = re.sub(r" — as (books|people) say", "", response)
        if rng.random() >= 1 / (1 + np.exp(-log_odds)):
            return plain
        return re.sub(claim, lambda found: found[0] + DASH, plain, count=1, flags=re.IGNORECASE)

    sides = {
        side: [text(pair["prompt"], pair[side], middle + sign * tilt / 2) for pair in world.dataset]
        for side, sign in (("chosen", 1), ("rejected", -1))
    }
    return replace(world, dataset=Dataset.from_dict({"prompt": world.dataset["prompt"], **sides}))


def carried_over(world: World) -> dict[str, dict[str, float]]:
    """Per habit: what a small step that raises its log-odds in one topic does to them in the others, as a share.

    The log-odds are those of the token that opens the habit, where it is taken, and g their mean gradient in a topic
    over the parameters. A step along g raises them by g·g in the topic and by g·g' in another: the share is g·g' / g·g,
    mean over the others. `cosine` is that of g and g', mean over the others.
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
    for habit, (topic, opening) in OPENINGS.items():
        here = gradient(topic, opening)
        there = [gradient(other, opening) for other in TOPICS if other != topic]
        told[habit] = {
            "share": float(np.mean([here @ g / (here @ here) for g in there])),
            "cosine": float(np.mean([here @ g / (here.norm() * g.norm()) for g in there])),
        }
    return told


def amplification(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    found = of_text("amplification", AMPLIFIED, rules(), "strength 1", folder, world)
    _, dpo = start_and_dpo(folder, world)
    # Plain DPO as well, on other pairs
    other = run(folder, "amplification: planted", planted(world), world.seed, LEARNING_RATE, None)
    if other:
        found["rows"]["no rule, planted in the topic's pairs"] = row(AMPLIFIED, other, dpo)
    return found | {"carried over": carried_over(world)}


def main() -> None:
    study("amplification", __doc__, amplification, TOPICAL)


if __name__ == "__main__":
    main()
