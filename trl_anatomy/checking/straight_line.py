"""Weights on the straight line from where a training began through where it has got to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Name -> weight, of those that are trained."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def weights_at(start: Mapping[str, Tensor], ahead: Mapping[str, Tensor], alpha: float) -> Iterator[tuple[str, Tensor]]:
    """Weights on the straight line from `start` (alpha 0) through `ahead` (alpha 1); both ends are exact.

    An adapter's change is a product: where one factor of it was zero at the start (LoRA's B), that one is scaled and
    the other stays as it is ahead, so that the product is exactly alpha times as large. Factors that both began
    elsewhere (PiSSA, OLoRA) move each on its own line, whose product is that to first order only.

    Yields:
        Name and weight, in the order of `start`.
    """
    twins: dict[str, str] = {}
    for one, other in _FACTORS:
        for name in start:
            if f".{one}." in name and (twin := name.replace(f".{one}.", f".{other}.")) in start:
                twins |= {name: twin, twin: name}
    for name, before in start.items():
        after = ahead[name]
        if name in twins and before.any() and not start[twins[name]].any():
            yield name, after
        else:
            yield name, torch.lerp(before.float(), after.float(), alpha).to(after.dtype)


@contextmanager
def extrapolated(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], ahead: Mapping[str, Tensor], alpha: float
) -> Iterator[None]:
    """A scope in which a model's weights are those of `weights_at`; then they are again what they were, bit for bit.

    Args:
        weights: of the model, by name; written into.
        start, ahead: on any device; as large as the trained weights each, and once more for what is put back.
    """
    found = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, value in weights_at(start, ahead, alpha):
                weights[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found[name])
