"""Controls of a rule on flattery by SAE latents.

A latent that fires as often and stands for no habit, with the strength that was fitted for flattery; a strength of next
to nothing; and the rule on pairs whose sides were swapped at random.

    python benchmarks/studies/controls.py --seeds 0 1
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from worlds import LEARNING_RATE, TOPICAL, World, concepts, correlations, no_habit, row, run, start_and_dpo, study

REWARDED = "flattery"


def controls(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    """The rule on flattery, and its three controls."""
    named = concepts(world, REWARDED, readings, folder)
    target = f"{REWARDED}_latents"

    def trained(name: str, rule: dict[str, Any], world: World = world) -> dict[str, Any]:
        policy = {"version": 1, "concepts": named, "rules": [{"with": "shape_reward", **rule}]}
        return run(folder, name, world, world.seed, LEARNING_RATE, policy)

    start, dpo = start_and_dpo(folder, world)
    # By its name a run of benchmarks/studies/verbs.py
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


def main() -> None:
    study("controls", __doc__, controls, ("rate", *TOPICAL[2:]))


if __name__ == "__main__":
    main()
