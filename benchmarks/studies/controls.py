"""Controls of a rule on flattery by SAE latents.

A latent that fires as often and stands for no habit, with the strength that was fitted for flattery; a strength of next
to nothing; and the rule on pairs whose sides were swapped at random.

    python benchmarks/studies/controls.py --seeds 0 1
"""

from pathlib import Path
from typing import Any

import numpy as np
from worlds import (
    LEARNING_RATE,
    SWAPPED,
    TOPICAL,
    World,
    checks,
    concepts,
    correlations,
    no_habit,
    row,
    run,
    start_and_dpo,
    study,
)

REWARDED = "flattery"


def controls(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    """The rule on flattery, and its three controls."""
    named = concepts(world, REWARDED, readings, folder)
    target = f"{REWARDED}_latents"

    def trained(name: str, rule: dict[str, Any], world: World = world) -> dict[str, Any]:
        policy = {"version": 1, "concepts": named, "rules": [rule]}
        return run(folder, name, world, world.seed, LEARNING_RATE, policy)

    start, dpo = start_and_dpo(folder, world)
    # By its name a run of benchmarks/studies/verbs.py
    explained = {"explain_away": target, "with": "shape_reward"}
    rule = trained(f"{REWARDED}: shape_reward, SAE latents, auto", explained)
    rate, phi = correlations(world, folder)
    [best] = readings[REWARDED]["features"]
    other = no_habit(rate, phi, best)
    named["no_habit"] = named[target] | {"features": [other]}
    found = checks(explained, target, "no_habit", rule["plan"][0]["strength"], world)
    against = {name: trained(f"controls: {name}", *check) for name, check in found.items()}
    runs = {"start": start, "plain DPO": dpo, "the rule": rule, **against}
    return {
        # Pairs with swapped sides teach nothing, so that model is compared with the start model
        "rows": {name: row(REWARDED, one, start if SWAPPED in name else dpo) for name, one in runs.items() if one},
        "latents, of flattery and of no habit": [best, other],
        "share of responses they fire in": [float(rate[best]), float(rate[other])],
        "largest phi of the latent of no habit": float(np.abs(phi[:, other]).max()),
    }


def main() -> None:
    study("controls", __doc__, controls, ("rate", *TOPICAL[2:]))


if __name__ == "__main__":
    main()
