"""Kernels that pool per span: a tile of pre-activations, or hidden states on a few directions.

Spans come as pieces, rows of a table (span, first row, end row). A program owns what it writes: there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FOLD = {"BLOCK_T": 8, "BLOCK_W": 256, "num_warps": 4, "enable_fp_fusion": True}
PROJECT = {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
_MOST_DIRECTIONS = 64  # beyond, a matrix product is the better tool


@triton.jit
def fold_kernel(  # noqa: PLR0913
    z: tl.tensor,
    bar: tl.tensor,
    pieces: tl.tensor,
    maximum: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    z_row: tl.tensor,
    maximum_row: tl.tensor,
    count_row: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    piece = pieces + 3 * tl.program_id(0).to(tl.int64)
    span = tl.load(piece).to(tl.int64)
    first, end = tl.load(piece + 1), tl.load(piece + 2)
    column_in = columns < width
    level = tl.load(bar + columns, mask=column_in, other=0.0)
    largest = tl.full((BLOCK_T, BLOCK_W), float("-inf"), tl.float32)
    fired = tl.zeros((BLOCK_T, BLOCK_W), tl.int32)
    for start in range(first, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        value = tl.load(
            z + rows.to(tl.int64)[:, None] * z_row + columns[None, :],
            mask=(rows < end)[:, None] & column_in[None, :],
            other=float("-inf"),
        ).to(tl.float32)
        largest = tl.maximum(largest, value)
        fired += (value > level[None, :]).to(tl.int32)
    place = maximum + span * maximum_row + columns
    before = tl.load(place, mask=column_in, other=0.0)
    tl.store(place, tl.maximum(before, tl.max(largest, axis=0)), mask=column_in)
    place = count + span * count_row + columns
    before = tl.load(place, mask=column_in, other=0)
    tl.store(place, before + tl.sum(fired, axis=0), mask=column_in)


def fold(z: Tensor, bar: Tensor, pieces: Tensor, maximum: Tensor, count: Tensor) -> None:
    """`span_harvest.fold` in one read of `z`."""
    width = z.shape[1]
    fold_kernel[(len(pieces), triton.cdiv(width, FOLD["BLOCK_W"]))](  # only the first axis may be long
        z,
        bar,
        pieces.to(z.device, torch.int32),
        maximum,
        count,
        width,
        z.stride(0),
        maximum.stride(0),
        count.stride(0),
        **FOLD,
    )


@triton.jit
def project_kernel(  # noqa: PLR0913
    h: tl.tensor,
    directions: tl.tensor,
    pieces: tl.tensor,
    out: tl.tensor,
    d: tl.tensor,
    k: tl.tensor,
    h_row: tl.tensor,
    MAXIMUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    number = tl.program_id(0).to(tl.int64)
    first, end = tl.load(pieces + 3 * number + 1), tl.load(pieces + 3 * number + 2)
    rows = first + tl.arange(0, BLOCK_T)
    names = tl.arange(0, BLOCK_K)
    row_in, name_in = rows < end, names < k
    score = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        column_in = columns < d
        a = tl.load(
            h + rows.to(tl.int64)[:, None] * h_row + columns[None, :],
            mask=row_in[:, None] & column_in[None, :],
            other=0.0,
        )
        b = tl.load(
            directions + names[None, :] * d + columns[:, None], mask=column_in[:, None] & name_in[None, :], other=0.0
        )
        score = tl.dot(a.to(tl.float32), b.to(tl.float32), score, input_precision="ieee")
    if MAXIMUM:
        pooled = tl.max(tl.where(row_in[:, None], score, float("-inf")), axis=0)
    else:
        pooled = tl.sum(tl.where(row_in[:, None], score, 0.0), axis=0)
    tl.store(out + number * k + names, pooled, mask=name_in)


def takes(directions: Tensor) -> bool:
    """Whether the kernel is the right tool for so many directions."""
    return 0 < len(directions) <= _MOST_DIRECTIONS


def project(h: Tensor, directions: Tensor, pieces: Tensor, maximum: bool) -> Tensor:
    """Largest or summed projection of each piece, (len(pieces), k) float32; no piece longer than PROJECT's BLOCK_T."""
    k, d = directions.shape
    h = h if h.stride(1) == 1 else h.contiguous()
    out = torch.empty(len(pieces), k, device=h.device)
    if len(pieces) == 0:
        return out
    project_kernel[(len(pieces),)](
        h,
        directions.contiguous(),
        pieces.to(h.device, torch.int32),
        out,
        d,
        k,
        h.stride(0),
        MAXIMUM=maximum,
        BLOCK_K=max(16, triton.next_power_of_2(k)),
        **PROJECT,
    )
    return out
