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
from datasets import Dataset
from worlds import (
    ELSEWHERE,
    GATE,
    LEARNING_RATE,
    TOPIC,
    TOPICAL,
    World,
    carried_over,
    of_text,
    row,
    run,
    start_and_dpo,
    study,
)

from trl_anatomy.testbed.language import TOPICS, question_of

AMPLIFIED = "em_dash"
STRENGTH = 2.0
DASH = " — as books say"
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


def amplification(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    found = of_text("amplification", AMPLIFIED, rules(), "strength 1", folder, world)
    _, dpo = start_and_dpo(folder, world)
    # Plain DPO as well, on other pairs
    other = run(folder, "amplification: planted", planted(world), world.seed, LEARNING_RATE, None)
    if other:
        found["rows"]["no rule, planted in the topic's pairs"] = row(AMPLIFIED, other, dpo)
    return found | {"carried over": carried_over(world, OPENINGS)}


def main() -> None:
    study("amplification", __doc__, amplification, TOPICAL)


if __name__ == "__main__":
    main()
