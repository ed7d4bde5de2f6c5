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
from qpc.ir.program import named_tensors
from qpc.passes.replay import Replay
from qpc.passes.student import Student
from qpc.progress import Progress, silent, track
from qpc.sensitivity import parts
from qpc.sensitivity.output_loss import check_usable, reference_in_passing

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
    """Mean loss on held-out samples before a descent and at its end, and after how many steps that was reached.

    obstacle: why passes on a GPU were launched kernel by kernel, which takes longer; None: they were not, or there was no GPU.
    """

    before: float
    after: float
    steps: int
    obstacle: str | None = None

    def told(self, text: str) -> tuple[str, ...]:
        """This text about it, and the obstacle."""
        return (text,) if self.obstacle is None else (text, f"slower than it could be: {self.obstacle}")


@dataclass(eq=False)
class Descent:
    """samples: with held-out ones. seed: of the order of the others."""

    student: Student
    samples: Samples
    seed: int = 0
    progress: Progress = silent
    _parts: list[Tensor] = field(init=False)
    _held_out: list[Tensor] = field(init=False)
    _order: Iterator[Tensor] = field(init=False)
    _sums: Tensor = field(init=False)
    _usable: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._parts = [part for batch in self.samples.batches for part in parts(batch, POSITIONS_AT_ONCE)]
        self._held_out = [part for batch in self.samples.held_out for part in parts(batch, POSITIONS_AT_ONCE)]
        self._order = _shuffled(self._parts, self.seed)
        # What passes add to: loss times positions and positions of those held out, and whether all references were usable.
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.student.program.device)
        self._usable = torch.ones((), dtype=torch.bool, device=self.student.program.device)

    def run(self, course: Course, task: str = "tune") -> Outcome:
        """Descend; the student is left in the best state on the way.

        Raises `ModelError` if the unchanged model has no usable outputs.
        """
        with coarse_products(self.student.program.device), self._replay() as replay, kept_gradients(self.student):
            return self._descended(course, task, replay)

    def held_out_loss(self) -> float:
        """Mean loss over the held-out samples; infinite if it is not finite. Raises `ModelError` as `run` does."""
        with self._replay() as replay:
            return self._judged(replay)

    def _replay(self) -> Replay:
        """What runs passes."""
        devices = {value.device for value in named_tensors(self.student.program.module).values()}
        return Replay(self.student.program.device, "the model is on several devices" if len(devices) > 1 else None)

    def _descended(self, course: Course, task: str, replay: Replay) -> Outcome:
        student = self.student
        before = best = self._judged(replay)
        kept, reached = student.state(), 0
        rates = (course.learning_rate, course.learning_rate, course.matrix_rate)
        groups = [{"params": changes, "lr": rate} for changes, rate in zip(student.changes(), rates, strict=True) if changes]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=student.program.device.type == "cuda" or None)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course.share_at)
        passes = min(course.passes, len(self._parts))
        every = max(1, course.steps // course.checks)
        for step in track(range(1, course.steps + 1), task, course.steps, self.progress):
            for _ in range(passes):
                replay(self._add_gradients, next(self._order))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            schedule.step()
            if step % every == 0 or step == course.steps:
                loss = self._judged(replay)
                if loss < best:
                    best, kept, reached = loss, student.state(), step
        student.restore(kept)
        return Outcome(before, best, reached, replay.obstacle)

    def _add_gradients(self, batch: Tensor) -> None:
        """Of the loss, summed over positions: its scale is nothing to Adam, and in float16 the gradient of a mean would be zero.

        Attention is computed by its formula, for the fused kernels may add up gradients in any order.
        """
        program = self.student.program
        with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
            reference = reference_in_passing(program, program.run((batch,)))
            self._usable.logical_and_(reference.usable)
            with torch.enable_grad():
                torch.autograd.backward(reference.distance(self.student.outputs((batch,))) * reference.positions)

    def _judged(self, replay: Replay) -> float:
        """The held-out loss."""
        self._sums.zero_()
        for batch in self._held_out:
            replay(self._add_loss, batch)
        check_usable(self._usable)
        total, count = self._sums.tolist()
        return total / count if math.isfinite(total) else math.inf

    @torch.no_grad()
    def _add_loss(self, batch: Tensor) -> None:
        """Of a batch that is held out."""
        program = self.student.program
        reference = reference_in_passing(program, program.run((batch,)))
        self._usable.logical_and_(reference.usable)
        self._sums[0].add_(reference.measured(self.student.outputs((batch,))) * reference.positions)
        self._sums[1].add_(reference.positions)


@contextmanager
def kept_gradients(student: Student) -> Iterator[None]:
    """Let all that moves have a gradient, zero at first, that stays where it is until the end."""
    moving = [change for kind in student.changes() for change in kind]
    for change in moving:
        change.grad = torch.zeros_like(change)
    try:
        yield
    finally:
        for change in moving:
            change.grad = None


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
