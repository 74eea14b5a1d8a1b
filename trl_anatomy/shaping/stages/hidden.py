"""Hidden states: edits that act while the model trains, by a strength on each side of each pair."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import AnatomyError
from ..bind import BoundRule
from ..hidden import Ablation, GradientProjection, HiddenEdit, LowRankSteering, Projection, Steering, orthonormal
from ..interventions import AblateFeatures, Steer
from ..located import PolicyError
from .stage import Effect, Met, Stage, Tally

if TYPE_CHECKING:
    from ...reading.score import Scores
    from ..settle import Begun


class Hidden(Stage):
    """steer, ablate_features and project_out."""

    name = "hidden"

    def read(self, rules: Sequence[BoundRule], begun: "Begun", scores: "Scores") -> dict[int, Any]:
        """Rule -> its edit.

        Raises:
            PolicyError: an SAE whose latents cannot be taken out, two SAEs at one layer, directions that span
                everything.
        """
        edits: dict[int, HiddenEdit] = {}
        problems: list[str] = []
        saes: dict[int, str] = {}
        for rule in rules:
            try:
                edits[rule.number] = edit = _edit(rule.verb, begun.scorers[str(rule.verb.concept)])
            except AnatomyError as error:
                problems.append(f"{rule.place}: {error}")
                continue
            if isinstance(edit, Ablation) and saes.setdefault(edit.layer, edit.sae.fingerprint) != edit.sae.fingerprint:
                problems.append(
                    f"{rule.place}: found a second SAE at layer {edit.layer}, allowed: one SAE for all "
                    "ablate_features rules of a layer. Two would take what they share out twice."
                )
        if problems:
            raise PolicyError(problems)
        return edits

    def solve(self, rules: Sequence[BoundRule], met: Met) -> dict[int, Effect]:
        effects = {}
        for rule in rules:
            verb: Any = rule.verb
            gap = met.scores.gap(verb.concept) if verb.concept in met.scores.names else None
            strengths = verb.strengths(gap, met.pairs.rows, rule.gate & met.kept)
            effects[rule.number] = Effect(strengths=strengths, edit=met.read.get(rule.number))
        return effects

    def record(self, rule: BoundRule, effect: Effect, tally: Tally) -> dict[str, Any]:
        assert effect.strengths is not None
        touched = effect.strengths.any(axis=1)
        strength = getattr(rule.verb, "strength", None)
        return {
            "rows": int(touched.sum()),
            "strength": -strength if strength and rule.verb.sign == "amplify" else strength,
            "gradient_touched": float((tally.pull * touched).sum() / tally.total),
        }

    def note(self, rule: BoundRule, effect: Effect, record: Mapping[str, Any], whole: bool, one: str) -> str:
        return f"edits the step of {one}s that carry {record['gradient_touched']:.0%} of the gradient"


def _edit(rule: Any, scorer: Any) -> HiddenEdit:
    if isinstance(rule, AblateFeatures):
        sae, layer = scorer.sae, scorer.layer
        sae.rows(scorer.features[:1])  # refuses SAEs for which this is not exact
        return Ablation(layer, sae, tuple(scorer.features), rule.strength, rule.keep)
    if scorer.kind == "reft":
        return LowRankSteering(scorer)
    layer = scorer.layer
    if isinstance(rule, Steer):
        return Steering(layer, scorer.unit_direction())
    rows = scorer.directions()
    if len(orthonormal(rows)) == rows.shape[1]:
        raise AnatomyError(
            f"the {len(rows)} directions of {rule.concept!r} span all {rows.shape[1]} dimensions: nothing would be "
            "left. Name fewer latents."
        )
    if rule.from_ == "gradient":
        return GradientProjection(str(rule.weights), rows)
    return Projection(layer, rows, rule.keep)
