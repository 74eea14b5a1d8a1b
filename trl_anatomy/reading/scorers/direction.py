"""A direction in the residual stream as a concept, fitted as a difference of means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import AnatomyError
from .hidden import HiddenScorer


class DirectionScorer(HiddenScorer):
    """Token score: the projection of the hidden state on a unit vector (method.md section 9, difference of means).

    Args:
        vector: (d_model,) any length but zero; it is normed.
        layer: layer to read, from 0.
        reduce: ``"max"``, ``"mean"``, ``"sum"`` or ``"last"`` over a response's tokens.
        card: what is known of it.

    Raises:
        AnatomyError: the vector is zero, not finite or not a vector.
    """

    kind = "direction"
    names = ("direction",)

    def __init__(self, vector: Tensor, layer: int, reduce: str = "max", card: Mapping[str, Any] | None = None) -> None:
        vector = vector.detach().to("cpu", torch.float64)
        norm = vector.norm()
        if vector.ndim != 1 or not torch.isfinite(norm) or norm == 0:
            raise AnatomyError(
                f"A direction must be a finite vector (d_model,) that is not zero; found shape {tuple(vector.shape)}, "
                f"norm {float(norm):g}."
            )
        super().__init__({"direction": (vector / norm).float()}, layer, reduce, card)

    @property
    def vector(self) -> Tensor:
        """(d_model,) float32, unit length."""
        return self.tensors["direction"]

    def directions(self) -> Tensor:
        """As `HiddenScorer.directions`: the vector."""
        return self.vector.double()[None]

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """As `HiddenScorer.score_tokens`; each token by itself."""
        return hidden @ self.vector.to(hidden.device)

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        bounds: Sequence[int],
        labels: np.ndarray,
        *,
        layer: int,
        reduce: str = "max",
        per: str = "token",
    ) -> "DirectionScorer":
        """The difference of mean hidden states of the two classes.

        Args:
            hidden: (n_tokens, d_model) in any precision, spans end to end.
            bounds: n_spans + 1 offsets.
            labels: (n_spans,) bool.
            layer: layer that `hidden` is the output of.
            reduce: of the scorer.
            per: ``"token"``: means over tokens; ``"response"``: over the means of spans, so that long ones count no
                more than short ones.

        Raises:
            AnatomyError: a class without tokens, two equal means, or another `per`.
        """
        if per not in ("token", "response"):
            raise AnatomyError(f"per is {per!r}; allowed for a direction: token, response.")
        if per == "response":
            spans = [i for i in range(len(labels)) if bounds[i + 1] > bounds[i]]
            means = [hidden[bounds[i] : bounds[i + 1]].double().mean(dim=0) for i in spans]
            hidden = torch.stack(means) if means else hidden[:0]
            labels, bounds = np.asarray(labels)[spans], range(len(spans) + 1)
        token_labels = np.repeat(np.asarray(labels, bool), np.diff(bounds))
        sums = torch.zeros(2, hidden.shape[1], dtype=torch.float64)
        for start in range(0, len(hidden), 8192):  # by parts: float64 of all tokens would need too much memory
            part, which = hidden[start : start + 8192].double().cpu(), token_labels[start : start + 8192]
            for label in (False, True):
                sums[int(label)] += part[torch.from_numpy(which == label)].sum(dim=0)
        counts = np.array([(~token_labels).sum(), token_labels.sum()])
        if not counts.all():
            raise AnatomyError(f"No token is labelled {int(counts[0] > 0)}; a direction needs both labels.")
        negative, positive = sums / torch.from_numpy(counts)[:, None]
        return cls(positive - negative, layer, reduce)
