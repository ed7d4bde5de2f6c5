"""Two matrices in the memory of one, each of which half says all: the moments of a factorization, and the factor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB = 512
"""Columns that are copied at a time, so that temporaries are small beside the matrices."""


@dataclass(frozen=True)
class Triangle:
    """What lies at and below the diagonal of a symmetric or a lower triangular matrix.

    kept: [features, features]; above its diagonal are values of another matrix.
    """

    kept: Tensor

    @staticmethod
    def pair(features: int, dtype: torch.dtype, device: torch.device) -> tuple["Triangle", "Triangle"]:
        """Two that are not filled yet, in one matrix [features + 1, features]: one at and above its diagonal, one below."""
        both = torch.empty(features + 1, features, dtype=dtype, device=device)
        return Triangle(both[:-1].t()), Triangle(both[1:])

    def put(self, matrix: Tensor) -> None:
        """Keep the half of a matrix [features, features] of any float dtype."""
        for start, stop in self._slabs():
            self.kept[stop:, start:stop] = matrix[stop:, start:stop]
            corner = self.kept[start:stop, start:stop]
            below = torch.ones_like(corner, dtype=torch.bool).tril()
            corner.copy_(torch.where(below, matrix[start:stop, start:stop], corner))

    def symmetric(self, rows: slice, columns: slice) -> Tensor:
        """Rows of some columns of the symmetric matrix: a copy in float64. rows: from the first of the columns on."""
        assert rows.start == columns.start and columns.stop <= rows.stop
        made = self.kept[rows, columns].to(torch.float64, copy=True)
        corner = made[: columns.stop - columns.start]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        return made

    def fill(self, matrix: Tensor, *, symmetric: bool = False) -> None:
        """Write the half into a matrix [features, features], and its mirror image if the matrix is symmetric."""
        for start, stop in self._slabs():
            corner = self.kept[start:stop, start:stop].tril()
            matrix[start:stop, start:stop] = corner + corner.tril(-1).t() if symmetric else corner
            matrix[stop:, start:stop] = self.kept[stop:, start:stop]
            if symmetric:
                matrix[start:stop, stop:] = self.kept[stop:, start:stop].t()

    @property
    def diagonal(self) -> Tensor:
        """Float64 [features]."""
        return self.kept.diagonal().double()

    def _slabs(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.kept), SLAB):
            yield start, min(start + SLAB, len(self.kept))
