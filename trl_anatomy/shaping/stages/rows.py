"""Rows: pairs that do not enter training. Each rule looks at all pairs; a pair goes if one of them drops it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..bind import BoundRule
from ..gaps import NEAR, Gaps, fault
from .stage import Effect, Met, Stage, Tally


class Rows(Stage):
    """filter_pairs and filter_rows."""

    name = "rows"
    on_scores = sees_all = True

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        effects = {}
        for rule in rules:
            verb: Any = rule.verb
            sides = met.scores.chosen[verb.concept], met.scores.rejected[verb.concept]
            effects[rule.number] = Effect(dropped=verb.dropped(*sides, met.pairs.rows, rule.gate))
        return effects

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        assert effect.dropped is not None
        tally.alive = tally.alive * ~effect.dropped
        return {"rows": int(effect.dropped.sum())}

    def chooses(self, rule: BoundRule) -> bool:
        verb: Any = rule.verb
        return verb.fraction != "all"

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        verb: Any = rule.verb
        if record["rows"] == 0:
            return f"touches nothing: {verb.why_none(record['pairs'])}"
        return f"drops every {one} in its gate" if whole else ""

    def why(self, rule: Any, plain: float, after: float) -> str:
        if rule.sign == "amplify":
            return "It drops pairs that reward it."
        if plain * after < 0:
            return "It drops too many pairs."
        drops = "reward" if after < plain else "punish"
        pairs = "are even on" if abs(plain) <= NEAR else "reward" if plain > 0 else "punish"
        return f"The pairs {pairs} it, and the rule drops those that {drops} it."

    def settings(self, rule: Any, gaps: Gaps, gate: np.ndarray, plain: float) -> list[str]:
        """Those that keep at least half of the pairs, and move the gap the right way."""
        found, n = [], int(gate.sum())
        for side, score in (("chosen", gaps.chosen), ("rejected", gaps.rejected)):
            stays = gate & ~(score > 0)
            left = gaps.mean(stays)
            if side == rule.side or gaps.unit != "share" or 2 * stays.sum() < n or abs(left - plain) <= NEAR:
                continue
            if fault(rule.sign, plain, left) is None:
                found.append(f"filter_pairs with side: {side} (leaves {gaps.shown(left)})")
        if rule.sign == "amplify":
            return found + (["filter_pairs with a fraction"] if rule.side and (gaps.gap[gate] < 0).any() else [])
        largest = np.sort(gaps.gap[gate])[::-1]
        lefts = largest.sum() - np.cumsum(largest)  # of the sum of gaps, once so many pairs are dropped
        most = min(int(((largest > 0) & (lefts >= -NEAR)).sum()), n // 2)
        fraction = np.floor(1000 * most / n) / 1000
        drops = int(fraction * n + 1e-9)
        if drops:
            share = lefts[drops - 1] / (n - drops)
            found.append(f"filter_pairs with fraction: {fraction:g} (leaves {gaps.shown(share)})")
        return found
