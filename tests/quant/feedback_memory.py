"""Prints how many matrices of a moment's size in float32 are held at most while it is factored, in a process that does nothing else."""

import torch

from qpc.quant import feedback, triangle
from qpc.quant.feedback import Feedback
from qpc.quant.moment import Moment
from tests.memory import memory_bytes, settled

WIDE = 2048
"""Features of a moment beside which slabs are small."""


def main() -> None:
    """The second time counts: libraries take memory of their own the first time."""
    feedback.SLAB = triangle.SLAB = 64
    held = 0
    for _ in range(2):
        before = settled()
        drawn = torch.randn(2, 64, WIDE, generator=torch.Generator().manual_seed(0))
        moments = [Moment(drawn[0].t() @ drawn[0], 64, Moment(drawn[1].t() @ drawn[1], 64))]
        found = Feedback.of(moments.pop(), damping=0.1)
        held = memory_bytes("VmHWM") - before
        assert found.nbytes > 2 * 4 * WIDE**2
        del found
    print(held / (4 * WIDE**2))


if __name__ == "__main__":
    main()
