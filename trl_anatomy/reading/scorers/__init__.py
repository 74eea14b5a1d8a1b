"""Concept scorers, one file each.

A text rule scores a response's text. Every other scorer gives each token of a response a number from the hidden state
at one layer of the frozen start model, and a reduction over the response's tokens (method.md section 9).
"""

from typing import TypeAlias

from .hidden import HiddenScorer
from .text import TextScorer

Scorer: TypeAlias = TextScorer | HiddenScorer

__all__ = ["HiddenScorer", "Scorer", "TextScorer"]
