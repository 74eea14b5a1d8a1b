"""project_out: a concept's directions are removed from hidden states, or from the gradient of some weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import FLAG, PATTERN, Field, check, one_of
from ..where import Where
from .ablate_features import check_removal
from .verb import Needs, Verb


@dataclass(frozen=True)
class ProjectOut(Verb):
    """Remove the span of the concept's directions while the model trains.

    From the hidden states at the concept's layer, or from the gradient of the weights that `weights` finds, on the side
    on which they write or read the residual stream. The reference, evaluation and the saved model are not edited,
    unless `keep` says so.

    Args:
        concept: name of the concept: a direction, or SAE features (the span of their decoder rows).
        sign: "explain_away".
        from_: "hidden" or "gradient"; `from` in a policy.
        weights: gradient: regular expression searched for in the names of the parameters.
        keep: hidden, reward models: the edit stays in evaluation and is saved with the model.
        where: hidden: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range, amplify, or keys that do not go together.

    Source: method.md section 8 (activations: projection).
    """

    verb: ClassVar[str] = "project_out"
    stage: ClassVar[str] = "hidden"
    scorers: ClassVar[tuple[str, ...] | None] = ("features", "direction", "probe")
    keys: ClassVar[Mapping[str, Field]] = {"from": one_of("hidden", "gradient"), "weights": PATTERN, "keep": FLAG}

    concept: str
    sign: str
    from_: str = "hidden"
    weights: str | None = None
    keep: bool = False
    where: Where | None = None

    def __post_init__(self) -> None:
        check_removal(self.verb, self.sign, self.keep, self.where)
        check(self.verb, "from", self.keys["from"], self.from_)
        if self.weights is not None:
            check(self.verb, "weights", self.keys["weights"], self.weights)
        if (self.from_ == "gradient") != (self.weights is not None):
            raise AnatomyError(
                f"found from: {self.from_} {'without' if self.weights is None else 'with'} weights, allowed: weights "
                "(a regular expression over names of parameters) with from: gradient, and only there."
            )
        if self.from_ == "gradient" and (self.keep or self.where is not None):
            raise AnatomyError(
                f"found {'keep' if self.keep else 'where'} with from: gradient, allowed: neither. A gradient is of the "
                "whole batch, and there is none after training."
            )

    @property
    def needs(self) -> Needs:
        return Needs(scores=False)

    def strengths(self, gap: np.ndarray | None, rows: np.ndarray, acts: np.ndarray) -> np.ndarray:
        """(n_pairs, 2): 1 on both sides of the pairs on which the rule acts, else 0."""
        return np.repeat(acts[:, None].astype(float), 2, axis=1)
