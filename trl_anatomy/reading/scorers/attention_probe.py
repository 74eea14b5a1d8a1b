"""Causal attention probe: each token's score attends to the tokens of its response up to itself, in linear memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import AnatomyError
from .hidden import HiddenScorer, pad_spans
from .training import Standardised, descend

_CHUNK = 16  # tokens whose mutual weights are held at a time
_POSITION_UNIT = 100  # tokens over which a position bias of 1 changes a weight by a factor of e


def causal_average(keys: Tensor, values: Tensor) -> Tensor:
    """``out_i = Σ_{j≤i} softmax_{j≤i}(keys_j) · values_j``, for each head.

    The weights depend on j alone, so the sums up to i follow from those up to the chunk before: memory grows with L
    (times 16), not with L². Every chunk is taken relative to the largest key so far, so no exponential overflows, and
    none that counts vanishes.

    Args:
        keys, values: (B, L, H).

    Returns:
        (B, L, H).

    >>> causal_average(torch.zeros(1, 3, 1), torch.tensor([[[1.0], [3.0], [5.0]]])).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    batch, _, heads = keys.shape
    # The reference point cancels between numerator and denominator: no gradient flows through it.
    largest = torch.full((batch, 1, heads), -torch.inf, dtype=keys.dtype, device=keys.device)
    above = below = torch.zeros_like(largest)
    outputs = []
    for key, value in zip(keys.split(_CHUNK, dim=1), values.split(_CHUNK, dim=1), strict=True):
        running = torch.maximum(key.detach().cummax(dim=1).values, largest)
        earlier = torch.ones(key.shape[1], key.shape[1], dtype=torch.bool, device=key.device).tril()
        gaps = (key[:, None] - running[:, :, None]).masked_fill(~earlier[:, :, None], -torch.inf)
        weights = gaps.exp()  # (B, i, j, H)
        carried = (largest - running).exp()
        tops = above * carried + (weights * value[:, None]).sum(dim=2)
        bottoms = below * carried + weights.sum(dim=2)
        outputs.append(tops / bottoms)
        largest, above, below = running[:, -1:], tops[:, -1:], bottoms[:, -1:]
    return torch.cat(outputs, dim=1)


class AttentionProbe(HiddenScorer):
    """Token score: ``Σ_heads Σ_{j≤i} softmax_j(q·h_j + p·j) · (v·h_j) + w·h_i + b`` (method.md section 9).

    Args:
        query, value: (n_heads, d_model): what a token weighs, and what it says.
        bias: one number.
        layer: layer to read, from 0.
        position: (n_heads,) weight gained per 100 tokens; None leaves positions out.
        residual: (d_model,) weight of the token itself; None leaves it out.
        reduce: ``"last"`` (the score of the last token, which has seen all), ``"max"``, ``"mean"`` or ``"sum"``.
        card: what is known of it.

    Raises:
        AnatomyError: shapes that do not belong together, or numbers that are not finite.
    """

    kind = "attention_probe"
    names = ("query", "value", "bias")

    def __init__(  # noqa: PLR0913
        self,
        query: Tensor,
        value: Tensor,
        bias: Tensor | float,
        layer: int,
        *,
        position: Tensor | None = None,
        residual: Tensor | None = None,
        reduce: str = "last",
        card: Mapping[str, Any] | None = None,
    ) -> None:
        tensors = {"query": query, "value": value, "bias": torch.as_tensor(bias).reshape(())}
        tensors |= {} if position is None else {"position": position}
        tensors |= {} if residual is None else {"residual": residual}
        heads, width = query.shape if query.ndim == 2 else (0, 0)
        shapes = {"query": (heads, width), "value": (heads, width), "position": (heads,), "residual": (width,)}
        for name, shape in shapes.items():
            if (name in tensors and tuple(tensors[name].shape) != shape) or not heads:
                found = tuple(tensors[name].shape)
                raise AnatomyError(f"An attention probe with {heads} heads of width {width}: {name} has shape {found}.")
        super().__init__({name: tensor.float() for name, tensor in tensors.items()}, layer, reduce, card)

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """As `HiddenScorer.score_tokens`; a token sees itself and the tokens of its span before it."""
        here = {name: tensor.to(hidden.device) for name, tensor in self.tensors.items()}
        return _logits(here, hidden, [0, len(hidden)] if bounds is None else bounds)

    @classmethod
    def fit(  # noqa: PLR0913
        cls,
        hidden: Tensor,
        bounds: Sequence[int],
        labels: np.ndarray,
        *,
        layer: int,
        reduce: str = "last",
        per: str = "response",
        n_heads: int = 4,
        position: bool = False,
        residual: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> "AttentionProbe":
        """Fit on labelled spans.

        Args:
            hidden: (n_tokens, d_model) on the CPU in any precision, spans end to end.
            bounds: n_spans + 1 offsets.
            labels: (n_spans,) bool; for ``per="pair"`` in turn True and False.
            layer: layer that `hidden` is the output of.
            reduce: of the scorer.
            per: ``"response"``, ``"token"`` or ``"pair"`` (`training.objective`).
            n_heads: heads.
            position: learn a position bias.
            residual: learn a linear term of the token itself.
            lr, weight_decay, batch_size: of AdamW, on standardised dimensions.
            epochs: passes; None means 12, or as many as make 300 steps.
            seed: of the first weights and of the order of the batches.

        Raises:
            AnatomyError: one label only, pairs not in turn, hidden states that are not finite.
        """
        data = Standardised.of(hidden, bounds)
        width = hidden.shape[1]
        generator = torch.Generator().manual_seed(seed)
        free = {
            "query": torch.randn(n_heads, width, generator=generator) / width**0.5,
            "value": torch.randn(n_heads, width, generator=generator) / width**0.5,
            "bias": torch.zeros(()),
        }
        free |= {"position": torch.zeros(n_heads)} if position else {}
        free |= {"residual": torch.zeros(width)} if residual else {}
        for tensor in free.values():
            tensor.requires_grad_()
        descend(
            list(free.values()),
            lambda tokens, spans: _logits(free, tokens, spans),
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
        # The shift of the queries is the same for every token and cancels; that of the values passes the average whole.
        found = {name: tensor.detach().double() for name, tensor in free.items()}
        for name in {"query", "value", "residual"} & set(found):
            found[name] = found[name] / data.scale
        for name in {"value", "residual"} & set(found):
            found["bias"] = found["bias"] - (found[name] @ data.mean.double()).sum()
        optional = {name: found.get(name) for name in ("position", "residual")}
        return cls(found["query"], found["value"], found["bias"], layer, reduce=reduce, **optional)


def _logits(tensors: Mapping[str, Tensor], hidden: Tensor, bounds: Sequence[int]) -> Tensor:
    if not len(hidden):
        return hidden.new_zeros(0)
    keys, inside = pad_spans(hidden @ tensors["query"].T, bounds)
    values, _ = pad_spans(hidden @ tensors["value"].T, bounds)
    if "position" in tensors:
        place = torch.arange(keys.shape[1], device=keys.device, dtype=keys.dtype) / _POSITION_UNIT
        keys = keys + place[:, None] * tensors["position"]
    scores = causal_average(keys, values).sum(dim=2)[inside] + tensors["bias"]
    return scores + hidden @ tensors["residual"] if "residual" in tensors else scores
