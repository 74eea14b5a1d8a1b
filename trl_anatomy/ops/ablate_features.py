"""Take SAE latents out of hidden states, reading only the rows of those latents."""

from typing import Any

import torch
from torch import Tensor

from ..errors import AnatomyError
from . import _rows
from ._rows import row_blocks, working_dtype


def ablate_features(
    h: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    decoder: Tensor,
    *,
    strength: float = 1.0,
    kth: Tensor | None = None,
) -> Tensor:
    """Subtract what some SAE latents contribute: ``y = h - strength * (z * fire) @ decoder`` (method.md section 8).

    ``z = h @ encoder.T + bias``, ``fire = (z > threshold) & (z >= kth)``. All other latents and the SAE's error stay
    in `h` by construction. The gradient takes the SAE as frozen and keeps only `fire`:
    ``dh = g - strength * ((g @ decoder.T) * fire) @ encoder``. Autocast does not reach inside.

    Args:
        h: (..., d) hidden states, float64, float32, bfloat16 or float16; also empty or not contiguous.
        encoder: (u, d) rows of the latents, input centring folded into `bias`.
        bias: (u,).
        threshold: (u,): 0 for ReLU, theta for JumpReLU.
        decoder: (u, d) rows in the space of `h`, rescaling folded in.
        strength: 1 takes the latents out, 0.5 halves them.
        kth: (...,) per token a value that exactly the latents kept by a TopK SAE reach; None for other SAEs.

    Returns:
        (..., d) in the type of `h`; sums are kept in float32 or better. Gradients flow to `h` only, once.

    Raises:
        AnatomyError: shapes that do not belong together.

    >>> h = torch.tensor([[2.0, 1.0], [-2.0, 1.0]])
    >>> row = torch.tensor([[1.0, 0.0]])
    >>> ablate_features(h, row, torch.zeros(1), torch.zeros(1), row)
    tensor([[ 0.,  1.],
            [-2.,  1.]])
    """
    u, d = encoder.shape
    found = [tuple(tensor.shape) for tensor in (bias, threshold, decoder)]
    if h.shape[-1:] != (d,) or found != [(u,), (u,), (u, d)] or (kth is not None and kth.shape != h.shape[:-1]):
        raise AnatomyError(
            f"ablate_features: h is {tuple(h.shape)} and encoder {(u, d)}; bias, threshold and decoder are "
            f"{', '.join(map(str, found))} and must be {(u,)}, {(u,)}, {(u, h.shape[-1])}; kth is "
            f"{None if kth is None else tuple(kth.shape)} and must be None or {tuple(h.shape[:-1])}."
        )
    return _AblateFeatures.apply(h, encoder, bias, threshold, decoder, float(strength), kth)


def forward(
    h: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, decoder: Tensor, strength: float, kth: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(n, d) -> y (n, d) and fire (n, u) bool; kth (n,)."""
    fire = torch.empty(len(h), len(encoder), dtype=torch.bool, device=h.device)
    if _rows.kernels_for(h, encoder):
        from . import _triton_edit_rows as kernel

        if kernel.takes(h, encoder):
            compared = {"fire": fire, "bias": bias, "threshold": threshold, "kth": kth}
            return kernel.edit_rows(h, encoder, decoder, strength, mode=kernel.COMPARE, **compared), fire
    work = working_dtype(h, encoder)
    encode, decode, bias, threshold = encoder.to(work).T, decoder.to(work), bias.to(work), threshold.to(work)
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    for rows in row_blocks(h, work):
        x = h[rows].to(work)
        z = torch.addmm(bias, x, encode)
        torch.gt(z, threshold, out=fire[rows])
        if kth is not None:
            fire[rows] &= z >= kth[rows, None].to(work)
        y[rows] = torch.addmm(x, z.masked_fill_(~fire[rows], 0), decode, alpha=-strength)
    return y, fire


def backward(g: Tensor, fire: Tensor, encoder: Tensor, decoder: Tensor, strength: float) -> Tensor:
    """Gradient at y (n, d) -> gradient at h (n, d)."""
    if _rows.kernels_for(g, encoder):
        from . import _triton_edit_rows as kernel

        if kernel.takes(g, encoder):
            return kernel.edit_rows(g, decoder, encoder, strength, mode=kernel.GIVEN, fire=fire)
    work = working_dtype(g, encoder)
    encode, decode = encoder.to(work), decoder.to(work).T
    dh = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    for rows in row_blocks(g, work):
        x = g[rows].to(work)
        dh[rows] = torch.addmm(x, (x @ decode).masked_fill_(~fire[rows], 0), encode, alpha=-strength)
    return dh


class _AblateFeatures(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        h: Tensor,
        encoder: Tensor,
        bias: Tensor,
        threshold: Tensor,
        decoder: Tensor,
        strength: float,
        kth: Tensor | None,
    ) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        with torch.autocast(h.device.type, enabled=False):
            y, fire = forward(
                flat, encoder, bias, threshold, decoder, strength, None if kth is None else kth.reshape(-1)
            )
        ctx.save_for_backward(fire, encoder, decoder)
        ctx.strength = strength
        return y.view(h.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        fire, encoder, decoder = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dh = backward(g.reshape(-1, g.shape[-1]), fire, encoder, decoder, ctx.strength)
        return dh.view(g.shape), None, None, None, None, None, None
