"""Concept scorers, one file each.

A text rule scores a response's text. Every other scorer gives each token of a response a number from the hidden state
at one layer of the frozen start model, and a reduction over the response's tokens (method.md section 9).
"""

from typing import TypeAlias

import numpy as np

from .habit import HabitScorer
from .hidden import HiddenScorer
from .text import TextRule, TextScorer

Scorer: TypeAlias = TextRule | HiddenScorer


def shown_above(scorer: Scorer, *, token: bool = False) -> float | None:
    """The score above which a response (or a token) shows the concept; None where nothing says.

    0 for text rules and SAE latents, None for habits that are amounts; the threshold of a fitted scorer's card, for
    tokens only if the score of a text is that of its highest token.
    """
    if isinstance(scorer, TextRule):
        return scorer.above
    if scorer.kind == "features":
        return 0.0
    found = scorer.card.get("threshold")
    if found is None or scorer.card.get("reduce", scorer.reduce) != scorer.reduce or (token and scorer.reduce != "max"):
        return None
    return float(np.nextafter(found, -np.inf))  # the card's metrics count a score at the threshold as shown


__all__ = ["HabitScorer", "HiddenScorer", "Scorer", "TextRule", "TextScorer", "shown_above"]
