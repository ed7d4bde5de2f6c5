"""Gradient descent of a student towards the model that it was made from, judged by samples that it does not learn from.

The loss is that against the unchanged model (KL of its next-token distributions, or the relative error of another output), so no labels
are needed, and text that the model sampled from itself will do. Adam (arXiv 1412.6980) moves scales relative to themselves and all else
relative to its root mean square. The learning rate warms up and falls to zero along a cosine. The state of the least held-out loss is
kept, and that is the first one if nothing is better.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qpc.calibration import Samples
from qpc.passes.student import Student
from qpc.progress import Progress, silent, track
from qpc.sensitivity import parts
from qpc.sensitivity.output_loss import reference_of

POSITIONS_AT_ONCE = 2048
"""Positions of one pass, at least one sequence; their activations are in memory at once."""

WARM_UP = 5
"""Steps in which the learning rate rises."""

BETAS = (0.9, 0.95)
"""Of Adam."""


@dataclass(frozen=True)
class Course:
    """How long and how fast.

    steps: of gradient descent. learning_rate: the largest relative change in a step, of scales and vectors; matrix_rate: of matrices.
    passes: backward passes of one step, each of about `POSITIONS_AT_ONCE`, if there are so many. checks: how often the held-out loss is
    taken.
    """

    steps: int
    learning_rate: float
    matrix_rate: float
    passes: int = 2
    checks: int = 5

    def share_at(self, step: int) -> float:
        """Of the learning rate, in a step counted from 0."""
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class Outcome:
    """Mean loss on held-out samples before a descent and at its end, and after how many steps that was reached."""

    before: float
    after: float
    steps: int


@dataclass(eq=False)
class Descent:
    """samples: with held-out ones. seed: of the order of the others."""

    student: Student
    samples: Samples
    seed: int = 0
    progress: Progress = silent
    _parts: list[Tensor] = field(init=False)
    _order: Iterator[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = [part for batch in self.samples.batches for part in parts(batch, POSITIONS_AT_ONCE)]
        self._order = _shuffled(self._parts, self.seed)

    def run(self, course: Course, task: str = "tune") -> Outcome:
        """Descend; the student is left in the best state on the way."""
        with coarse_products(self.student.program.device):
            return self._descended(course, task)

    def _descended(self, course: Course, task: str) -> Outcome:
        student = self.student
        before = best = self.held_out_loss()
        kept, reached = student.state(), 0
        rates = (course.learning_rate, course.learning_rate, course.matrix_rate)
        groups = [{"params": changes, "lr": rate} for changes, rate in zip(student.changes(), rates, strict=True) if changes]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course.share_at)
        passes = min(course.passes, len(self._parts))
        every = max(1, course.steps // course.checks)
        for step in track(range(1, course.steps + 1), task, course.steps, self.progress):
            self._add_gradients([next(self._order) for _ in range(passes)])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % every == 0 or step == course.steps:
                loss = self.held_out_loss()
                if loss < best:
                    best, kept, reached = loss, student.state(), step
        student.restore(kept)
        return Outcome(before, best, reached)

    def _add_gradients(self, batches: Sequence[Tensor]) -> None:
        """Of the loss, summed over positions: its scale is nothing to Adam, and in float16 the gradient of a mean would be zero.

        Attention is computed by its formula, for the fused kernels may add up gradients in any order.
        """
        program = self.student.program
        for batch in batches:
            inputs = (batch.to(program.device),)
            with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
                reference = reference_of(program, program.run(inputs))
                with torch.enable_grad():
                    torch.autograd.backward(reference.distance(self.student.outputs(inputs)) * reference.positions)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over the held-out samples; infinite if it is not finite."""
        program, total, count = self.student.program, 0.0, 0
        for batch in [part for given in self.samples.held_out for part in parts(given, POSITIONS_AT_ONCE)]:
            inputs = (batch.to(program.device),)
            reference = reference_of(program, program.run(inputs))
            total += reference.positions * reference.loss(self.student.outputs(inputs))
            count += reference.positions
        return total / count if math.isfinite(total) else math.inf


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """On a GPU multiply float32 matrices by tensor cores, whose operands have ten bits: enough for gradients."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _shuffled(batches: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """All of them in a random order, and again in another."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(batches, len(batches))
