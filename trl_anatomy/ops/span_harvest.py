"""Pool SAE activations over spans of tokens without ever holding all of them.

One function for each way in which latents fire: any SAE (`span_harvest`), a threshold per latent
(`span_harvest_threshold`), the k largest of a token (`span_harvest_topk`). All return the same two tensors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _rows
from ._rows import span_pieces


def span_harvest(
    h: Tensor, encode: Callable[[Tensor], Tensor], bounds: Sequence[int], chunk_bytes: int = 64 << 20
) -> tuple[Tensor, Tensor]:
    """Largest activation and number of firing tokens of every latent, per span (method.md section 2).

    Tokens are encoded in chunks of at most `chunk_bytes` of dense activations (never less than one token), and each
    chunk is folded into the spans it touches.

    Args:
        h: (n_tokens, d_model) hidden states, spans end to end.
        encode: (n, d_model) -> (n, n_latents); a negative code counts by its magnitude.
        bounds: n_spans + 1 ascending offsets into `h`; spans may be empty.
        chunk_bytes: limit on the dense activations held at a time.

    Returns:
        maximum (n_spans, n_latents) float32 and count (n_spans, n_latents) int32; zero for an empty span.

    >>> maximum, count = span_harvest(torch.tensor([[1.0], [-3.0], [2.0]]), torch.relu, [0, 2, 2, 3])
    >>> maximum.flatten().tolist(), count.flatten().tolist()
    ([1.0, 0.0, 2.0], [1, 0, 1])
    """
    n_latents = encode(h[:1] if len(h) else h.new_zeros(1, h.shape[1])).shape[1]
    maximum, count = _empty(h, bounds, n_latents)
    step = max(1, chunk_bytes // (4 * n_latents))
    zero = torch.zeros(n_latents, device=h.device)
    for start in range(bounds[0], bounds[-1], step):
        end = min(start + step, bounds[-1])
        fold(encode(h[start:end]).abs().float(), zero, span_pieces(bounds, start, end), maximum, count)
    return maximum, count


def span_harvest_threshold(
    h: Tensor,
    encoder: Tensor,
    bias: Tensor,
    threshold: Tensor,
    bounds: Sequence[int],
    *,
    prepare: Callable[[Tensor], Tensor] = Tensor.float,
) -> tuple[Tensor, Tensor]:
    """`span_harvest` for latents that fire where ``z = prepare(h) @ encoder + bias`` exceeds a threshold >= 0.

    Works through tiles of tokens x latents: a bare matrix product, then one fold into the spans. The bias goes to the
    other side of the comparison, and the largest product of a span is its largest activation wherever it fires, so
    activations are never made.

    Args:
        h: (n_tokens, d_model) hidden states, spans end to end.
        encoder: (d_model, n_latents), also not contiguous.
        bias: (n_latents,).
        threshold: (n_latents,) float32, not negative.
        bounds: n_spans + 1 ascending offsets into `h`; spans may be empty.
        prepare: (n, d_model) -> (n, d_model) in the type of `encoder`: centring and scaling of some tokens.

    Returns:
        maximum (n_spans, n_latents) float32 and count (n_spans, n_latents) int32; zero for an empty span.

    >>> maximum, count = span_harvest_threshold(
    ...     torch.tensor([[1.0], [-3.0], [2.0]]), torch.ones(1, 1), torch.zeros(1), torch.ones(1), [0, 2, 2, 3]
    ... )
    >>> maximum.flatten().tolist(), count.flatten().tolist()
    ([0.0, 0.0, 2.0], [0, 0, 1])
    """
    n_latents = encoder.shape[1]
    maximum, count = _empty(h, bounds, n_latents)
    maximum.fill_(-torch.inf)
    bar = threshold.float() - bias.float()
    block, tile_bytes = _TILES.get(h.device.type, _TILES["other"])
    for start in range(bounds[0], bounds[-1], block):
        end = min(start + block, bounds[-1])
        x, pieces = prepare(h[start:end]), span_pieces(bounds, start, end)
        width = max(64, tile_bytes // (4 * (end - start)))
        for first in range(0, n_latents, width):
            tile = slice(first, min(first + width, n_latents))
            fold(_product(x, encoder[:, tile]), bar[tile], pieces, maximum[:, tile], count[:, tile])
    return maximum.add_(bias).masked_fill_(count == 0, 0), count


def fold(z: Tensor, bar: Tensor, pieces: Tensor, maximum: Tensor, count: Tensor) -> None:
    """Fold z (n, w) into maximum and count (n_spans, w): the largest value, and how many exceed bar (w,)."""
    if _rows.kernels_for(z):
        from . import _triton_pool as kernel

        return kernel.fold(z, bar, pieces, maximum, count)
    rows = pieces.tolist()
    spans = slice(rows[0][0], rows[-1][0] + 1)
    largest, fired = torch.full_like(maximum[spans], -torch.inf), torch.zeros_like(maximum[spans])
    # A float mask sums faster than a boolean one; span by span, it and what it is made from stay in a core's cache.
    fires = torch.empty(max(end - first for _, first, end in rows), z.shape[1], dtype=z.dtype, device=z.device)
    for span, first, end in rows:
        part, place = z[first:end], span - spans.start
        mask = torch.gt(part, bar, out=fires[: end - first])
        torch.amax(part, 0, out=largest[place])
        torch.sum(mask, 0, out=fired[place])
    torch.maximum(maximum[spans], largest, out=maximum[spans])
    count[spans] += fired.to(torch.int32)
    return None


def _product(x: Tensor, encoder: Tensor) -> Tensor:
    """x @ encoder in float32, also of 16-bit operands."""
    if x.dtype == torch.float32:
        return x @ encoder
    if x.is_cuda:
        return torch.mm(x, encoder, out_dtype=torch.float32)
    return x.float() @ encoder.float()


def span_harvest_topk(
    h: Tensor,
    preactivation: Callable[[Tensor], Tensor],
    k: int,
    bounds: Sequence[int],
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`span_harvest` for SAEs that keep the k largest pre-activations of a token, where those are positive.

    What is kept of a chunk of tokens is folded as it is found, (n, k) values and places, never made dense again.

    Args:
        h: (n_tokens, d_model) hidden states, spans end to end.
        preactivation: (n, d_model) -> (n, n_latents); magnitudes, for an SAE with signed codes.
        k: latents kept per token.
        bounds: n_spans + 1 ascending offsets into `h`; spans may be empty.
        chunk_bytes: limit on the pre-activations held at a time (never less than one token); None fits the device.

    Returns:
        maximum (n_spans, n_latents) float32 and count (n_spans, n_latents) int32; zero for an empty span.

    >>> maximum, count = span_harvest_topk(torch.tensor([[3.0, 1.0], [-1.0, -2.0]]), Tensor.float, 1, [0, 2])
    >>> maximum.tolist(), count.tolist()
    ([[3.0, 0.0]], [[1, 0]])
    """
    n_latents = preactivation(h[:1] if len(h) else h.new_zeros(1, h.shape[1])).shape[1]
    maximum, count = _empty(h, bounds, n_latents)
    if chunk_bytes is None:
        chunk_bytes = _TOPK_BYTES.get(h.device.type, _TOPK_BYTES["other"])
    step = max(1, chunk_bytes // (4 * n_latents))
    span = torch.repeat_interleave(torch.as_tensor(bounds, device=h.device).diff())
    for start in range(bounds[0], bounds[-1], step):
        end = min(start + step, bounds[-1])
        values, places = preactivation(h[start:end]).topk(k, dim=1, sorted=False)
        places += n_latents * span[start - bounds[0] : end - bounds[0], None]
        fires = values > 0
        places = places[fires]
        maximum.view(-1).scatter_reduce_(0, places, values[fires].float(), "amax")
        count.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    return maximum, count


# Tokens of a block, and bytes of one tile of its product. On a CPU enough tokens to make up for reading the encoder
# again, and few enough to stay in the cache that cores share, with their tile; a GPU wants few and large products.
_TILES = {"cpu": (1024, 4 << 20), "other": (16384, 512 << 20)}
# Pre-activations held for the k largest: below 32 MiB glibc's malloc gives the same pages again instead of new ones.
_TOPK_BYTES = {"cpu": 24 << 20, "other": 512 << 20}


def _empty(h: Tensor, bounds: Sequence[int], n_latents: int) -> tuple[Tensor, Tensor]:
    shape = (len(bounds) - 1, n_latents)
    return torch.zeros(shape, device=h.device), torch.zeros(shape, dtype=torch.int32, device=h.device)
