"""Edits of hidden states: the layer each acts on and the tensors it acts with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..reading.sae import SAE
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


def orthonormal(directions: Tensor) -> Tensor:
    """(k, d) -> (r, d) float64, an orthonormal basis of the span of the rows; r is its rank (to 1e-5 of the largest).

    >>> orthonormal(torch.tensor([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])).abs()
    tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[sizes > 1e-5 * sizes[0]]
