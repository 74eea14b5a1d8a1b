"""A habit that the pairs leave alone, amplified everywhere, or in the prompts of one topic.

python benchmarks/studies/amplification.py --seeds 0 1
"""

from pathlib import Path
from typing import Any

from worlds import ELSEWHERE, GATE, TOPICAL, World, of_text, study

AMPLIFIED = "em_dash"


def rules() -> dict[str, list[dict[str, Any]]]:
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


def amplification(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    return of_text("amplification", AMPLIFIED, rules(), folder, world)


def main() -> None:
    study("amplification", __doc__, amplification, TOPICAL)


if __name__ == "__main__":
    main()
