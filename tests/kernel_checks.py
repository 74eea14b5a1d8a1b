"""The Triton kernels against plain torch and float64, run by test_triton.py in a process of its own.

On a GPU, or on the CPU where TRITON_INTERPRET=1 was set before Triton was imported. A kernel's error may be at most
twice that of plain torch on the same operands.
"""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from test_ops_edits import basis, hidden, rows, wanted_ablation
from torch import Tensor

from trl_anatomy.ops import _rows, _triton_edit_rows, _triton_pool, span_harvest
from trl_anatomy.ops.ablate_features import ablate_features
from trl_anatomy.ops.pooled_projection import pooled_projection
from trl_anatomy.ops.project_out import project_out
from trl_anatomy.ops.span_harvest import span_harvest_threshold

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = [0, 0, 3, 3, 50, 53, 53]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran; none may be left out silently."""
    ran: list[str] = []

    def watch(module: ModuleType, name: str) -> None:
        kernel = getattr(module, name)

        def noted(*args: Any, **settings: Any) -> Any:
            ran.append(name)
            return kernel(*args, **settings)

        monkeypatch.setattr(module, name, noted)

    watch(_triton_edit_rows, "edit_rows")
    watch(_triton_pool, "fold")
    watch(_triton_pool, "project")
    return ran


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (kernel, plain torch) of all outputs of `run`."""
    monkeypatch.setattr(_rows, "kernels_for", lambda *tensors: True)
    kernel = run()
    monkeypatch.setattr(_rows, "kernels_for", lambda *tensors: False)
    yield from zip(kernel, run(), strict=True)


def compare(found: Iterator[tuple[Tensor, Tensor]], truth: tuple[Tensor, ...]) -> None:
    for (kernel, plain), wanted in zip(found, truth, strict=True):
        assert (kernel.shape, kernel.dtype) == (plain.shape, plain.dtype)
        assert torch.isfinite(kernel).all()
        error, own = ((x.double().cpu() - wanted).norm() for x in (kernel, plain))
        # The interpreter cuts bfloat16 off where a GPU rounds, which alone doubles the error.
        factor = 3 if DEVICE == "cpu" and kernel.dtype == torch.bfloat16 else 2
        # Where torch happens to be exact, a few roundings of the largest entry in float32 are still allowed.
        assert error <= factor * own + 4 * torch.finfo(torch.float32).eps * wanted.abs().max(), (error, own)


def test_kernels_are_chosen_on_a_gpu_only() -> None:
    x = torch.zeros(1, device=DEVICE)
    assert _rows.kernels_for(x) == (DEVICE == "cuda")
    assert not _rows.kernels_for(x, x.double())
    assert not _rows.kernels_for(x.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "u"), [(70, 80, 5), (40, 17, 1), (33, 130, 40)])
@pytest.mark.parametrize("same_type", [False, True])
@pytest.mark.parametrize("with_kth", [False, True])
def test_ablation(  # noqa: PLR0913
    dtype: torch.dtype,
    n: int,
    d: int,
    u: int,
    same_type: bool,
    with_kth: bool,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = {name: value.to(DEVICE) for name, value in rows(u, d, dtype if same_type else torch.float32).items()}
    h, g = hidden((n, d), dtype).to(DEVICE), hidden((n, d), dtype, 3).to(DEVICE)
    kth = (hidden((n,), torch.float32, 4).abs() / 2).to(DEVICE) if with_kth else None

    def run() -> tuple[Tensor, ...]:
        x = h.clone().requires_grad_()
        y = ablate_features(x, **w, strength=0.7, kth=kth)
        y.backward(g)
        assert x.grad is not None
        return y.detach(), x.grad

    x = h.double().cpu().requires_grad_()
    cpu = {name: value.cpu() for name, value in w.items()}
    y = wanted_ablation(x, cpu, 0.7, None if kth is None else kth.cpu())
    y.backward(g.double().cpu())
    assert x.grad is not None
    compare(both(monkeypatch, run), (y.detach(), x.grad))
    assert calls == ["edit_rows"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "r"), [(80, 3), (130, 20)])
def test_projection(dtype: torch.dtype, d: int, r: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    v, g = basis(r, d), hidden((40, d), dtype, 3).to(DEVICE)
    h = hidden((40, d), dtype).to(DEVICE)

    def run() -> tuple[Tensor, ...]:
        x = h.clone().requires_grad_()
        y = project_out(x, v.float().to(DEVICE))
        y.backward(g)
        assert x.grad is not None
        return y.detach(), x.grad

    projector = torch.eye(d, dtype=torch.float64) - v.T @ v
    compare(both(monkeypatch, run), (h.double().cpu() @ projector, g.double().cpu() @ projector))
    assert calls == ["edit_rows"] * 2


def test_edits_of_strided_and_of_no_tokens(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = {name: value.float().to(DEVICE) for name, value in rows(3, 40).items()}, basis(2, 40).float().to(DEVICE)
    monkeypatch.setattr(_rows, "kernels_for", lambda *tensors: True)
    base = hidden((40, 18), torch.float32).to(DEVICE)
    wide = hidden((18, 64), torch.float32).to(DEVICE)
    for h in (base.T, wide[:, 3:43], wide[::2, :40], base.T[:0], base.view(40, 2, 9).permute(2, 1, 0)):
        for edit in (lambda x: ablate_features(x, **w), lambda x: project_out(x, v)):
            torch.testing.assert_close(edit(h), edit(h.contiguous().clone()), rtol=0, atol=0)
    assert len(calls) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [BOUNDS, [4, 30, 30, 41], [2, 2]])
def test_span_harvest(dtype: torch.dtype, bounds: list[int], calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype != torch.float32 and DEVICE == "cpu":
        dtype = torch.float32  # the product is cuBLAS's; the fold sees float32 either way
    monkeypatch.setitem(span_harvest._TILES, DEVICE, (20, 20 * 280))  # 20 tokens, 70 latents
    h, encoder = hidden((53, 16), dtype).to(DEVICE), (hidden((16, 300), dtype, 5) / 4).to(DEVICE)
    bias, threshold = (hidden((300,), torch.float32, seed).abs().to(DEVICE) / 2 for seed in (6, 7))
    bias = -bias

    def run() -> tuple[Tensor, ...]:
        return span_harvest_threshold(h, encoder, bias, threshold, bounds, prepare=lambda x: x)

    z = h.double().cpu() @ encoder.double().cpu() + bias.double().cpu()
    z = torch.where(z > threshold.double().cpu(), z, 0.0)
    spans = [z[a:b] for a, b in pairwise(bounds)]
    maximum = torch.stack([part.amax(0) if len(part) else part.sum(0) for part in spans])
    count = torch.stack([(part > 0).sum(0) for part in spans])
    (kernel, plain), (fired, wanted) = both(monkeypatch, run)
    compare(iter([(kernel, plain)]), (maximum,))
    assert torch.equal(fired, wanted)
    assert torch.equal(fired.cpu(), count.int())
    assert set(calls) == ({"fold"} if bounds[-1] > bounds[0] else set())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize(("d", "k"), [(80, 3), (17, 20)])
def test_pooled_projection(
    dtype: torch.dtype, reduce: str, d: int, k: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h, v = hidden((53, d), dtype).to(DEVICE), basis(min(k, d), d).repeat(2, 1)[:k].float().to(DEVICE)
    scores = h.double().cpu() @ v.double().cpu().T
    for bounds, strided in ((BOUNDS, False), ([4, 30, 30, 41], True), ([2, 2], False)):
        x = h.T.contiguous().T if strided else h
        spans = [scores[a:b] for a, b in pairwise(bounds)]
        pool = {"max": lambda part: part.amax(0), "mean": lambda part: part.mean(0), "sum": lambda part: part.sum(0)}
        truth = torch.stack([pool[reduce](part) if len(part) else torch.zeros(k).double() for part in spans])
        compare(
            both(monkeypatch, lambda x=x, bounds=bounds: (pooled_projection(x, v, bounds, reduce=reduce),)), (truth,)
        )
    assert calls == ["project"] * 3
