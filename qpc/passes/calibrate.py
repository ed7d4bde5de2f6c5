"""Calibrate: how much of the error of each weight feedback will leave, known before anything is rounded."""

from dataclasses import dataclass, field
from typing import ClassVar

from qpc.calibration import Samples
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.feedbacks import Feedbacks, Known
from qpc.progress import Progress, silent, track


@dataclass(frozen=True)
class Calibrate(Pass):
    """Takes the second moment of what each linear reads, in the original model, and factors it as the rounding will.

    The share of white rounding errors that is left depends on the moment alone, not on the quantizer. It is judged by held-out samples
    where there are any, for on its own samples feedback looks better than it is. Only the factors are kept, as far as memory allows.

    samples: as `Quantize` will have them, with the same seed and rotation_block. known: where the feedback is left for it.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.GROUPED
    samples: Samples
    seed: int = 0
    rotation_block: int | None = None
    known: Known = field(default_factory=Known)
    progress: Progress = silent

    def run(self, program: Program) -> PassResult:
        """Annotate every linear with its expected share."""
        nodes = tuple(program.linears())
        feedbacks = Feedbacks(program, nodes, self.samples, self.seed, self.rotation_block)
        stages = len({annotation(node).group for node in nodes})
        changed = []
        for jobs in track(feedbacks.in_turn(feedbacks.stream(sequential=False)), "calibrate", stages, self.progress):
            for job in jobs:
                assert job.feedback is not None
                for node in job.sites:
                    annotate(node, annotation(node).but(share=job.feedback.expected_share))
                self.known.keep(job.key, job.feedback)
                changed.append(site_of(job.sites[0]).name)
        return PassResult(tuple(changed))
