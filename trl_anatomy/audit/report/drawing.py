"""Places of the small drawings, in their own units."""

import math
from collections.abc import Mapping
from typing import Any

SIDES = ("chosen", "rejected")
# Length of an axis of rates or amounts; what `scale` stands for lies at its end.
WIDTH = 220.0
# Right ends that an axis of shares may have.
ENDS = (0.1, 0.2, 0.5, 1.0)


def share_scale(values: list[float]) -> float:
    """Right end of an axis that holds all of some shares: 10, 20, 50 or 100 %.

    >>> share_scale([0.04, 0.13]), share_scale([])
    (0.2, 0.1)
    """
    largest = max((value for value in values if not math.isnan(value)), default=0.0)
    return next((end for end in ENDS if largest <= end), 1.0)


def place(value: float | None, scale: float = 1.0) -> float | None:
    """Where a rate or an amount lies on the axis; None where it is unknown.

    >>> place(0.5), place(3.0, 2.0), place(float("nan"))
    (110.0, 220.0, None)
    """
    if value is None or math.isnan(value):
        return None
    return round(WIDTH * max(0.0, min(1.0, value / scale)), 1)


def both_sides(row: Mapping[str, Any], scale: float) -> dict[str, dict[str, float | None]]:
    """Dots of chosen and rejected, each with its own interval.

    Args:
        row: `chosen` and `rejected`, with `_low` and `_high`.
        scale: what the right end stands for.
    """
    ends = {"at": "", "low": "_low", "high": "_high"}
    return {side: {key: place(row[f"{side}{end}"], scale) for key, end in ends.items()} for side in SIDES}


def paired(row: Mapping[str, Any], scale: float) -> dict[str, dict[str, float | None]]:
    """Dots of chosen and rejected, and the interval of their difference around the chosen one.

    Args:
        row: `chosen`, `rejected`, `difference_low` and `difference_high`.
        scale: what the right end stands for.
    """
    rejected = row["rejected"]
    return {
        "rejected": {"at": place(rejected, scale), "low": None, "high": None},
        "chosen": {
            "at": place(row["chosen"], scale),
            "low": place(_sum(rejected, row["difference_low"]), scale),
            "high": place(_sum(rejected, row["difference_high"]), scale),
        },
    }


def _sum(a: float | None, b: float | None) -> float:
    return math.nan if a is None or b is None else a + b
