"""Refusals through DPO on pairs that punish them everywhere: where they are wanted, and where they are over-refusals.

The start model refuses in one topic, in place of an answer, and elsewhere seldom. Rules on refusals of growing strength
draw the frontier: refusals in the topic against refusals, and right answers, in the others. Recorded with it: the same
in that topic only; a neutral habit, next to no strength and swapped sides as controls.

    python benchmarks/studies/safeguards.py --seeds 0 1
"""

from pathlib import Path
from typing import Any

from worlds import GATE, TOPIC, World, carried_over, forbidding, of_text, study

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


def safeguards(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    found = of_text("safeguards", KEPT, rules(), "auto", world.path, world)
    return found | {"carried over": carried_over(world, {KEPT: (TOPIC, r" ?I cannot")})}


def main() -> None:
    study("safeguards", __doc__, safeguards, COLUMNS, forbidding)


if __name__ == "__main__":
    main()
