"""Margins: offsets on the scores of responses. Strengths that nobody gave are fitted, all rules together."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import AnatomyError
from ..bind import BoundRule
from ..bradley_terry import fit_strengths
from ..concepts import TEXTUAL
from ..gaps import Gaps
from ..interventions import Residualize, ShapeReward
from ..located import PolicyError
from .stage import Effect, Met, Stage, Tally, Unbound, touched

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ..settle import Begun


class Margins(Stage):
    """shape_reward and residualize."""

    name = "margin"
    on_scores = True

    def check(self, rule: Unbound) -> list[str]:
        verb, concept, scorer = rule.verb, rule.concept, rule.scorer
        if not isinstance(verb, Residualize) or verb.steer is None or concept is None or scorer is None:
            return []
        if concept.scorer not in (*TEXTUAL, "attention_probe"):  # reft is refused when the policy is read
            return []
        return [
            f"{rule.at('steer')}: found a concept of the scorer {concept.scorer}, allowed: direction, probe or "
            "features, which have a vector; or instruction."
        ]

    def read(self, rules: Sequence[BoundRule], begun: "Begun", scores: "Scores") -> dict[int, Any]:
        return {
            rule.number: _likelihood_ratios(rule.verb, rule.gate, begun)
            for rule in rules
            if isinstance(rule.verb, Residualize)
        }

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        """Strength and offsets of every rule; weights of pairs count in the fit.

        Raises:
            PolicyError: no pair left in a gate, scores that are all alike, or a strength that cannot be fitted.
        """
        kept, acts = met.kept, {rule.number: rule.gate & met.kept for rule in rules}
        standard, scales = _standardised(rules, met)
        verbs: dict[int, Any] = {rule.number: rule.verb for rule in rules}

        def offsets(i: int, strength: float) -> np.ndarray:
            return np.stack(ShapeReward.offsets(strength, *standard[i], acts[i]))

        strengths = {i: verb.fixed for i, verb in verbs.items() if verb.fixed is not None}
        intervals: dict[int, tuple[float, float]] = {}
        fitted = [rule for rule in rules if rule.number not in strengths]
        if fitted:
            gaps = [np.where(one.gate, standard[one.number][0] - standard[one.number][1], 0.0)[kept] for one in fitted]
            # What rules with a given strength already say is part of the margin that the fit starts from.
            given = sum((offsets(i, value) for i, value in strengths.items()), np.zeros((2, len(kept))))
            copies = met.pairs.copies.identical[kept]
            try:
                names = [f"{one.verb.concept!r}" for one in fitted]
                margin = (given[0] - given[1])[kept]
                fit = fit_strengths(np.stack(gaps, axis=1), names, margin, met.weight[kept], copies)
            except AnatomyError as error:
                raise PolicyError([f"{fitted[0].place}: {error}"]) from None
            for column, one in enumerate(fitted):
                strengths[one.number] = float(fit.strength[column])
                intervals[one.number] = (float(fit.ci_low[column]), float(fit.ci_high[column]))
        effects = {}
        for i in verbs:
            interval = intervals.get(i)
            figures = {"strength": strengths[i], "scale": scales.get(i)}
            figures |= {} if interval is None else {"ci_low": interval[0], "ci_high": interval[1]}
            effects[i] = Effect(offsets=offsets(i, strengths[i]), together=interval is not None, figures=figures)
        return effects

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        margin = effect.margin
        tally.margin = tally.margin + margin
        mean = float(margin[rule.gate & tally.kept].mean())
        return {"rows": int((margin != 0).sum()), "mean_offset": mean, **effect.figures}

    def chooses(self, rule: BoundRule) -> bool:
        if not isinstance(rule.verb, ShapeReward) or rule.concept is None:
            return False
        return rule.verb.constant is None and rule.concept.scorer == "text"  # other scores differ in nearly every pair

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        if record["rows"] == 0:
            return "touches nothing: the two responses score alike in every pair"
        parts = []
        if record["ci_low"] is not None and record["ci_low"] <= 0 <= record["ci_high"]:
            parts.append("the interval holds 0: these pairs say next to nothing about the concept")
        elif record["ci_low"] is not None and record["strength"] < 0:
            parts.append("the pairs punish this concept; the offset cancels that")
        return "; ".join([*parts, *([touched(one)] if whole else [])])

    def why(self, rule: Any, plain: float, after: float) -> str:
        if plain * after < 0:
            return "Its strength is more than the pairs say."
        if isinstance(rule, ShapeReward) and rule.constant is not None:
            return "The pairs punish it, and the margin makes them count more."
        if plain < 0:
            return "The pairs punish it, and its offsets make them count more."
        return "Its offsets point that way."

    def fitted(self, rule: Any, gaps: Gaps, gap: np.ndarray) -> str:
        """For a rule that gives a strength of its own, the one that `auto` comes to."""
        if not isinstance(rule, ShapeReward):
            return ""
        try:
            scale = float(np.concatenate([gaps.chosen, gaps.rejected]).std())
            return f"fits {fit_strengths(gap[:, None] / scale, [rule.concept]).strength[0]:.3g}, "
        except AnatomyError:
            return ""


_Standard = dict[int, tuple[np.ndarray, np.ndarray]]


def _standardised(rules: Sequence[BoundRule], met: Met) -> tuple[_Standard, dict[int, float]]:
    """Rule -> what its strength multiplies on chosen and rejected, and the standard deviation behind one unit of it."""
    kept, standard, scales, problems = met.kept, dict[int, tuple[np.ndarray, np.ndarray]](), dict[int, float](), []
    for bound in rules:
        i, rule = bound.number, bound.verb
        if not (bound.gate & kept).any():
            problems.append(f"{bound.place}: the filter_pairs rules leave no pair in this gate.")
            continue
        residual, name = isinstance(rule, Residualize), str(rule.concept)
        chosen, rejected = met.read[i] if residual else (met.scores.chosen[name], met.scores.rejected[name])
        pooled = np.concatenate([chosen[kept], rejected[kept]])
        if isinstance(rule, ShapeReward) and rule.constant is not None:
            standard[i] = np.full(len(chosen), 0.5), np.full(len(chosen), -0.5)
        elif pooled.std() <= 1e-12 * max(1.0, float(np.abs(pooled).max())):
            what = "what is asked for changes log pi0(y) by" if residual else f"the concept {name!r} scores"
            problems.append(
                f"{bound.place}: {what} {pooled[0]:g} on every response; there is nothing to shape. Correct its scorer "
                "or drop the rule."
            )
        elif residual:  # log-probabilities have a unit of their own
            standard[i] = (chosen, rejected)
        else:
            scales[i] = float(pooled.std())
            standard[i] = ((chosen - pooled.mean()) / scales[i], (rejected - pooled.mean()) / scales[i])
    if problems:
        raise PolicyError(problems)
    return standard, scales


def _likelihood_ratios(rule: Residualize, gate: np.ndarray, begun: "Begun") -> np.ndarray:
    """A(y) = log pi0(y | asked or steered) − log pi0(y) of both responses of the pairs in a gate.

    Returns:
        (2, n_pairs) float64; 0 outside the gate.

    Source: method.md section 8 (residualised).
    """
    from ...reading.instruct import instructed_prompts
    from ...reading.logprobs import Shift, response_logprobs

    pairs, model, cache_dir, scorer = begun.pairs, begun.model, begun.cache_dir, begun.scorers[rule.concept]
    indices = np.flatnonzero(gate).tolist()
    plain = response_logprobs(model, pairs, indices, cache_dir=cache_dir)
    if rule.instruction is not None:
        prompts = instructed_prompts(pairs, indices, rule.instruction)
        moved = response_logprobs(model, pairs, indices, prompts=prompts, cache_dir=cache_dir)
    else:
        shift = Shift(scorer.layer, float(rule.steer or 0.0) * scorer.unit_direction())  # type: ignore[union-attr]
        moved = response_logprobs(model, pairs, indices, shift=shift, cache_dir=cache_dir)
    return moved - plain
