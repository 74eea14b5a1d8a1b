"""What every stage of a policy does, and what happens to the pairs in one shape for all of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import expit

from ..bind import BoundRule
from ..gaps import Gaps

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ...reading.scorers import Scorer
    from ...reading.spans import Pairs
    from ..concepts import ConceptSpec
    from ..hidden import HiddenEdit
    from ..settle import Begun
    from .prompts import Prompts
    from .tokens import Masked


@dataclass(frozen=True, eq=False)
class Effect:
    """What one rule does to the pairs. What it leaves alone is None.

    Attributes:
        dropped: (n_pairs,) bool: pairs that go.
        masked: tokens that leave the loss.
        prompts: pair -> what the policy is asked instead.
        factor: (n_pairs,) what the weight of each pair is multiplied by.
        row_factor: (n_raw,) the same for every raw row, also for those that are no pairs.
        offsets: (2, n_pairs) what the scores of chosen and rejected are raised by.
        strengths: (n_pairs, 2) of an edit of hidden states, on chosen and rejected.
        edit: that edit.
        together: whether it was solved with other rules, so that it means something with them only.
        figures: numbers for the record of the rule.
        notes: what a reader should know of it.
    """

    dropped: np.ndarray | None = None
    masked: "Masked | None" = None
    prompts: "Prompts | None" = None
    factor: np.ndarray | None = None
    row_factor: np.ndarray | None = None
    offsets: np.ndarray | None = None
    strengths: np.ndarray | None = None
    edit: "HiddenEdit | None" = None
    together: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def margin(self) -> np.ndarray:
        """(n_pairs,) the offset of chosen less that of rejected."""
        assert self.offsets is not None
        return self.offsets[0] - self.offsets[1]


@dataclass(frozen=True, eq=False)
class Met:
    """What a stage finds: the pairs, and what the stages before it have left of them.

    Attributes:
        source: of the policy, for errors.
        pairs, scores: as given to `plan_policy`.
        read: rule -> what its stage read for it.
        kept: (n_pairs,) bool.
        weight: (n_pairs,).
    """

    source: str
    pairs: "Pairs"
    scores: "Scores"
    read: Mapping[int, Any]
    kept: np.ndarray
    weight: np.ndarray

    def after(self, effects: Mapping[int, Effect]) -> "Met":
        """What the next stage finds."""
        gone = [effect.dropped for effect in effects.values() if effect.dropped is not None]
        factors = [effect.factor for effect in effects.values() if effect.factor is not None]
        kept = self.kept & ~np.logical_or.reduce([np.zeros_like(self.kept), *gone])
        return replace(self, kept=kept, weight=np.prod([self.weight, *factors], axis=0))


@dataclass(frozen=True, eq=False)
class Unbound:
    """A rule before it meets pairs.

    Attributes:
        verb: as the policy says it.
        concept, scorer: what it acts on; None where that could not be built.
        columns: of the dataset, if known.
        at: a key of the rule ("" for the rule) -> where it stands.
    """

    verb: Any
    concept: "ConceptSpec | None"
    scorer: "Scorer | None"
    columns: Collection[str] | None
    at: Callable[[str], str]


class Tally:
    """What the rules so far leave of each pair's gradient at the start model.

    Attributes:
        kept: (n_pairs,) bool: pairs that every rule on rows leaves.
        alive: (n_pairs,) share of each pair that is in the loss.
        margin: (n_pairs,) its offset.
        total: the gradient of plain training.
        one: "pair", or "row" of SFT data.
    """

    def __init__(self, pairs: "Pairs", kept: np.ndarray) -> None:
        self.pairs, self.kept = pairs, kept
        self.alive, self.margin, self.total = np.ones(len(kept)), np.zeros(len(kept)), len(kept) / 2
        self._bounds = pairs.response_bounds
        self.n_tokens, self._gone = np.diff(self._bounds[::2]), np.zeros(int(self._bounds[-1]), bool)
        self.one, self._share = "pair", np.ones(len(kept))
        if pairs.one_sided:  # a row pulls by its tokens, of which the loss is a mean
            self.one, self._share = "row", self.n_tokens / max(self.n_tokens.mean(), 1e-300)
            self.alive = self.alive * self._share

    @property
    def pull(self) -> np.ndarray:
        """(n_pairs,) the gradient that each pair has."""
        return self.alive * expit(-self.margin)

    def mask(self, tokens: np.ndarray) -> None:
        """Take tokens, (n_tokens,) bool, out of the loss."""
        self._gone |= tokens
        left = self.n_tokens - np.diff(np.concatenate([[0], np.cumsum(self._gone)])[self._bounds[::2]])
        self.alive = np.where(self.kept, left / np.maximum(self.n_tokens, 1), 0.0) * self._share


class Stage:
    """One place in training where rules act. Each has a file, with all that is to be known of its verbs.

    Attributes:
        name: as its verbs have it in `stage`.
        on_scores: whether it acts on scores of responses, so that the pairs tell what it does to a gap.
        sees_all: whether it acts before rows are chosen.
    """

    name: ClassVar[str]
    on_scores: ClassVar[bool] = False
    sees_all: ClassVar[bool] = False

    def check(self, rule: Unbound) -> list[str]:
        """What is wrong with a rule before it meets pairs."""
        from ...reading.scorers import shown_above

        if rule.scorer is None or not rule.verb.asks_above or shown_above(rule.scorer) is not None:
            return []
        named = repr(rule.verb.concept)
        return [f"{rule.at('')}: found no key 'above', and the scorer of {named} says no threshold; give a number."]

    def read(self, rules: Sequence[BoundRule], begun: "Begun", scores: "Scores") -> dict[int, Any]:
        """Rule -> what has to be read for it beside scores. Raises AnatomyError, PolicyError."""
        return {}

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        """Rule -> its effect; the rules of a stage are solved together. Raises AnatomyError, PolicyError."""
        raise NotImplementedError

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        """Numbers for `PolicyPlan.rules`, `rows` among them; enters the effect into the tally."""
        raise NotImplementedError

    def chooses(self, rule: BoundRule) -> bool:
        """Whether it is odd that a rule touches every pair that it may."""
        return False

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        """What a reader should know.

        Args:
            rule, effect, record: of the rule.
            whole: it chooses pairs, and touches all that it may.
            one: "pair", or "row" of SFT data.
        """
        raise NotImplementedError

    def why(self, rule: Any, plain: float, after: float) -> str:
        """Why a rule by itself moves the gap of its concept from `plain` to `after`, which is no good."""
        return ""

    def settings(self, rule: Any, gaps: Gaps, gate: np.ndarray, plain: float) -> list[str]:
        """Other settings of a rule's verb that would do."""
        return []

    def fitted(self, rule: Any, gaps: Gaps, gap: np.ndarray) -> str:
        """What a fit of the rule's strength on the gaps of its gate comes to, as the start of a sentence; or ""."""
        return ""


def touched(one: str) -> str:
    """The note of a rule that chooses pairs (or rows), and touches every one."""
    return f"every {one} is touched: check its pattern or threshold"
