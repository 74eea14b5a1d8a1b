"""What the operations on rows of hidden states share."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

# A block and its result should stay in one core's cache between the two products that read them.
_CPU_BLOCK_BYTES = 1 << 20
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_blocks(h: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the rows of h (n, d): in blocks that fit a cache on a CPU, all at once elsewhere."""
    n_rows = len(h)
    step = n_rows if h.device.type != "cpu" else _CPU_BLOCK_BYTES // max(1, h.shape[1] * dtype.itemsize)
    step = max(16, step)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The type sums are kept in: that of the most exact operand, and never less than float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def span_pieces(bounds: Sequence[int], start: int, end: int, longest: int | None = None) -> Tensor:
    """What rows start to end hold of each span, (n, 3) int64 on the CPU: the span, its first and end row from start.

    Empty spans are left out; spans longer than `longest` rows come in several pieces.

    >>> span_pieces([0, 2, 2, 7], 1, 6, 3).tolist()
    [[0, 0, 1], [2, 1, 4], [2, 4, 5]]
    """
    pieces = []
    for span in range(max(0, bisect_right(bounds, start) - 1), len(bounds) - 1):
        if bounds[span] >= end:
            break
        first, last = max(bounds[span], start) - start, min(bounds[span + 1], end) - start
        step = longest or max(1, last - first)
        pieces += [(span, row, min(row + step, last)) for row in range(first, last, step)]
    return torch.tensor(pieces, dtype=torch.int64).view(-1, 3)


def kernels_for(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: on a GPU, not in float64, and Triton is there."""
    fit = all(tensor.is_cuda and tensor.dtype in _KERNEL_TYPES for tensor in tensors)
    return fit and find_spec("triton") is not None
