"""mask_tokens: tokens that show a concept, or that decide it, leave the loss; the context still sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ...errors import AnatomyError
from ...reading.progress import Progress
from ...reading.token_text import tokens_of, whole_words
from ..fields import NUMBER, Field, number, one_of
from ..where import Where
from .verb import Needs, Verb

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ...reading.scorers import TextRule
    from ...reading.spans import Pairs


@dataclass(frozen=True)
class MaskTokens(Verb):
    """Take tokens of both responses out of the loss, of policy and reference alike.

    With `positions` "shown" these are the tokens that show the concept: those whose score passes the threshold, or that
    hold a character which a text rule matches. With "decided" they are the positions at which the habit is decided: the
    opening tokens of the habit are the first tokens of what is shown anywhere in the pairs; a position is masked if one
    of them stands there, or if the start model gives them at least `chance` there.

    Args:
        concept: name of the concept.
        sign: "explain_away"; nothing can be amplified by leaving it out.
        threshold: a token shows the concept if it scores above; None for 0 (SAE latents) or the best-F1 threshold of a
            fitted scorer's card. Not for text rules.
        unit: "word" (default): a word goes as a whole if one of its tokens does; "token". Only with "shown".
        positions: "shown" or "decided".
        chance: probability above 0, below 1; None for 0.05. Only with "decided".
        where: the gate; None for all pairs.

    Raises:
        AnatomyError: a value out of range, amplify, or a key that belongs to the other `positions`.

    Source: method.md section 8 (token filter), section 12 (decision tokens).
    """

    default_chance: ClassVar[float] = 0.05
    verb: ClassVar[str] = "mask_tokens"
    stage: ClassVar[str] = "tokens"
    not_for_reward: ClassVar[str] = "it reads one score from the whole response"
    keys: ClassVar[Mapping[str, Field]] = {
        "positions": one_of("shown", "decided"),
        "threshold": NUMBER,
        "unit": one_of("word", "token"),
        "chance": number(above=0, below=1),
    }

    concept: str
    sign: str
    threshold: float | None = None
    unit: str | None = None
    positions: str = "shown"
    chance: float | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        self.check_sign()
        self.check_given_keys()
        if self.sign == "amplify":
            raise AnatomyError(
                "found amplify, allowed: explain_away. Leaving tokens out of the loss takes away what they would "
                "teach; to amplify, use shape_reward."
            )
        wrong = "unit" if self.positions == "decided" else "chance"
        if getattr(self, wrong) is not None:
            raise AnatomyError(f"found {wrong} with positions: {self.positions}, allowed: without it.")

    @property
    def needs(self) -> Needs:
        return Needs(tokens=True, likelihood=self.positions == "decided")

    def shown(
        self, pairs: "Pairs", gate: np.ndarray, *, text_rule: "TextRule | None", scores: "Scores", threshold: float
    ) -> "dict[int, tuple[Shown, Shown]]":
        """What shows the concept in the pairs of a gate.

        Args:
            pairs: the pairs, with the tokenizer that made them.
            gate: (n_pairs,) bool.
            text_rule: a text rule with places, looked for in `Pairs.response_text`; None for a concept scored token by
                token.
            scores: with the scores of tokens of such a concept. Tokens that truncation removes have none.
            threshold: of such a concept.

        Returns:
            pair -> chosen and rejected response, over its tokens before truncation; pairs without any are absent.
        """
        found = {}
        with Progress(int(gate.sum()), "Finding tokens to mask", "pairs") as bar:
            for i in np.flatnonzero(gate).tolist():
                sides = []
                for side, span in enumerate(("chosen", "rejected")):
                    ids = pairs.ids(i, span)
                    if text_rule is not None:
                        sides.append(self._matched(pairs, i, span, text_rule))
                        continue
                    start, stop = pairs.response_bounds[2 * i + side : 2 * i + side + 2]
                    passing = np.zeros(len(ids), bool)
                    passing[pairs.kept_part(i, span)] = scores.tokens[self.concept][start:stop] > threshold
                    sides.append(self._passing(pairs, i, span, passing))
                if sides[0].tokens.any() or sides[1].tokens.any():
                    found[i] = (sides[0], sides[1])
                bar.update()
        return found

    def _matched(self, pairs: "Pairs", i: int, span: str, text_rule: "TextRule") -> "Shown":
        nothing = np.zeros(len(pairs.ids(i, span)), bool)
        if not text_rule.score_text(pairs.response_text(i, span)):
            return Shown(nothing, nothing)
        text, bounds = pairs.response_tokens(i, span)
        characters, opens = np.zeros(len(text), bool), nothing.copy()
        for begin, end in text_rule.spans(text):
            characters[begin:end] = True
            first = np.flatnonzero(bounds[:, 1] > begin)[:1]  # of the bytes of one character the first
            opens[first] = bounds[first, 0] < end
        if self.unit != "token":
            characters = whole_words(text, characters)
        return Shown(tokens_of(characters, bounds), opens)

    def _passing(self, pairs: "Pairs", i: int, span: str, passing: np.ndarray) -> "Shown":
        opens = passing & ~np.concatenate([[False], passing[:-1]])
        if self.unit == "token" or not passing.any():
            return Shown(passing, opens)
        text, bounds = pairs.response_tokens(i, span)
        characters = np.zeros(len(text), bool)
        for start, stop in bounds[passing]:
            characters[start:stop] = [not character.isspace() for character in text[start:stop]]
        return Shown(passing | tokens_of(whole_words(text, characters), bounds), opens)


@dataclass(frozen=True, eq=False)
class Shown:
    """What of one response shows a concept, (n_tokens,) bool each.

    Attributes:
        tokens: the tokens that show it.
        opens: the tokens with which it begins.
    """

    tokens: np.ndarray
    opens: np.ndarray
