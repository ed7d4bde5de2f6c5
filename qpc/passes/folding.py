"""What folding does to one parameter, as a value: a gain of the inputs, a rotation of them, rotations of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qpc.quant.rotation import Rotation

BLOCKS_AT_ONCE = 4096
"""Blocks that are rotated at a time, which bounds the memory of the temporaries."""


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `last` of a matrix, or elements of a bias, to be rotated in blocks of the width of the rotation."""

    first: int
    last: int
    rotation: Rotation


@dataclass(frozen=True)
class Folded:
    """The new value of a parameter, for given old ones.

    gain: [in_features], what the inputs were multiplied by. inputs: of the input axis, in blocks of its width. rows: of the output axis.
    transposed: a matrix is stored [in_features, out_features]. unit: whatever it was, it is this number now.
    """

    gain: Tensor | None = None
    inputs: Rotation | None = None
    rows: Rows | None = None
    transposed: bool = False
    unit: float | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The new value, computed in the dtype of the old."""
        if self.unit is not None:
            return torch.full_like(value, self.unit)
        matrix = value.t() if self.transposed else value
        if self.gain is not None:
            matrix = matrix * self.gain.to(matrix.dtype)
        if self.inputs is not None:
            matrix = _by_blocks(self.inputs, matrix)
        if self.rows is not None:
            first, last = self.rows.first, self.rows.last
            turned = _by_blocks(self.rows.rotation, matrix[first:last].movedim(0, -1)).movedim(-1, 0)
            matrix = torch.cat([matrix[:first], turned, matrix[last:]])
        return matrix.t() if self.transposed else matrix

    def stored(self, value: Tensor) -> Tensor:
        """The new value in the dtype of the old, computed in float64, or in float32 for half types."""
        wide = torch.float32 if value.dtype.itemsize < 4 else torch.float64
        return self(value.to(wide)).to(value.dtype).contiguous()


def gain_price(weight: Tensor, gain: Tensor) -> float:
    """How much more error ideal feedback leaves at the same rate once the gain is in the weight.

    weight: [out_features, in_features]; gain: [in_features]. Feedback leaves the square of the rounding error, which is in proportion to
    the mean square of the weight, times the trace of D, the moment of the inputs being L D L^T (QuIP, arXiv 2307.13304, theorem 1). The
    mean of D is at least the geometric mean of the eigenvalues of the moment. A gain moves from the inputs, where its geometric mean
    counts, to the weight, where the mean of its squares does. Columns without a gain count on neither side.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns, squares = torch.linalg.vector_norm(weight, dim=0, dtype=wide).double().square(), gain.double().square()
    live = (columns * squares) > 0
    if not bool(live.any()):
        return 1.0
    columns, squares = columns[live], squares[live]
    return float((columns * squares).mean() / columns.mean() / squares.log().mean().exp())


def _by_blocks(rotation: Rotation, value: Tensor) -> Tensor:
    """Rotate each block of the last axis that is as wide as the rotation; of a large table not all rows at once."""
    blocks = value.reshape(-1, rotation.features)
    turned = torch.empty_like(blocks)
    for source, target in zip(torch.split(blocks, BLOCKS_AT_ONCE), torch.split(turned, BLOCKS_AT_ONCE), strict=True):
        target.copy_(rotation.apply(source))
    return turned.reshape(value.shape)
