"""Take the span of some directions out of hidden states."""

from typing import Any

import torch
from torch import Tensor

from ..errors import AnatomyError
from ._rows import row_blocks, working_dtype


def project_out(h: Tensor, basis: Tensor) -> Tensor:
    """Remove the part of `h` in the span of `basis`: ``y = h - (h @ basis.T) @ basis`` (method.md section 8).

    The gradient is the same projection, so nothing of `h` is kept for it. What is left along the span is at most 1e-5
    of `h` in float32; in bfloat16 it is the rounding of `y` itself, which has no preferred direction. Autocast does not
    reach inside.

    Args:
        h: (..., d) hidden states, float64, float32, bfloat16 or float16; also empty or not contiguous.
        basis: (r, d) orthonormal rows; in float32 also where `h` is in bfloat16 (rounded rows are not orthonormal).

    Returns:
        (..., d) in the type of `h`; sums are kept in float32 or better. Gradients flow to `h` only, once.

    Raises:
        AnatomyError: `h` and `basis` differ in width.

    >>> project_out(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[3., 0.]])
    """
    if basis.ndim != 2 or h.shape[-1:] != basis.shape[1:]:
        raise AnatomyError(
            f"project_out: basis is {tuple(basis.shape)} and must be (r, {h.shape[-1]}) for h of {tuple(h.shape)}."
        )
    return _ProjectOut.apply(h, basis)


def project(h: Tensor, basis: Tensor) -> Tensor:
    """(n, d) -> (n, d), in plain torch."""
    work = working_dtype(h, basis)
    basis = basis.to(work)
    y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    for rows in row_blocks(h, work):
        x = h[rows].to(work)
        y[rows] = torch.addmm(x, x @ basis.T, basis, alpha=-1)
    return y


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return _flat(h, basis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return _flat(g, basis), None


def _flat(h: Tensor, basis: Tensor) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return project(h.reshape(-1, h.shape[-1]), basis).view(h.shape)
