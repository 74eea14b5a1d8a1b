"""What every verb of a policy is: what it says of itself before it meets a pair."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..fields import Field, check, one_of
from ..where import Where


@dataclass(frozen=True)
class Needs:
    """What has to be read of the pairs before a rule can be settled.

    Attributes:
        scores: the score of each response.
        tokens: the score of each token.
        likelihood: how likely the start model finds tokens.
        turns: where the last user turn of each prompt begins.
    """

    scores: bool = True
    tokens: bool = False
    likelihood: bool = False
    turns: bool = False


class Verb:
    """A rule of a policy. Each verb is a frozen dataclass of its keys, in a file of its own.

    Attributes:
        verb: its name in a policy.
        reads: "pairs" or "rows" (of SFT data), where it reads one of the two; "" where it reads both.
        stage: where in training it acts: "rows", "tokens", "prompt", "weight", "margin" or "hidden".
        keys: the keys it takes beside sign, verb and gate.
        scorers: the scorers of concepts it takes; None for all that give a score.
        instead: a key that may stand in the place of sign and concept; "" for none.
        not_for_reward: why it does not act on a reward model; "" where it does.
        on_text: whether it can act on one text, without a pair.
        concept: name of the concept; None with `instead`.
        sign: "explain_away" or "amplify"; None with `instead`.
        where: the gate; None for all pairs.
    """

    verb: ClassVar[str]
    reads: ClassVar[str] = ""
    stage: ClassVar[str]
    keys: ClassVar[Mapping[str, Field]]
    scorers: ClassVar[tuple[str, ...] | None] = None
    instead: ClassVar[str] = ""
    not_for_reward: ClassVar[str] = ""
    on_text: ClassVar[bool] = False

    concept: str | None
    sign: str | None
    where: Where | None

    def check_sign(self) -> None:
        """Refuse a sign that is none, as AnatomyError."""
        check(self.verb, "sign", one_of("explain_away", "amplify"), self.sign)

    def check_given_keys(self) -> None:
        """Refuse values of given keys that are out of range, as AnatomyError; keep each as its field reads it."""
        for key, field in self.keys.items():
            if getattr(self, key) is not None:
                object.__setattr__(self, key, check(self.verb, key, field, getattr(self, key)))

    @property
    def needs(self) -> Needs:
        """What it needs to know."""
        return Needs()

    @property
    def asks_above(self) -> bool:
        """Whether the score above which a response shows the concept is the scorer's own."""
        return False

    def held(self, concepts: Collection[str], rules: Sequence[Any]) -> tuple[str, ...]:
        """Concepts that it keeps as they are.

        Args:
            concepts: those of the policy that have a score.
            rules: all rules of the policy.
        """
        return ()
