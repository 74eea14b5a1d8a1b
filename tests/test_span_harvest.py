"""Pooling over spans in chunks equals pooling all at once, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reading_world import tiny_sae

from trl_anatomy.ops import span_harvest as module
from trl_anatomy.ops.span_harvest import span_harvest, span_harvest_threshold, span_harvest_topk
from trl_anatomy.reading.sae import SAE

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


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    "architecture", ["standard", "jumprelu", "topk", "abstopk", "gated", "matching_pursuit", "transcoder"]
)
def test_every_sae_pools_what_it_encodes(
    name: str, tokens: int, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._TILES, "cpu", (tokens, 64 * 4))  # 64 latents of 100 at a time
    h = torch.randn(32, 41, generator=torch.Generator().manual_seed(2)).T  # not contiguous
    sae = SAE(tiny_sae(architecture, d_sae=100))
    maximum, count = sae.pool_spans(h, BOUNDS[name], tokens * 100 * 4)
    assert (maximum.dtype, count.dtype) == (torch.float32, torch.int32)
    wanted_maximum, wanted_count = reference(sae.encode(h), BOUNDS[name])
    assert wanted_count.any()
    np.testing.assert_allclose(maximum.numpy(), wanted_maximum, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(count.numpy(), wanted_count)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_tokens_that_are_normalised_before(normalization: str) -> None:
    h = torch.randn(41, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    sae = SAE(tiny_sae("standard", normalize_activations=normalization))
    maximum, count = sae.pool_spans(h, [0, 20, 41], 1 << 20)
    wanted_maximum, wanted_count = reference(sae.encode(h), [0, 20, 41])
    np.testing.assert_allclose(maximum.numpy(), wanted_maximum, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(count.numpy(), wanted_count)


@pytest.mark.parametrize("chunk_tokens", [0, 3, 1000])
def test_the_k_largest_with_fewer_than_k_positive(chunk_tokens: int) -> None:
    pre = torch.randn(41, 9, generator=torch.Generator().manual_seed(3)) - 0.8
    maximum, count = span_harvest_topk(pre, torch.Tensor.float, 4, [0, 10, 41], chunk_bytes=chunk_tokens * 36)
    kept = torch.zeros_like(pre).scatter_(1, pre.topk(4).indices, 1.0) * pre.relu()
    assert ((kept > 0).sum(1) < 4).any()
    wanted_maximum, wanted_count = reference(kept, [0, 10, 41])
    np.testing.assert_allclose(maximum.numpy(), wanted_maximum, rtol=1e-6)
    np.testing.assert_array_equal(count.numpy(), wanted_count)


def test_the_product_is_never_held_whole() -> None:
    h, encoder = torch.randn(4096, 64), torch.randn(64, 2048)
    bias = threshold = torch.zeros(2048)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch():
        span_harvest_threshold(h, encoder, bias, threshold, [0, 1000, 4096])
    assert 1 << 20 < largest <= 8 << 20  # the whole product would be 32 MiB


def test_dense_activations_stay_within_the_chunk() -> None:
    largest = 0

    def encode(h: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(h) * 256 * 4)
        return h.repeat(1, 128)

    span_harvest(torch.randn(500, 2), encode, [0, 250, 500], chunk_bytes=20_000)
    assert 10_000 < largest <= 20_000


def test_no_token_at_all() -> None:
    for architecture in ("jumprelu", "topk", "gated"):
        maximum, count = SAE(tiny_sae(architecture)).pool_spans(torch.zeros(0, 32), [0, 0, 0, 0], 1 << 20)
        assert maximum.shape == (3, 64)
        assert not maximum.any()
        assert not count.any()
