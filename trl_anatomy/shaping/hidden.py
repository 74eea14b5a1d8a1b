"""Rules on hidden states, resolved: the layer each acts on and the tensors it acts with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import AnatomyError
from .interventions import AblateFeatures, ProjectOut, Steer
from .located import PolicyError
from .policy import ConceptPolicy

if TYPE_CHECKING:
    from ..reading.sae import SAE
    from ..reading.score import Scores
    from ..reading.scorers import Scorer
    from ..reading.scorers.reft import ReftScorer


@dataclass(frozen=True, eq=False)
class Steering:
    """h + α·vector at a layer; vector (d_model,) of length 1, float32. The batch brings α."""

    layer: int
    vector: Tensor


@dataclass(frozen=True, eq=False)
class LowRankSteering:
    """h + α·W2(W1·h + b) at the layers of an edit, at the ends of responses. The batch brings α."""

    scorer: "ReftScorer"


@dataclass(frozen=True, eq=False)
class Ablation:
    """Some latents of an SAE out of the hidden states at a layer, `strength` of their contribution."""

    layer: int
    sae: "SAE"
    features: tuple[int, ...]
    strength: float
    keep: bool


@dataclass(frozen=True, eq=False)
class Projection:
    """The span of directions (k, d_model), float64, out of the hidden states at a layer."""

    layer: int
    directions: Tensor
    keep: bool


@dataclass(frozen=True, eq=False)
class GradientProjection:
    """The span of directions (k, d_model), float64, out of the gradient of the parameters that `weights` finds."""

    weights: str
    directions: Tensor


HiddenEdit: TypeAlias = Steering | LowRankSteering | Ablation | Projection | GradientProjection


def resolve_hidden(policy: ConceptPolicy, scorers: "Mapping[str, Scorer]") -> tuple[HiddenEdit, ...]:
    """The edits of the rules on hidden states, in the order of the policy.

    Args:
        policy: the policy.
        scorers: concept -> scorer, of at least the concepts that such a rule acts on.

    Raises:
        PolicyError: an SAE whose latents cannot be taken out, two SAEs at one layer, directions that span everything.
    """
    edits: list[HiddenEdit] = []
    problems: list[str] = []
    saes: dict[int, str] = {}
    for i, rule in enumerate(policy.rules):
        if not isinstance(rule, Steer | AblateFeatures | ProjectOut):
            continue
        place, scorer = policy.place(f"rules[{i}]"), scorers[rule.concept]
        try:
            edits.append(_resolve(rule, scorer))
        except AnatomyError as error:
            problems.append(f"{place}: {error}")
            continue
        if isinstance(rule, AblateFeatures):
            sae, layer = scorer.sae, scorer.layer  # type: ignore[union-attr]
            if saes.setdefault(layer, sae.fingerprint) != sae.fingerprint:
                problems.append(
                    f"{place}: found a second SAE at layer {layer}, allowed: one SAE for all ablate_features rules of "
                    "a layer. Two would take what they share out twice."
                )
    if problems:
        raise PolicyError(problems)
    return tuple(edits)


def _resolve(rule: Steer | AblateFeatures | ProjectOut, scorer: "Scorer") -> HiddenEdit:
    if isinstance(rule, AblateFeatures):
        sae, layer = scorer.sae, scorer.layer  # type: ignore[union-attr]
        sae.rows(scorer.features[:1])  # type: ignore[union-attr]  # refuses SAEs for which this is not exact
        return Ablation(layer, sae, tuple(scorer.features), rule.strength, rule.keep)  # type: ignore[union-attr]
    if scorer.kind == "reft":  # type: ignore[union-attr]
        return LowRankSteering(scorer)  # type: ignore[arg-type]
    layer = scorer.layer  # type: ignore[union-attr]
    if isinstance(rule, Steer):
        return Steering(layer, scorer.unit_direction())  # type: ignore[union-attr]
    rows = scorer.directions()  # type: ignore[union-attr]
    if len(orthonormal(rows)) == rows.shape[1]:
        raise AnatomyError(
            f"the {len(rows)} directions of {rule.concept!r} span all {rows.shape[1]} dimensions: nothing would be "
            "left. Name fewer latents."
        )
    if rule.from_ == "gradient":
        return GradientProjection(str(rule.weights), rows)
    return Projection(layer, rows, rule.keep)


def orthonormal(directions: Tensor) -> Tensor:
    """(k, d) -> (r, d) float64, an orthonormal basis of the span of the rows; r is its rank (to 1e-5 of the largest).

    >>> orthonormal(torch.tensor([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])).abs()
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[sizes > 1e-5 * sizes[0]]


def acted_on_unscored(policy: ConceptPolicy) -> set[str]:
    """Concepts that no rule asks a score of: all their rules edit hidden states, without a `fraction`."""
    ask = {name for rule in policy.rules for name in policy.held(rule)}
    ask |= {rule.concept for rule in policy.rules if rule.concept is not None and rule.needs.scores}
    return {rule.concept for rule in policy.rules if rule.concept is not None} - ask


def hidden_strengths(
    policy: ConceptPolicy, scores: "Scores", rows: np.ndarray, gates: Sequence[np.ndarray], kept: np.ndarray
) -> dict[int, np.ndarray]:
    """Rule number -> (n_pairs, 2) strengths on chosen and rejected, of every rule on hidden states.

    Args:
        rows: (n_pairs,) raw rows.
        gates: (n_pairs,) bool of each rule of the policy.
        kept: (n_pairs,) bool.
    """
    return {
        i: rule.strengths(scores.gap(rule.concept) if rule.concept in scores.names else None, rows, gates[i] & kept)
        for i, rule in enumerate(policy.rules)
        if isinstance(rule, Steer | AblateFeatures | ProjectOut)
    }
