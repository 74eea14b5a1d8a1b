"""residualize: the margin carries how much likelier the start model finds a response once asked for a concept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...errors import AnatomyError
from ..fields import TEXT, Field, check, number
from ..where import Where
from .shape_reward import read_strength, signed_strength
from .verb import Needs, Verb


@dataclass(frozen=True)
class Residualize(Verb):
    """Add λ · A(y) to the score of every response in the gate: the loss becomes −log σ(β·D + λ·(A(y+) − A(y−))).

    A(y) = log pi0(y | asked or steered) − log pi0(y), in nats, is how much more likely the response becomes where the
    start model is asked for the concept by an instruction, or its hidden states are moved along the concept.

    Args:
        concept: name of the concept.
        sign: "explain_away" or "amplify".
        instruction: text that asks for the concept; it is put where `inoculate` puts it.
        steer: instead, α above 0: α times the concept's unit vector is added at the concept's layer.
        strength: a number above 0, or "auto" (explain_away only), fitted as that of `shape_reward`.
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range, neither or both of instruction and steer, amplify with strength "auto".

    Source: method.md section 8 (loss: residualised), section 12 (fitted strength).
    """

    verb: ClassVar[str] = "residualize"
    stage: ClassVar[str] = "margin"
    reads: ClassVar[str] = "pairs"
    not_for_reward: ClassVar[str] = "it gives no log-probabilities, which the rule compares"
    keys: ClassVar[Mapping[str, Field]] = {
        "strength": number(above=0, word="auto"),
        "instruction": TEXT,
        "steer": number(above=0),
    }

    concept: str
    sign: str
    instruction: str | None = None
    steer: float | None = None
    strength: float | str = "auto"
    where: Where | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        object.__setattr__(self, "strength", read_strength(self.verb, self.sign, self.strength))
        for key in ("instruction", "steer"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, check(self.verb, key, self.keys[key], getattr(self, key)))
        if (self.instruction is None) == (self.steer is None):
            what = "neither instruction nor steer" if self.steer is None else "both instruction and steer"
            raise AnatomyError(f"found {what}, allowed: one of them.")

    @property
    def needs(self) -> Needs:
        return Needs(likelihood=True)

    @property
    def fixed(self) -> float | None:
        """λ when the policy gives it, None when it is to be fitted."""
        return signed_strength(self.sign, self.strength)
