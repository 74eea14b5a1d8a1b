"""One kernel for the edits of hidden states: ``y = x - strength * code(x @ read.T) @ write``.

`ablate_features` reads with encoder rows and writes decoder rows (its gradient the other way round), `project_out`
reads and writes the basis. A program takes some rows of x, first through all columns for the code, then once more for
y: by then its rows are in the L2 cache, so the memory sees x once and y once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What the code is: z; z where it fires, with the firing set stored; z where the given set fires.
ALL, COMPARE, GIVEN = "all", "compare", "given"
# Beyond so many rows of `read` two large matrix products are the better tool.
_MOST_ROWS = {"exact": 64, "half": 128}


@triton.jit
def edit_rows_kernel(  # noqa: PLR0913
    x: tl.tensor,
    read: tl.tensor,
    write: tl.tensor,
    bias: tl.tensor,
    threshold: tl.tensor,
    kth: tl.tensor,
    fire: tl.tensor,
    y: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    u: tl.tensor,
    x_row: tl.tensor,
    strength: tl.tensor,
    MODE: tl.constexpr,
    HAS_KTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    latents = tl.arange(0, BLOCK_U)
    row_in, latent_in = rows < n, latents < u
    z = tl.zeros((BLOCK_T, BLOCK_U), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        column_in = columns < d
        a = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=row_in[:, None] & column_in[None, :], other=0.0)
        b = tl.load(
            read + latents[None, :] * d + columns[:, None], mask=column_in[:, None] & latent_in[None, :], other=0.0
        )
        z = tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee") if EXACT else tl.dot(a, b, z)
    places = rows[:, None] * u + latents[None, :]
    both_in = row_in[:, None] & latent_in[None, :]
    if MODE == "compare":
        z += tl.load(bias + latents, mask=latent_in, other=0.0).to(tl.float32)[None, :]
        fires = z > tl.load(threshold + latents, mask=latent_in, other=float("inf")).to(tl.float32)[None, :]
        if HAS_KTH:
            fires = fires & (z >= tl.load(kth + rows, mask=row_in, other=0.0).to(tl.float32)[:, None])
        tl.store(fire + places, fires.to(tl.uint8), mask=both_in)
        z = tl.where(fires, z, 0.0)
    if MODE == "given":
        z = tl.where(tl.load(fire + places, mask=both_in, other=0) != 0, z, 0.0)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        column_in = columns < d
        inside = row_in[:, None] & column_in[None, :]
        b = tl.load(
            write + latents[:, None] * d + columns[None, :], mask=latent_in[:, None] & column_in[None, :], other=0.0
        )
        change = tl.dot(z, b.to(tl.float32), input_precision="ieee") if EXACT else tl.dot(z.to(b.dtype), b)
        a = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
        result = a.to(tl.float32) - strength * change
        tl.store(y + rows[:, None] * d + columns[None, :], result.to(a.dtype), mask=inside)


def settings(u: int, exact: bool) -> dict[str, int]:
    """Block sizes and options of the compiler for `u` rows of read and write."""
    block_u = max(16, triton.next_power_of_2(u))
    block_t, block_d, stages = (32, 64, 2) if exact else (64, 64 if block_u < 128 else 32, 3)
    blocks = {"BLOCK_T": block_t, "BLOCK_U": block_u, "BLOCK_D": block_d}
    return blocks | {"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}


def is_exact(x: Tensor, rows: Tensor) -> bool:
    """Whether products are made in float32: always, unless x and the rows are of one 16-bit type."""
    # The interpreter holds bfloat16 as raw integers, which its dot multiplies as such.
    interpreted = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    return x.dtype == torch.float32 or x.dtype != rows.dtype or interpreted


def takes(x: Tensor, rows: Tensor) -> bool:
    """Whether the kernel is the right tool for so many rows."""
    return 0 < len(rows) <= _MOST_ROWS["exact" if is_exact(x, rows) else "half"]


def edit_rows(  # noqa: PLR0913
    x: Tensor,
    read: Tensor,
    write: Tensor,
    strength: float,
    *,
    mode: str = ALL,
    fire: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    kth: Tensor | None = None,
) -> Tensor:
    """(n, d) -> (n, d); in mode COMPARE `fire` (n, u) bool is written, in mode GIVEN it is read."""
    n, d = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()  # a strided column could not be read in vectors
    y = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if n == 0:
        return y
    exact = is_exact(x, read)
    chosen = settings(len(read), exact)
    if not exact:
        write = write.to(x.dtype)
    edit_rows_kernel[(triton.cdiv(n, chosen["BLOCK_T"]),)](
        x,
        read.contiguous(),
        write.contiguous(),
        x if bias is None else bias.contiguous(),
        x if threshold is None else threshold.contiguous(),
        x if kth is None else kth.contiguous(),
        x if fire is None else fire.view(torch.uint8),
        y,
        n,
        d,
        len(read),
        x.stride(0),
        strength,
        MODE=mode,
        HAS_KTH=kth is not None,
        EXACT=exact,
        **chosen,
    )
    return y
