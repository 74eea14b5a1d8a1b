"""Tokens: those that leave the loss, of policy and reference alike. Each rule by itself; what one takes is gone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bind import BoundRule
from ..concepts import TEXTUAL
from ..interventions import MaskTokens
from .stage import Effect, Met, Stage, Tally, Unbound, touched

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ...reading.spans import Pairs
    from ..settle import Begun

Flags = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""pair -> (n_tokens,) bool flags of its chosen and rejected response, before truncation; absent for none."""


class Masked:
    """One rule on tokens at work.

    Attributes:
        flags: what goes, of the kept pairs that it touches.
        tokens: (n_tokens,) bool in the order of `Pairs.response_bounds`.
    """

    def __init__(self, pairs: "Pairs", flags: Flags, kept: np.ndarray) -> None:
        self.flags: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.tokens = np.zeros(int(pairs.response_bounds[-1]), bool)
        for i, sides in flags.items():
            cut = [flag[pairs.kept_part(i, span)] for flag, span in zip(sides, ("chosen", "rejected"), strict=True)]
            if kept[i] and (cut[0].any() or cut[1].any()):
                self.flags[i] = sides
                start = int(pairs.response_bounds[2 * i])
                self.tokens[start : start + len(cut[0]) + len(cut[1])] = np.concatenate(cut)


class Tokens(Stage):
    """mask_tokens."""

    name = "tokens"

    def check(self, rule: Unbound) -> list[str]:
        from ...reading.scorers import TextRule, shown_above

        verb, concept, scorer = rule.verb, rule.concept, rule.scorer
        if concept is None or scorer is None:
            return []
        if concept.scorer in TEXTUAL and verb.threshold is not None:
            place = rule.at("threshold")
            return [f"{place}: found {verb.threshold:g} for a text rule, allowed: no threshold; what it matches goes."]
        place = rule.at("")
        if isinstance(scorer, TextRule) and not scorer.has_places:
            return [
                f"{place}: found mask_tokens with {verb.concept!r}, a habit without places in a text, allowed: habits "
                "that are found by a pattern."
            ]
        if verb.threshold is None and shown_above(scorer, token=True) is None:
            return [
                f"{place}: found no threshold, and the scorer of {verb.concept!r} says none for tokens; give a number."
            ]
        return []

    def read(self, rules: Sequence[BoundRule], begun: "Begun", scores: "Scores") -> dict[int, Any]:
        return {rule.number: _to_mask(rule.verb, rule.gate, begun, scores) for rule in rules}

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        return {rule.number: Effect(masked=Masked(met.pairs, met.read[rule.number], met.kept)) for rule in rules}

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        assert effect.masked is not None
        tally.mask(effect.masked.tokens)
        n_masked = int(effect.masked.tokens.sum())
        share = n_masked / max(1, int(tally.n_tokens[tally.kept & rule.gate].sum()))
        return {"rows": len(effect.masked.flags), "tokens": n_masked, "token_share": share}

    def chooses(self, rule: BoundRule) -> bool:
        return True

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        if record["rows"] == 0:
            return "touches nothing: no token shows the concept"
        return touched(one) if whole else ""


def tokens_kept(pairs: "Pairs", masked: Sequence[Masked]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """`PolicyPlan.kept_tokens` of several rules: what none of them takes."""
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in masked:
        for i, flags in part.flags.items():
            chosen, rejected = (~flag for flag in flags)
            row = int(pairs.rows[i])
            before = kept.get(row, (1, 1))
            kept[row] = ((chosen * before[0]).astype(np.int8), (rejected * before[1]).astype(np.int8))
    return kept


def chosen_masked(pairs: "Pairs", masked: Sequence[Masked], kept: np.ndarray) -> int:
    """Kept pairs of whose chosen response no token stays in the loss."""
    gone = np.logical_or.reduce([part.tokens for part in masked])
    chosen = pairs.response_bounds[:-1].reshape(-1, 2)
    return sum(bool(gone[start:stop].all()) for start, stop in chosen[kept])


def _to_mask(rule: Any, gate: np.ndarray, begun: "Begun", scores: "Scores") -> Flags:
    """What a rule takes out of the loss in the pairs of its gate.

    Source: method.md section 12, decision tokens.
    """
    from ...reading.scorers import TextRule, shown_above

    pairs, scorer = begun.pairs, begun.scorers[rule.concept]
    threshold = shown_above(scorer, token=True) if rule.threshold is None else rule.threshold
    text_rule = scorer if isinstance(scorer, TextRule) else None
    shown = rule.shown(pairs, gate, text_rule=text_rule, scores=scores, threshold=threshold or 0.0)
    if rule.positions == "shown":
        return {pair: (chosen.tokens, rejected.tokens) for pair, (chosen, rejected) in shown.items()}
    from ...reading.logprobs import opening_chances

    spans = ("chosen", "rejected")
    openings = sorted(
        {
            int(token)
            for pair, sides in shown.items()
            for span, side in zip(spans, sides, strict=True)
            for token in pairs.ids(pair, span)[side.opens]
        }
    )
    if not openings:
        return {}
    indices = np.flatnonzero(gate).tolist()
    chances = opening_chances(begun.model, pairs, indices, openings, cache_dir=begun.cache_dir)
    chance = MaskTokens.default_chance if rule.chance is None else rule.chance
    decided = {}
    for pair in indices:
        flags = []
        for side, span in enumerate(spans):
            flag = np.isin(pairs.ids(pair, span), openings)
            start, stop = pairs.response_bounds[2 * pair + side : 2 * pair + side + 2]
            flag[pairs.kept_part(pair, span)] |= chances[start:stop] >= chance
            flags.append(flag)
        if flags[0].any() or flags[1].any():
            decided[pair] = (flags[0], flags[1])
    return decided
