"""How often a text rule or a named habit holds: the measurement that needs neither a model nor an SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from ..audit.stats import rate_interval as rate_interval  # what other modules and users find here
from ..errors import require
from ..reading.habits import HABITS, Habit, measure

Rules: TypeAlias = Mapping[str, str | Habit]

TEXT_RULES: Mapping[str, Habit] = {name: habit for name, habit in HABITS.items() if habit.kind == "rate"}
"""The habits of the library that a response has or has not (docs/reference/habits.md)."""


def __getattr__(name: str) -> Any:
    if name not in ("ConceptRate", "ResponseLength"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("evaluate")
    return getattr(import_module(f"{__package__}.measurements"), name)


def word_counts(texts: Iterable[str]) -> np.ndarray:
    """Words of each text, as the habit `words` counts them: int, shape (n_texts,)."""
    return np.array([HABITS["words"].value(text) for text in texts], dtype=np.int64)


def rule_hits(texts: Iterable[str], rules: Rules) -> dict[str, np.ndarray]:
    """Where each rule holds.

    Args:
        rules: name -> habit, or regular expression.

    Returns:
        name -> bool array of shape (n_texts,).
    """
    habits = {
        name: rule if isinstance(rule, Habit) else Habit("rule", rule, rule, pattern=rule, reads="text")
        for name, rule in rules.items()
    }
    found = measure(texts, habits) != 0
    return {name: found[:, k] for k, name in enumerate(habits)}


def recovery(start: float, trained: float, shaped: float) -> float:
    """Share of the way back to the start model that a policy achieves (method.md section 10).

    0 is the rate of plain training, 1 the rate of the start model; above 1 is too far. NaN where training moved
    nothing.
    """
    return (trained - shaped) / (trained - start) if trained != start else float("nan")


def off_target(
    start: Mapping[str, float], trained: Mapping[str, float], shaped: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """The off-target matrix: what a policy against each target does to every habit (method.md section 10).

    Args:
        start: habit -> rate of the start model.
        trained: habit -> rate after plain training.
        shaped: target -> habit -> rate after training with a policy against that target.

    Returns:
        target -> habit -> `recovery` (share of the way back to the start model, NaN where plain training moved nothing)
        and `change` (rate minus plain training's). Where habit is target the policy was to act, elsewhere it was not.

    Example:
        >>> matrix = off_target({"bold": 0.3, "emoji": 0.2}, {"bold": 0.8, "emoji": 0.6}, {
        ...     "bold": {"bold": 0.3, "emoji": 0.5}
        ... })
        >>> matrix["bold"]["bold"]["recovery"], round(matrix["bold"]["emoji"]["change"], 3)
        (1.0, -0.1)
    """
    return {
        target: {
            habit: {"recovery": recovery(start[habit], trained[habit], rate), "change": rate - trained[habit]}
            for habit, rate in rates.items()
        }
        for target, rates in shaped.items()
    }


def off_target_table(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The matrix as a Markdown table, in points: a row per target, a column per habit, `change` in each cell."""
    habits = list(next(iter(matrix.values()), {}))
    lines = ["| policy against | " + " | ".join(habits) + " |", "|---" * (len(habits) + 1) + "|"]
    for target, effects in matrix.items():
        cells = [f"{100 * effects[habit]['change']:+.1f}" for habit in habits]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
