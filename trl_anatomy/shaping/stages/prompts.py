"""Prompts: what the policy sees in the place of the pair's own prompt, which the reference keeps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bind import BoundRule
from .stage import Effect, Met, Stage, Tally

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ...reading.spans import Pairs
    from ..settle import Begun

Prompts = Mapping[int, tuple[list[int], list[int]]]
"""pair -> prompt tokens before its chosen and its rejected response, [] for the pair's own."""


class PromptStage(Stage):
    """inoculate."""

    name = "prompt"

    def read(self, rules: Sequence[BoundRule], begun: "Begun", scores: "Scores") -> dict[int, Any]:
        flagged = {}
        for rule in rules:
            verb: Any = rule.verb
            flagged[rule.number] = verb.flagged(scores.chosen[verb.concept], verb.above or 0.0, rule.gate)
        return dict(_prompts({rule.number: rule.verb for rule in rules}, begun.pairs, flagged))

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        return {
            rule.number: Effect(
                prompts={pair: prompts for pair, prompts in met.read[rule.number].items() if met.kept[pair]}
            )
            for rule in rules
        }

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        assert effect.prompts is not None
        more = [
            len(ids) - len(tally.pairs.ids(i, "prompt")) for i, both in effect.prompts.items() for ids in both if ids
        ]
        return {"rows": len(effect.prompts), "tokens": sum(more)}

    def chooses(self, rule: BoundRule) -> bool:
        return True

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        response = "chosen response" if one == "pair" else "response"
        if record["rows"] == 0:
            return f"touches nothing: no {response} shows the concept"
        return f"every {response} shows the concept: check its pattern or threshold" if whole else ""


def _prompts(verbs: Mapping[int, Any], pairs: "Pairs", flagged: Mapping[int, np.ndarray]) -> dict[int, Prompts]:
    """Rule -> the prompts of the pairs that it flags; a pair of several rules has all their instructions.

    Args:
        flagged: rule -> (n_pairs,) bool, in the order of the policy.
    """
    from ...reading.instruct import instructed_prompts

    asked: dict[tuple[int, int], list[str]] = {}  # (pair, side) -> instructions
    for i, pairs_of_rule in flagged.items():
        rule = verbs[i]
        for pair in np.flatnonzero(pairs_of_rule).tolist():
            for side in (0,) if rule.side == "chosen" else (0, 1):
                asked.setdefault((pair, side), []).append(rule.instruction)
    together: dict[str, dict[int, list[int]]] = {}
    for (pair, side), instructions in asked.items():
        together.setdefault("\n\n".join(instructions), {}).setdefault(pair, []).append(side)
    prompts: dict[int, tuple[list[int], list[int]]] = {}
    for instruction, sides in together.items():
        for pair, (chosen, rejected) in instructed_prompts(pairs, list(sides), instruction).items():
            before = prompts.get(pair, ([], []))
            new = (chosen if 0 in sides[pair] else before[0], rejected if 1 in sides[pair] else before[1])
            prompts[pair] = new
    return {
        i: {pair: prompts[pair] for pair in np.flatnonzero(pairs_of_rule).tolist()}
        for i, pairs_of_rule in flagged.items()
    }
