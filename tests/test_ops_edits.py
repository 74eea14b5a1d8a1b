"""ablate_features and project_out against float64 formulas and finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trl_anatomy.errors import AnatomyError
from trl_anatomy.ops.ablate_features import ablate_features
from trl_anatomy.ops.project_out import project_out

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WIDTHS = (1, 48, 100)


def rows(u: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Latents that fire on about a third of random tokens."""
    made = torch.Generator().manual_seed(seed)
    values = {
        "encoder": torch.randn(u, d, generator=made, dtype=torch.float64) / d**0.5,
        "bias": torch.randn(u, generator=made, dtype=torch.float64) / 10,
        "threshold": torch.rand(u, generator=made, dtype=torch.float64) / 2,
        "decoder": torch.randn(u, d, generator=made, dtype=torch.float64) / d**0.5,
    }
    return {name: value.to(dtype) for name, value in values.items()}


def hidden(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(r: int, d: int) -> Tensor:
    made = torch.Generator().manual_seed(2)
    return torch.linalg.qr(torch.randn(d, r, generator=made, dtype=torch.float64))[0].T.contiguous()


def wanted_ablation(h: Tensor, w: dict[str, Tensor], strength: float, kth: Tensor | None) -> Tensor:
    """The formula by autograd in float64, with the firing set of the op's own inputs."""
    h = h.double()
    w = {name: value.double() for name, value in w.items()}
    z = torch.einsum("...d,ud->...u", h, w["encoder"]) + w["bias"]
    fire = z > w["threshold"]
    if kth is not None:
        fire &= z >= kth.double()[..., None]
    return h - strength * torch.einsum("...u,ud->...d", torch.where(fire, z, 0.0), w["decoder"])


def errors(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


# Rounding of one product and of the result; for bfloat16 the result's rounding is all there is.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("with_kth", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_ablation_is_the_formula_and_its_gradient(dtype: torch.dtype, d: int, with_kth: bool, strength: float) -> None:
    h, w = hidden((3, 7, d), dtype), rows(5, d, torch.float64 if dtype == torch.float64 else torch.float32)
    kth = hidden((3, 7), torch.float64, 4).abs() / 2 if with_kth else None
    g = hidden((3, 7, d), dtype, 3)
    x = h.clone().requires_grad_()
    y = ablate_features(x, **w, strength=strength, kth=kth)
    y.backward(g)
    truth = h.double().requires_grad_()
    wanted = wanted_ablation(truth, w, strength, kth)
    wanted.backward(g.double())
    assert (wanted - truth).abs().max() > 0.1
    assert y.dtype == dtype
    assert x.grad is not None
    assert truth.grad is not None
    assert x.grad.dtype == dtype
    assert errors(y, wanted.detach()) < TOLERANCE[dtype]
    assert errors(x.grad, truth.grad) < TOLERANCE[dtype]


def test_ablation_has_the_gradient_that_finite_differences_find() -> None:
    h, w = hidden((6, 20), torch.float64), rows(4, 20)
    assert torch.autograd.gradcheck(lambda x: ablate_features(x, **w, strength=0.7), h.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("r", [1, 3])
def test_projection_is_the_formula_and_its_gradient(dtype: torch.dtype, d: int, r: int) -> None:
    r = min(r, d)
    h, v, g = hidden((3, 7, d), dtype), basis(r, d), hidden((3, 7, d), dtype, 3)
    x = h.clone().requires_grad_()
    y = project_out(x, v if dtype == torch.float64 else v.float())
    y.backward(g)
    projector = torch.eye(d, dtype=torch.float64) - v.T @ v
    assert y.dtype == dtype
    assert x.grad is not None
    # At width 1 nothing is left, so errors are told relative to what went in.
    for got, source in ((y, h), (x.grad, g)):
        assert (got.double() - source.double() @ projector).norm() < TOLERANCE[dtype] * source.double().norm()


@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_little_is_left_along_the_span(dtype: torch.dtype, left: float) -> None:
    v = basis(8, 300)
    h = hidden((50, 300), dtype)
    h += 20 * v[0].to(dtype)  # a direction that the model uses much
    h[:, 7] *= 300  # a massive activation, as real models have
    y = project_out(h, v.float()).double()
    assert ((y @ v.T).norm(dim=1) / h.double().norm(dim=1)).max() < left


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_change_nothing(dtype: torch.dtype) -> None:
    w, v = rows(5, 48), basis(2, 48)
    base = hidden((48, 10, 4), dtype)
    for edit in (lambda x: ablate_features(x, **w), lambda x: project_out(x, v)):
        strided = base.clone().requires_grad_()
        packed = base.permute(2, 1, 0).contiguous().requires_grad_()
        out, wanted = edit(strided.permute(2, 1, 0)), edit(packed)
        assert torch.equal(out, wanted)
        out.sum().backward()
        wanted.sum().backward()
        assert strided.grad is not None
        assert packed.grad is not None
        assert torch.equal(strided.grad.permute(2, 1, 0), packed.grad)


def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_anatomy.ops import _rows

    h, w, v = hidden((101, 48), torch.float32), rows(5, 48, torch.float32), basis(2, 48).float()
    whole = ablate_features(h, **w), project_out(h, v)
    monkeypatch.setattr(_rows, "_CPU_BLOCK_BYTES", 1)
    assert len(list(_rows.row_blocks(h, h.dtype))) == 7
    torch.testing.assert_close((ablate_features(h, **w), project_out(h, v)), whole)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)])
def test_no_token_at_all(shape: tuple[int, ...]) -> None:
    for edit in (lambda x: ablate_features(x, **rows(5, 48)), lambda x: project_out(x, basis(2, 48))):
        h = torch.zeros(shape, requires_grad=True)
        y = edit(h)
        assert y.shape == shape
        y.sum().backward()
        assert h.grad is not None
        assert h.grad.shape == shape


def test_no_latent_and_no_direction() -> None:
    h = hidden((3, 48), torch.float32)
    assert torch.equal(ablate_features(h, **rows(0, 48)), h)
    assert torch.equal(project_out(h, basis(0, 48)), h)


def test_autocast_does_not_reach_inside() -> None:
    h, w, v = hidden((9, 48), torch.float32), rows(5, 48, torch.float32), basis(2, 48).float()
    wanted: list[Any] = []
    for autocast in (False, True):
        x = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = project_out(ablate_features(x, **w), v)
            y.square().sum().backward()
        wanted.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*wanted, strict=True))


def test_only_the_firing_set_is_kept_for_the_gradient() -> None:
    h, w, v = hidden((64, 48), torch.float32).requires_grad_(), rows(5, 48, torch.float32), basis(2, 48).float()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project_out(ablate_features(h, **w), v)
    made = [t for t in saved if all(t.data_ptr() != kept.data_ptr() for kept in (*w.values(), v))]
    assert [(tuple(t.shape), t.dtype) for t in made] == [((64, 5), torch.bool)]


def test_shapes_that_do_not_belong_together_are_told() -> None:
    w = rows(5, 48)
    with pytest.raises(AnatomyError, match=r"encoder \(5, 48\)"):
        ablate_features(torch.zeros(3, 40), **w)
    with pytest.raises(AnatomyError, match=r"kth is \(3, 1\)"):
        ablate_features(torch.zeros(3, 48), **w, kth=torch.zeros(3, 1))
    with pytest.raises(AnatomyError, match="threshold"):
        ablate_features(torch.zeros(3, 48), **{**w, "threshold": torch.zeros(1)})
    with pytest.raises(AnatomyError, match=r"must be \(r, 40\)"):
        project_out(torch.zeros(3, 40), basis(2, 48))
