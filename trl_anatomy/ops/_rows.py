"""What the operations on rows of hidden states share."""

from collections.abc import Iterator

import torch
from torch import Tensor

# A block and its result should stay in one core's cache between the two products that read them.
_CPU_BLOCK_BYTES = 1 << 20


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
