"""Concept scorers, one file each.

A text rule scores a response's text. Every other scorer gives each token of a response a number from the hidden state
at one layer of the frozen start model, and a reduction over the response's tokens (method.md section 9).
"""

from typing import Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from ...errors import AnatomyError
from .text import TextScorer

REDUCTIONS = ("max", "mean", "sum")


class HiddenScorer(Protocol):
    """What a scorer on hidden states has to offer."""

    layer: int
    reduce: str

    def score_tokens(self, hidden: Tensor) -> Tensor:
        """(n_tokens, d_model) float32 -> (n_tokens,) float32."""

    def check(self, model: Any) -> None:
        """Raise AnatomyError where the scorer does not fit the model."""

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""


Scorer: TypeAlias = TextScorer | HiddenScorer


def shown_above(scorer: Scorer, *, token: bool = False) -> float | None:
    """The score above which a response (or a token) shows the concept; None where nothing says.

    0 for text rules and SAE latents; the best-F1 threshold of the held-out texts where a fitted scorer's card has one,
    for tokens only if the score of a text is that of its highest token.
    """
    card = getattr(scorer, "card", None)
    if card is None:
        return 0.0
    reduce = getattr(scorer, "reduce", None)
    found = card.get("held_out", {}).get("threshold")
    if found is None or card.get("reduce", reduce) != reduce or (token and reduce != "max"):
        return None
    return float(np.nextafter(found, -np.inf))  # the card's metrics count a score at the threshold as shown


def check_reduce(reduce: str) -> str:
    """`reduce` itself, or AnatomyError where it is not one of max, mean, sum."""
    if reduce not in REDUCTIONS:
        raise AnatomyError(f"reduce is {reduce!r}; allowed: {', '.join(REDUCTIONS)}.")
    return reduce


def reduce_tokens(scores: Tensor, reduce: str) -> float:
    """One number from the scores (n_tokens,) of a response; 0.0 where it has no token."""
    if not len(scores):
        return 0.0
    if reduce == "max":
        return float(scores.max())
    return float(scores.double().mean() if reduce == "mean" else scores.double().sum())
