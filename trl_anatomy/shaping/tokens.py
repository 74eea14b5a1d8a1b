"""The stages between rows and margin, settled: tokens that leave the loss, prompts that the policy sees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .interventions import MaskTokens
from .policy import ConceptPolicy

if TYPE_CHECKING:
    from ..reading.score import Scores
    from ..reading.scorers import Scorer
    from ..reading.spans import Pairs

Flags = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""pair -> (n_tokens,) bool flags of its chosen and rejected response, before truncation; absent for none."""
Prompts = Mapping[int, tuple[list[int], list[int]]]
"""pair -> prompt tokens before its chosen and its rejected response, [] for the pair's own."""


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


def tokens_to_mask(  # noqa: PLR0913
    policy: ConceptPolicy,
    i: int,
    pairs: "Pairs",
    gate: np.ndarray,
    scores: "Scores",
    scorer: "Scorer",
    model: Any,
    cache_dir: Path | None,
) -> Flags:
    """What rule `i`, a mask_tokens rule, takes out of the loss in the pairs of its gate.

    Args:
        model: the frozen start model, for positions that are decided; else not used.

    Source: method.md section 12, decision tokens.
    """
    from ..reading.scorers import TextRule, shown_above

    rule: Any = policy.rules[i]
    threshold = shown_above(scorer, token=True) if rule.threshold is None else rule.threshold
    text_rule = scorer if isinstance(scorer, TextRule) else None
    shown = rule.shown(pairs, gate, text_rule=text_rule, scores=scores, threshold=threshold or 0.0)
    if rule.positions == "shown":
        return {pair: (chosen.tokens, rejected.tokens) for pair, (chosen, rejected) in shown.items()}
    from ..reading.logprobs import opening_chances

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
    chances = opening_chances(model, pairs, indices, openings, cache_dir=cache_dir)
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


def prompts_of_rules(policy: ConceptPolicy, pairs: "Pairs", flagged: Mapping[int, np.ndarray]) -> dict[int, Prompts]:
    """Rule -> the prompts of the pairs that it flags; a pair of several rules has all their instructions.

    Args:
        flagged: rule -> (n_pairs,) bool, in the order of the policy.
    """
    from ..reading.instruct import instructed_prompts

    asked: dict[tuple[int, int], list[str]] = {}  # (pair, side) -> instructions
    for i, pairs_of_rule in flagged.items():
        rule: Any = policy.rules[i]
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
