"""What rounding with error feedback must know of a layer's inputs: their second moment."""

from dataclasses import dataclass, replace

from torch import Tensor

from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Moment:
    """The mean of x x^T over the inputs x of one or more linears.

    matrix: symmetric, positive semidefinite up to rounding, float32 or float64 [in_features, in_features]; singular where there are
        fewer inputs than features. count: number of inputs averaged over.
    held_out: the same of other inputs, by which damping or shrinkage can be judged; None if no inputs were held out.
    """

    matrix: Tensor
    count: int
    held_out: "Moment | None" = None

    def rotated(self, rotation: Rotation) -> "Moment":
        """The moment R H R^T of the rotated inputs R x."""
        half = rotation.apply(self.matrix)
        full = rotation.apply(half.t())
        held_out = None if self.held_out is None else self.held_out.rotated(rotation)
        return replace(self, matrix=(full + full.t()) / 2, held_out=held_out)

    def scaled(self, sizes: Tensor) -> "Moment":
        """The moment of the inputs, each feature times its size: sizes [in_features]."""
        held_out = None if self.held_out is None else self.held_out.scaled(sizes)
        by = sizes.to(self.matrix)
        return replace(self, matrix=self.matrix * by[:, None] * by, held_out=held_out)
