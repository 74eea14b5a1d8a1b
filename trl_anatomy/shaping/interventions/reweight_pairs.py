"""reweight_pairs: pairs count more or less, so that together they say less (or more) about a concept."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import AnatomyError
from ..fields import NAMES_OR_NONE, TEXT, Field, number
from ..where import Where
from .verb import Verb


@dataclass(frozen=True)
class ReweightPairs(Verb):
    """Weigh the loss of each pair in the gate: by balanced weights, or by a column of the dataset.

    Balanced weights are those closest to uniform (Kullback-Leibler divergence, mean 1) under which the mean score gap
    of the concept is (1 − strength) times what it was for "explain_away", (1 + strength) times for "amplify", while the
    mean gaps of the held concepts stay (`trl_anatomy.shaping.weights`).

    Args:
        concept: name of the concept; None with `column`.
        sign: "explain_away" or "amplify"; None with `column`.
        strength: share of the gap that is taken away, above 0, at most 1 (default 1: all of it), or added.
        hold: concepts whose mean gap stays as it is; None for all of the policy that no such rule acts on.
        column: instead of all that: a column of the dataset with weights, used as they are.
        where: the gate; None for all pairs. Outside it a pair weighs 1.

    Raises:
        AnatomyError: a value out of range, keys that do not go together, or amplify without a strength.

    Source: method.md section 8 (reweight), section 12 (balanced weights).
    """

    verb: ClassVar[str] = "reweight_pairs"
    stage: ClassVar[str] = "weight"
    reads: ClassVar[str] = "pairs"
    instead: ClassVar[str] = "column"
    keys: ClassVar[Mapping[str, Field]] = {"strength": number(above=0), "hold": NAMES_OR_NONE, "column": TEXT}

    concept: str | None = None
    sign: str | None = None
    strength: float | None = None
    hold: tuple[str, ...] | None = None
    column: str | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        self.check_given_keys()
        if self.column is not None:
            beside = [key for key in ("concept", "sign", "strength", "hold") if getattr(self, key) is not None]
            if beside:
                found = beside[0] if beside[0] in self.keys else "explain_away or amplify"
                raise AnatomyError(
                    f"found {found} beside column, allowed: column alone; its weights are used as given."
                )
            return
        self.check_sign()
        if self.concept is None:
            raise AnatomyError("found no concept, allowed: the name of one, or a column.")
        if self.sign == "amplify" and self.strength is None:
            raise AnatomyError("found no strength with amplify, allowed: a number above 0; how much to add is yours.")
        if self.sign == "explain_away" and self.strength is not None and self.strength > 1:
            raise AnatomyError(
                f"found {self.strength:g} with explain_away, allowed: a number above 0, at most 1; 1 takes all of the "
                "gap away."
            )
        if self.hold is not None and self.concept in self.hold:
            raise AnatomyError(f"found {self.concept!r}, the rule's own concept, in hold, allowed: other concepts.")

    def held(self, concepts: Collection[str], rules: Sequence[Any]) -> tuple[str, ...]:
        if self.concept is None:
            return ()
        if self.hold is not None:
            return self.hold
        weighed = {other.concept for other in rules if isinstance(other, ReweightPairs)}
        return tuple(name for name in concepts if name not in weighed)

    @property
    def signed(self) -> float | None:
        """The strength in use, negative where it amplifies; None with a column."""
        return None if self.column is not None else 1 - self.factor

    @property
    def factor(self) -> float:
        """What the mean gap of the concept is multiplied by."""
        strength = 1.0 if self.strength is None else self.strength
        return 1 - strength if self.sign == "explain_away" else 1 + strength

    def balanced(self, gap: np.ndarray) -> np.ndarray:
        """(n_pairs,) what the weights balance, from the concept's score gaps."""
        return gap
