"""How often a text rule holds: the measurement that needs neither a model nor an SAE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats

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


def rate_interval(hits: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Rate with its Wilson score interval.

    Args:
        hits: bool, shape (n,).
        confidence: coverage of the interval.

    Returns:
        (rate, low, high); (nan, nan, nan) where `hits` is empty.
    """
    if len(hits) == 0:
        return float("nan"), float("nan"), float("nan")
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(confidence, method="wilson")
    return float(hits.mean()), float(interval.low), float(interval.high)


def recovery(start: float, trained: float, shaped: float) -> float:
    """Share of the way back to the start model that a policy achieves (method.md section 10).

    0 is the rate of plain training, 1 the rate of the start model; above 1 is too far. NaN where training moved
    nothing.
    """
    return (trained - shaped) / (trained - start) if trained != start else float("nan")
