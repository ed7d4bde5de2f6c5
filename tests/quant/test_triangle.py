"""Two matrices of which each is said by half share the memory of one, and neither sees the other."""

import pytest
import torch

from qpc.quant.triangle import Triangle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "slab"), [(1, 4), (4, 4), (11, 4), (11, 512)])
def test_each_of_two_is_what_was_put(features: int, slab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpc.quant.triangle.SLAB", slab)
    drawn = torch.randn(3, features, features, generator=torch.Generator().manual_seed(features), dtype=dtype)
    one, other, lower = drawn[0] + drawn[0].t(), drawn[1] + drawn[1].t(), drawn[2].double()
    first, second = Triangle.pair(features, dtype, one.device)
    assert first.kept.untyped_storage().nbytes() == second.kept.untyped_storage().nbytes() == features * (features + 1) * one.itemsize
    first.put(one)
    second.put(other)
    for half, matrix in ((first, one), (second, other)):
        assert torch.equal(written(half, symmetric=True), matrix.double())
        assert torch.equal(half.diagonal, matrix.diagonal().double())
        for begin in range(0, features, 3):
            rows, columns = slice(begin, features), slice(begin, min(begin + 3, features))
            part = half.symmetric(rows, columns)
            assert torch.equal(part, matrix[rows, columns].double())
            part.zero_()  # a copy
    first.put(lower)  # rounded as it is put
    assert torch.equal(written(first), lower.to(dtype).double().tril())
    assert torch.equal(written(second, symmetric=True), other.double())


def written(half: Triangle, *, symmetric: bool = False) -> torch.Tensor:
    """What `fill` makes of a matrix of zeros: float64, column by column."""
    matrix = torch.zeros_like(half.kept, dtype=torch.float64, memory_format=torch.contiguous_format).t()
    half.fill(matrix, symmetric=symmetric)
    return matrix
