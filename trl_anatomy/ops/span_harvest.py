"""Pool SAE activations over spans of tokens without ever holding all of them.

One function for each way in which latents fire: any SAE (`span_harvest`), a threshold per latent
(`span_harvest_threshold`), the k largest of a token (`span_harvest_topk`). All return the same two tensors.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


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
    never = torch.zeros(n_latents, device=h.device)
    for start in range(bounds[0], bounds[-1], step):
        end = min(start + step, bounds[-1])
        fold(encode(h[start:end]).abs(), never, list(_pieces(bounds, start, end)), maximum, count)
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

    Works through tiles of tokens x latents: a matrix product, then one fold into the spans. The largest ``z`` of a span
    is its largest activation wherever it exceeds the threshold, so activations are never made.

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
    block_bytes, tile_bytes = _TILES.get(h.device.type, _TILES["other"])
    block = max(1, block_bytes // (4 * h.shape[1]))
    for start in range(bounds[0], bounds[-1], block):
        end = min(start + block, bounds[-1])
        x = prepare(h[start:end])
        pieces = list(_pieces(bounds, start, end))
        width = max(64, tile_bytes // (4 * (end - start)))
        for first in range(0, n_latents, width):
            tile = slice(first, min(first + width, n_latents))
            z = torch.addmm(bias[tile], x, encoder[:, tile])
            fold(z, threshold[tile], pieces, maximum[:, tile], count[:, tile])
    return maximum.masked_fill_(count == 0, 0), count


def fold(z: Tensor, threshold: Tensor, pieces: Sequence[tuple[int, int, int]], maximum: Tensor, count: Tensor) -> None:
    """Fold z (n, w) into maximum and count (n_spans, w), in plain torch; pieces: (span, first row, end row) of `z`."""
    fires = torch.empty_like(z)
    torch.gt(z, threshold, out=fires)  # a float mask sums faster than a boolean one
    for span, a, b in pieces:
        torch.maximum(maximum[span], z[a:b].amax(0), out=maximum[span])
        count[span] += fires[a:b].sum(0).to(torch.int32)


def span_harvest_topk(
    h: Tensor,
    preactivation: Callable[[Tensor], Tensor],
    k: int,
    bounds: Sequence[int],
    *,
    chunk_bytes: int = 32 << 20,
) -> tuple[Tensor, Tensor]:
    """`span_harvest` for SAEs that keep the k largest pre-activations of a token, where those are positive.

    What is kept of a chunk of tokens is folded as it is found, (n, k) values and places, never made dense again.

    Args:
        h: (n_tokens, d_model) hidden states, spans end to end.
        preactivation: (n, d_model) -> (n, n_latents); magnitudes, for an SAE with signed codes.
        k: latents kept per token.
        bounds: n_spans + 1 ascending offsets into `h`; spans may be empty.
        chunk_bytes: limit on the pre-activations held at a time (never less than one token).

    Returns:
        maximum (n_spans, n_latents) float32 and count (n_spans, n_latents) int32; zero for an empty span.

    >>> maximum, count = span_harvest_topk(torch.tensor([[3.0, 1.0], [-1.0, -2.0]]), Tensor.float, 1, [0, 2])
    >>> maximum.tolist(), count.tolist()
    ([[3.0, 0.0]], [[1, 0]])
    """
    n_latents = preactivation(h[:1] if len(h) else h.new_zeros(1, h.shape[1])).shape[1]
    maximum, count = _empty(h, bounds, n_latents)
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


# Bytes of prepared tokens and of one tile of the product, as float32. On a CPU the tile should stay in a core's cache
# while it is folded, and the tokens in the cache that cores share; a GPU wants few and large products.
_TILES = {"cpu": (8 << 20, 2 << 20), "other": (256 << 20, 512 << 20)}


def _empty(h: Tensor, bounds: Sequence[int], n_latents: int) -> tuple[Tensor, Tensor]:
    shape = (len(bounds) - 1, n_latents)
    return torch.zeros(shape, device=h.device), torch.zeros(shape, dtype=torch.int32, device=h.device)


def _pieces(bounds: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The spans that rows start to end touch, each with its rows counted from start; empty spans are left out."""
    for span in range(max(0, bisect_right(bounds, start) - 1), len(bounds) - 1):
        if bounds[span] >= end:
            return
        a, b = max(bounds[span], start) - start, min(bounds[span + 1], end) - start
        if b > a:
            yield span, a, b
