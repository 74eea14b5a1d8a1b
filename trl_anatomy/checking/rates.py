"""How often a text rule holds: the measurement that needs neither a model nor an SAE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

from ..audit.stats import mean_test

TEXT_RULES: Mapping[str, str] = {
    "bold": r"\*\*[^*\n]+\*\*",
    "bullet": r"(?m)^\s*[-*•]\s+\S",
    "numbered": r"(?m)^\s*\d+[.)]\s+\S",
    "header": r"(?m)^#{1,6}\s+\S",
    "table": r"(?m)^\s*\|.+\|\s*$",
    "horizontal_rule": r"(?m)^\s*(-{3,}|\*{3,}|_{3,})\s*$",
    "code_fence": r"```",
    "link": r"https?://|\[[^\]]+\]\([^)]+\)",
    "emoji": "[\U0001f300-\U0001faff\u2600-\u27bf]",
    "em_dash": "\u2014",
    "exclamation": r"!",
    "refusal": r"(?i)^\W*(i'?m sorry|i am sorry|sorry,|i can(?:no|')t (?:help|assist|provide|do)|"
    r"i(?: a|')m (?:unable|not able))",
    "flattery": r"(?i)^\W*(great|excellent|wonderful|fantastic|what an? (?:great|excellent|wonderful))\b",
    "hedging": r"(?i)\b(perhaps|maybe|might be|it depends|i think|possibly)\b",
}
"""Regular expressions by concept, searched in a response. Simple on purpose: a reader can check each by eye."""


class ConceptRate(evaluate.Measurement):
    """Share of responses in which each text rule is found.

    Loads without a hub, and works with `evaluate.combine`.

    Args:
        rules: name -> regular expression, searched with `re.search`. Default: `TEXT_RULES`.

    Example:

    ```python
    >>> from trl_anatomy.checking.rates import ConceptRate
    >>> ConceptRate({"bold": r"[*][*].+[*][*]"}).compute(data=["**yes**", "no"])
    {'bold': 0.5}

    ```
    """

    def __init__(self, rules: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        self.rules = dict(TEXT_RULES if rules is None else rules)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="Share of texts in which a regular expression is found, per rule.",
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
    """Words of each text, split at white space: int, shape (n_texts,)."""
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def rule_hits(texts: Iterable[str], rules: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Where each rule is found.

    Returns:
        name -> bool array of shape (n_texts,).
    """
    texts = list(texts)
    compiled = {name: re.compile(pattern) for name, pattern in rules.items()}
    return {
        name: np.fromiter((pattern.search(text) is not None for text in texts), dtype=bool, count=len(texts))
        for name, pattern in compiled.items()
    }


def rate_interval(
    hits: np.ndarray, confidence: float = 0.95, *, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Rate with its Wilson score interval.

    Args:
        hits: bool, shape (n,).
        confidence: coverage of the interval.
        groups: (n,) prompt of each response: several responses to one prompt tell less than as many prompts. They
            count as what would vary as much by itself (Korn and Graubard 1998: n over the design effect), and as one a
            prompt where all or none of them are hits. Default: every response its own.

    Returns:
        (rate, low, high); (nan, nan, nan) where `hits` is empty.
    """
    n = float(len(hits))
    if n == 0:
        return float("nan"), float("nan"), float("nan")
    rate = float(hits.mean())
    if groups is not None and (n_groups := len(np.unique(groups))) < n:
        _, (error,), _ = mean_test(np.asarray(hits, dtype=np.float64)[:, None], groups)
        n = min(n, rate * (1 - rate) / error**2) if error > 0 else float(n_groups)
    z = stats.norm.ppf(0.5 + confidence / 2)
    middle, half = rate + z**2 / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return rate, float(max(0.0, low)) if rate > 0 else 0.0, float(min(1.0, high)) if rate < 1 else 1.0


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
