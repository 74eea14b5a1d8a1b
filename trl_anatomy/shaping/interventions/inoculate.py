"""inoculate: where the chosen response shows a concept, the policy is asked for it, so that it need not learn it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import NUMBER, TEXT, Field, check, one_of
from ..where import Where
from .verb import Verb


@dataclass(frozen=True)
class Inoculate(Verb):
    """Add an instruction that asks for the concept to the prompt that the policy sees; the reference sees the old one.

    Only in pairs whose chosen response shows the concept, and only in training.

    Args:
        concept: name of the concept.
        sign: "explain_away"; an instruction takes what it asks for out of what the weights learn, it adds nothing.
        instruction: text that asks for the concept.
        side: "both" (default) or "chosen": the responses before which the instruction stands.
        above: a chosen response shows the concept if it scores above; None for 0 (text rules, SAE latents) or the
            best-F1 threshold of a fitted scorer's card.
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range, or amplify.

    Source: method.md section 8 (input: inoculation).
    """

    verb: ClassVar[str] = "inoculate"
    stage: ClassVar[str] = "prompt"
    keys: ClassVar[Mapping[str, Field]] = {"instruction": TEXT, "side": one_of("chosen", "both"), "above": NUMBER}

    concept: str
    sign: str
    instruction: str
    side: str = "both"
    above: float | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        for key, field in self.keys.items():
            if getattr(self, key) is not None or key != "above":
                object.__setattr__(self, key, check(self.verb, key, field, getattr(self, key)))
        if self.sign == "amplify":
            raise AnatomyError(
                "found amplify, allowed: explain_away. A policy that is asked for the concept learns less of it; to "
                "amplify, use shape_reward."
            )

    @property
    def asks_above(self) -> bool:
        """Whether the threshold is the scorer's own."""
        return self.above is None

    def flagged(self, chosen: np.ndarray, threshold: float, gate: np.ndarray) -> np.ndarray:
        """(n_pairs,) bool: pairs of the gate whose chosen response, scored (n_pairs,), shows the concept."""
        return gate & (chosen > threshold)
