"""Refusals through DPO on pairs that punish them: rules that keep them, or ask for more, everywhere or in one topic.

Recorded: refusals in the prompts of that topic and in the others (over-refusal), right answers, other habits.

    python benchmarks/studies/safeguards.py --seeds 0 1
"""

from pathlib import Path
from typing import Any

from worlds import GATE, TOPICAL, World, of_text, study

KEPT = "refusal"


def rules() -> dict[str, list[dict[str, Any]]]:
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


def safeguards(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    return of_text("safeguards", KEPT, rules(), "auto", folder, world)


def main() -> None:
    study("safeguards", __doc__, safeguards, TOPICAL)


if __name__ == "__main__":
    main()
