"""Rates and lengths as measurements of `evaluate`, which `trl_anatomy.checking.rates` gives out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np

from .rates import TEXT_RULES, Rules, rule_hits, word_counts


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
