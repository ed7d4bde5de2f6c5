"""What rounding with error feedback must know of a layer's inputs: their second moment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpc.quant.rotation import Rotation

SLAB = 512
"""Rows or columns of a moment that are worked on at a time, so that temporaries are small beside it."""


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
        made = torch.empty_like(self.matrix)
        slabs = [slice(start, start + SLAB) for start in range(0, len(made), SLAB)]
        for rows in slabs:
            made[rows] = rotation.apply(self.matrix[rows])
        for columns in slabs:
            made[:, columns] = rotation.apply(made[:, columns].t()).t()
        for rows in slabs:
            for columns in slabs:
                if rows.start <= columns.start:
                    mean = (made[rows, columns] + made[columns, rows].t()) / 2
                    made[rows, columns] = mean
                    made[columns, rows] = mean.t()
        held_out = None if self.held_out is None else self.held_out.rotated(rotation)
        return replace(self, matrix=made, held_out=held_out)

    def scaled(self, sizes: Tensor) -> "Moment":
        """The moment of the inputs, each feature times its size: sizes [in_features]."""
        held_out = None if self.held_out is None else self.held_out.scaled(sizes)
        by = sizes.to(self.matrix)
        return replace(self, matrix=self.matrix * by[:, None] * by, held_out=held_out)


def filled_up(moments: Sequence[Moment]) -> list[Moment]:
    """The moments of the experts of a stack, each of its own inputs and of as many inputs of all experts as it has features.

    So an expert that read many inputs keeps its own moment, and one that read few gets that of all. The counts stay those of its own
    inputs. Held-out parts are filled up alike. moments: of one width; those of no inputs are zero.
    """
    held_out = [moment.held_out for moment in moments if moment.held_out is not None]
    assert len(held_out) in (0, len(moments)), "held-out parts of all or of none"
    total = sum(moment.count for moment in moments)
    of_all = torch.zeros_like(moments[0].matrix)
    for moment in moments:
        of_all += moment.matrix * (moment.count / max(total, 1))
    judges: Sequence[Moment | None] = filled_up(held_out) if held_out else [None] * len(moments)
    found = []
    for moment, judge in zip(moments, judges, strict=True):
        more = len(moment.matrix)
        matrix = (moment.matrix * moment.count + of_all * more) / (moment.count + more)
        found.append(Moment(matrix, moment.count, judge))
    return found
