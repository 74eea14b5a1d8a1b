"""Refusals in place of an answer, through DPO on pairs that punish them everywhere: wanted in one topic only.

The start model refuses in one topic, in place of an answer, and elsewhere seldom. Rules on refusals of growing strength
draw the frontier: refusals in the topic against refusals, and right answers, in the others. Recorded with it: the same
in that topic only; a neutral habit, next to no strength and swapped sides as controls.

    python benchmarks/studies/refusals.py --seeds 0 1
"""

from pathlib import Path
from typing import Any

from worlds import FORBIDDING, GATE, TOPIC, World, carried_over, of_text, study

from trl_anatomy.testbed.world import build_world

KEPT = "refusal"
COLUMNS = ("in the topic", "in the others", "right answers in the others", "other habits, mean absolute change")


def rules() -> dict[str, list[dict[str, Any]]]:
    """Name -> rules on refusals."""
    auto = {"explain_away": KEPT, "with": "shape_reward"}  # the pairs punish it, so the fitted strength is negative
    more = {"amplify": KEPT, "with": "shape_reward"}
    return {
        "amplify, strength 0.6": [more | {"strength": 0.6}],
        "auto": [auto],
        "amplify, strength 2": [more | {"strength": 2.0}],
        "auto, in the topic": [auto | {"where": GATE}],
        "amplify, strength 2, in the topic": [more | {"strength": 2.0, "where": GATE}],
    }


def forbidding(folder: Path, seed: int) -> tuple[World, dict[str, Any]]:
    """The world of `FORBIDDING`, and no readings."""
    return build_world(folder / "forbidding" / "world", FORBIDDING, seed), {}


def refusals(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    found = of_text("refusals", KEPT, rules(), "auto", world.path.parent, world)
    return found | {"carried over": carried_over(world, {KEPT: (TOPIC, r" ?I cannot")})}


def main() -> None:
    study("refusals", __doc__, refusals, COLUMNS, forbidding)


if __name__ == "__main__":
    main()
