"""Pooling over spans in chunks equals pooling all at once, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reading_world import tiny_sae

from trl_anatomy.ops.span_harvest import span_harvest

BOUNDS = {
    "ordinary": [0, 7, 19, 20, 41],
    "empty spans": [0, 0, 5, 5, 5, 41, 41],
    "one span": [0, 41],
    "every token": list(range(42)),
    "a part of the tokens": [3, 10, 30],
}


def reference(codes: torch.Tensor, bounds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    values = codes.double().abs().numpy()
    maximum = np.zeros((len(bounds) - 1, values.shape[1]))
    count = np.zeros_like(maximum, dtype=np.int64)
    for j in range(len(bounds) - 1):
        for t in range(bounds[j], bounds[j + 1]):
            maximum[j] = np.maximum(maximum[j], values[t])
            count[j] += values[t] > 0
    return maximum, count


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("chunk_tokens", [0, 1, 3, 7, 1000])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu"])
def test_chunks_change_nothing(name: str, chunk_tokens: int, architecture: str) -> None:
    h = torch.randn(41, 32, generator=torch.Generator().manual_seed(2))
    encode: Callable[[torch.Tensor], torch.Tensor] = tiny_sae(architecture).requires_grad_(False).encode
    maximum, count = span_harvest(h, encode, BOUNDS[name], chunk_bytes=chunk_tokens * 64 * 4)
    assert (maximum.dtype, count.dtype) == (torch.float32, torch.int32)
    wanted_maximum, wanted_count = reference(encode(h), BOUNDS[name])
    np.testing.assert_allclose(maximum.numpy(), wanted_maximum, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(count.numpy(), wanted_count)


def test_dense_activations_stay_within_the_chunk() -> None:
    largest = 0

    def encode(h: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(h) * 256 * 4)
        return h.repeat(1, 128)

    span_harvest(torch.randn(500, 2), encode, [0, 250, 500], chunk_bytes=20_000)
    assert 10_000 < largest <= 20_000


def test_no_token_at_all() -> None:
    maximum, count = span_harvest(torch.zeros(0, 32), tiny_sae("topk").encode, [0, 0, 0, 0])
    assert maximum.shape == (3, 64)
    assert not maximum.any()
    assert not count.any()
