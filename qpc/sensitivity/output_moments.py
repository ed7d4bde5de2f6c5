"""Second moments of the gradients with respect to what linears write: how much errors of their outputs matter, and which matter together.

They are taken on the backward passes of `qpc.sensitivity.gradient`, all positions alike. Feedback between the rows of a weight needs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from qpc.ir.annotation import site_of
from qpc.ir.linear import LINEAR
from qpc.ir.program import Program
from qpc.quant.moment import Moment
from qpc.sensitivity.sites import by_weight

MOST_BYTES = 16 << 30
"""Memory for the moments of all weights; those with the most outputs go without first."""


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """Sums that grow with every backward pass.

    rows: outputs of each weight that is watched. declined: what is left out, and why, to be said.
    """

    rows: Mapping[str, int]
    declined: str | None = None
    _sums: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    _counts: list[dict[str, int]] = field(default_factory=lambda: [{}, {}])

    @staticmethod
    def of(program: Program, most_bytes: int = MOST_BYTES) -> "OutputMoments":
        """Of the weights of a program, as many as memory allows: two float32 matrices for each, one of them on held-out samples."""
        plain = [nodes[0] for nodes in by_weight(program) if nodes[0].target is LINEAR]  # a stack of experts is rounded row by row
        shapes = {site_of(node).weight: site_of(node).shape for node in plain}
        rows, held = {}, 0
        for weight, shape in sorted(shapes.items(), key=lambda item: item[1].out_features):
            held += 2 * 4 * shape.out_features**2
            if held <= most_bytes:
                rows[weight] = shape.out_features
        if len(rows) == len(shapes):
            return OutputMoments(MappingProxyType(rows))
        left_out = sorted({shape.out_features for weight, shape in shapes.items() if weight not in rows})
        reason = f"errors are not carried between the rows of {len(shapes) - len(rows)} weights, of {left_out[0]} outputs and more"
        reason += f": the moments of all gradients would take {held / 2**30:.0f} GiB, more than {most_bytes / 2**30:.0f}"
        return OutputMoments(MappingProxyType(rows), reason)

    def add(self, weight: str, gradient: Tensor, held_out: bool) -> None:
        """The gradients [..., out_features] at some positions."""
        if weight not in self.rows:
            return
        wide = gradient.detach().flatten(0, -2).float()
        sums, counts = self._sums[held_out], self._counts[held_out]
        if weight in sums:
            sums[weight].addmm_(wide.t(), wide)
        else:
            sums[weight] = wide.t() @ wide
        counts[weight] = counts.get(weight, 0) + len(wide)

    def moments(self) -> dict[str, Moment]:
        """What was found: by name of the weight, of which nothing is known if its gradients were zero or not finite."""
        found = {}
        for weight, total in self._sums[False].items():
            held_out = self._moment(weight, True)
            if bool(total.isfinite().all()) and bool(total.diagonal().sum() > 0):
                found[weight] = Moment(total / self._counts[False][weight], self._counts[False][weight], held_out)
        return found

    def _moment(self, weight: str, held_out: bool) -> Moment | None:
        total, count = self._sums[held_out].get(weight), self._counts[held_out].get(weight, 0)
        return None if total is None or not bool(torch.isfinite(total).all()) else Moment(total / count, count)
