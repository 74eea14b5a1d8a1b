"""ablate_features: SAE latents are taken out of hidden states while the model trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import FLAG, Field, check, number, one_of
from ..where import Where
from .verb import Needs, Verb


@dataclass(frozen=True)
class AblateFeatures(Verb):
    """Subtract what the concept's SAE latents add to the hidden states at its layer; the SAE's error term stays.

    The reference, evaluation and the saved model are not edited, unless `keep` says so.

    Args:
        concept: name of the concept, SAE features.
        sign: "explain_away".
        strength: share of the latents' contribution that goes, above 0, at most 1.
        keep: reward models: the edit stays in evaluation and is saved with the model.
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range, amplify, or `keep` with a gate.

    Source: method.md section 8 (activations: ablation).
    """

    verb: ClassVar[str] = "ablate_features"
    stage: ClassVar[str] = "hidden"
    scorers: ClassVar[tuple[str, ...] | None] = ("features",)
    keys: ClassVar[Mapping[str, Field]] = {"strength": number(above=0, most=1), "keep": FLAG}

    concept: str
    sign: str
    strength: float = 1.0
    keep: bool = False
    where: Where | None = None

    def __post_init__(self) -> None:
        check_removal(self.verb, self.sign, self.keep, self.where)
        object.__setattr__(self, "strength", check(self.verb, "strength", self.keys["strength"], self.strength))

    @property
    def needs(self) -> Needs:
        return Needs(scores=False)

    def strengths(self, gap: np.ndarray | None, rows: np.ndarray, acts: np.ndarray) -> np.ndarray:
        """(n_pairs, 2): 1 on both sides of the pairs on which the rule acts, else 0."""
        return np.repeat(acts[:, None].astype(float), 2, axis=1)


def check_removal(verb: str, sign: str, keep: bool, where: Where | None) -> None:
    """What verbs that take a concept out of hidden states refuse alike."""
    check(verb, "sign", one_of("explain_away", "amplify"), sign)
    check(verb, "keep", FLAG, keep)
    if sign == "amplify":
        raise AnatomyError(
            f"found amplify with {verb}, allowed: explain_away. Taking a concept out of hidden states cannot add to "
            "it; amplify with steer or shape_reward."
        )
    if keep and where is not None:
        raise AnatomyError(f"found keep with a gate (where), allowed: {verb} with one of them. Nothing gates a reward.")
