"""Linear probe: a logistic classifier of hidden states."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import AnatomyError
from .hidden import HiddenScorer
from .training import Standardised, descend


class LinearProbe(HiddenScorer):
    """Token score: ``w·h + b`` (method.md section 9).

    Args:
        weight: (d_model,).
        bias: one number.
        layer: layer to read, from 0.
        reduce: ``"max"``, ``"mean"``, ``"sum"`` or ``"last"`` over a response's tokens.
        card: what is known of it.

    Raises:
        AnatomyError: the weight is not a vector, or not finite.
    """

    kind = "probe"
    names = ("weight", "bias")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | float,
        layer: int,
        reduce: str = "max",
        card: Mapping[str, Any] | None = None,
    ) -> None:
        if weight.ndim != 1:
            raise AnatomyError(f"The weight of a probe is a vector (d_model,); found shape {tuple(weight.shape)}.")
        tensors = {"weight": weight.float(), "bias": torch.as_tensor(bias, dtype=torch.float32).reshape(())}
        super().__init__(tensors, layer, reduce, card)

    def directions(self) -> Tensor:
        """As `HiddenScorer.directions`: the weight, of length 1."""
        weight = self.tensors["weight"].double()
        return (weight / weight.norm())[None]

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """As `HiddenScorer.score_tokens`; each token by itself."""
        weight, bias = (self.tensors[name].to(hidden.device) for name in self.names)
        return hidden @ weight + bias

    @classmethod
    def fit(  # noqa: PLR0913
        cls,
        hidden: Tensor,
        bounds: Sequence[int],
        labels: np.ndarray,
        *,
        layer: int,
        reduce: str = "max",
        per: str = "response",
        lr: float = 5e-3,
        weight_decay: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> "LinearProbe":
        """Fit on labelled spans; starts at zero.

        Args:
            hidden: (n_tokens, d_model) on the CPU in any precision, spans end to end.
            bounds: n_spans + 1 offsets.
            labels: (n_spans,) bool; for ``per="pair"`` in turn True and False.
            layer: layer that `hidden` is the output of.
            reduce: of the scorer.
            per: ``"response"``, ``"token"`` or ``"pair"`` (`training.objective`).
            lr, weight_decay, batch_size, seed: of AdamW, on standardised dimensions.
            epochs: passes; None means 12, or as many as make 300 steps.

        Raises:
            AnatomyError: one label only, pairs not in turn, hidden states that are not finite.
        """
        data = Standardised.of(hidden, bounds)
        weight = torch.zeros(hidden.shape[1], requires_grad=True)
        bias = torch.zeros((), requires_grad=True)
        descend(
            [weight, bias],
            lambda tokens, _: tokens @ weight + bias,
            data,
            labels,
            per=per,
            reduce=reduce,
            lr=lr,
            weight_decay=weight_decay,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
        )
        folded = weight.detach().double() / data.scale
        return cls(folded, bias.detach() - folded @ data.mean.double(), layer, reduce)
