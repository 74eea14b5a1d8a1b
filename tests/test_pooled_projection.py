"""Pooled projections against a loop in float64."""

import pytest
import torch

from trl_anatomy.errors import AnatomyError
from trl_anatomy.ops.pooled_projection import pooled_projection


@pytest.mark.parametrize("bounds", [[0, 7, 7, 41], [0, 0], [3, 10, 30, 30], list(range(42))])
@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_spans_are_reduced_one_by_one(bounds: list[int], reduce: str, dtype: torch.dtype, strided: bool) -> None:
    made = torch.Generator().manual_seed(0)
    h = torch.randn(33, 41, generator=made).T if strided else torch.randn(41, 33, generator=made)
    h, directions = h.to(dtype), torch.randn(3, 33, generator=made, dtype=torch.float64)
    got = pooled_projection(h, directions if dtype == torch.float64 else directions.float(), bounds, reduce=reduce)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = h.double() @ directions.T
    for j in range(len(bounds) - 1):
        part = scores[bounds[j] : bounds[j + 1]]
        wanted = torch.zeros(3, dtype=torch.float64)
        if len(part):
            wanted = part.amax(0) if reduce == "max" else getattr(part, reduce)(0)
        torch.testing.assert_close(got[j].double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_pooled_is_told() -> None:
    with pytest.raises(AnatomyError, match="reduce is 'min'; allowed: max, mean, sum"):
        pooled_projection(torch.zeros(2, 3), torch.zeros(1, 3), [0, 2], reduce="min")
    with pytest.raises(AnatomyError, match=r"h is \(2, 3\) and directions \(1, 4\)"):
        pooled_projection(torch.zeros(2, 3), torch.zeros(1, 4), [0, 2])
