"""Pool SAE activations over spans of tokens without ever holding all of them."""

from collections.abc import Callable, Sequence

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
    n_spans = len(bounds) - 1
    n_latents = encode(h[:1]).shape[1] if len(h) else encode(h.new_zeros(1, h.shape[1])).shape[1]
    maximum = torch.zeros(n_spans, n_latents, device=h.device)
    count = torch.zeros(n_spans, n_latents, dtype=torch.int32, device=h.device)
    step = max(1, chunk_bytes // (4 * n_latents))
    span = 0
    for start in range(bounds[0], bounds[-1], step):
        end = min(start + step, bounds[-1])
        z = encode(h[start:end]).abs()
        fires = torch.empty_like(z)
        torch.gt(z, 0, out=fires)  # a float mask sums faster than a boolean one
        while bounds[span + 1] <= start:
            span += 1
        j = span
        while j < n_spans and bounds[j] < end:
            a, b = max(bounds[j], start) - start, min(bounds[j + 1], end) - start
            if b > a:
                torch.maximum(maximum[j], z[a:b].amax(0), out=maximum[j])
                count[j] += fires[a:b].sum(0).to(torch.int32)
            j += 1
    return maximum, count
