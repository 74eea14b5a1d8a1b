"""How often a text rule or a named habit holds: the measurement that needs neither a model nor an SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import datasets
import evaluate
import numpy as np

from ..audit.stats import rate_interval as rate_interval  # what other modules and users find here
from ..reading.habits import HABITS, Habit, measure

Rules: TypeAlias = Mapping[str, str | Habit]

TEXT_RULES: Mapping[str, Habit] = {name: habit for name, habit in HABITS.items() if habit.kind == "rate"}
"""The habits of the library that a response has or has not (docs/reference/habits.md)."""


class ConceptRate(evaluate.Measurement):
    """Share of responses in which each text rule is found.

    Loads without a hub, and works with `evaluate.combine`.

    Args:
        rules: name -> habit, or a regular expression searched with `re.search`. Default: `TEXT_RULES`.

    Example:

    ```python
    >>> from trl_anatomy.checking.rates import ConceptRate
    >>> ConceptRate({"bold": r"[*][*].+[*][*]"}).compute(data=["**yes**", "no"])
    {'bold': 0.5}

    ```
    """

    def __init__(self, rules: Rules | None = None, **kwargs: Any) -> None:
        self.rules = dict(TEXT_RULES if rules is None else rules)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="Share of texts that have a habit, or in which a regular expression is found, per rule.",
            citation="",
            inputs_description="data: list of texts",
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data: Iterable[str]) -> dict[str, float]:
        texts = list(data)
        return {name: float(np.mean(found)) for name, found in rule_hits(texts, self.rules).items()}


class ResponseLength(evaluate.Measurement):
    """Mean and median number of words of responses. Loads without a hub, and works with `evaluate.combine`.

    Example:

    ```python
    >>> from trl_anatomy.checking.rates import ResponseLength
    >>> ResponseLength().compute(data=["one two", "one", "one two three four five six"])
    {'mean_words': 3.0, 'median_words': 2.0}

    ```
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="Words per text: mean and median.",
            citation="",
            inputs_description="data: list of texts",
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(self, data: Iterable[str]) -> dict[str, float]:
        words = word_counts(data)
        return {"mean_words": float(np.mean(words)), "median_words": float(np.median(words))}


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
