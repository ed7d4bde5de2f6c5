"""Tune: after rounding, let what is continuous follow the gradient of the loss, as far as held-out samples are better for it.

(Tuning after rounding: QuIP#, arXiv 2402.04396, section 5.)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from qpc.calibration import Samples
from qpc.errors import SettingsError
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.descent import POSITIONS_AT_ONCE, Course, Descent
from qpc.passes.feedbacks import Job
from qpc.passes.student import Student
from qpc.progress import Progress, silent


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    steps: of gradient descent once all weights are rounded. learning_rate: of scales and vectors, relative to them.
    rounds: in how many parts, from the first layers to the last, the weights are rounded; after each but the last, those that are left are
    tuned in `round_steps` steps, at `matrix_rate` relative to their root mean square.
    reads: how often a token is read. If the model sampled the text of the calibration it samples as much more as that takes: what is
    learned from few tokens, read again and again, does not hold on others.
    anywhere: on a CPU too, where it takes long.
    """

    steps: int = 400
    learning_rate: float = 2e-3
    rounds: int = 1
    round_steps: int = 30
    matrix_rate: float = 5e-4
    reads: float = 1.4
    anywhere: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "rounds", "round_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"tuning: {name}={getattr(self, name)} must be positive")
        for name in ("learning_rate", "matrix_rate", "reads"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"tuning: {name}={getattr(self, name)} must be positive")

    @staticmethod
    def parse(value: object) -> "Tuning | None":
        """What an option means: "auto" (if the model is on a GPU), "off" or None, a number of steps, or a `Tuning`.

        Raises `SettingsError` for anything else.
        """
        match value:
            case None | "off":
                return None
            case "auto":
                return Tuning()
            case Tuning():
                return value
            case bool():
                pass
            case int():
                return Tuning(steps=value, anywhere=True)
            case str() if value.isdecimal():
                return Tuning(steps=int(value), anywhere=True)
        raise SettingsError(f"tune={value!r} must be 'auto', 'off' or a number of steps")

    def declines(self, program: Program, samples: Samples) -> str | None:
        """Why a program is not tuned; None if nothing speaks against it."""
        if program.device.type == "cpu" and not self.anywhere:
            return "it takes long on a CPU; ask for a number of steps to have it nevertheless"
        return None if samples.held_out else "no samples are held out, so nothing would tell whether it helps"

    def more_tokens(self, samples: Samples) -> int:
        """How many tokens to sample beside those that there are to learn from."""
        steps = self.steps + (self.rounds - 1) * self.round_steps
        read = steps * self.last.passes * POSITIONS_AT_ONCE
        return max(0, round(read / self.reads) - sum(batch.numel() for batch in samples.batches))

    @property
    def last(self) -> Course:
        """Once all weights are rounded."""
        return Course(self.steps, self.learning_rate, self.matrix_rate)

    @property
    def between(self) -> Course:
        """Between two parts of the weights."""
        return Course(self.round_steps, self.learning_rate, self.matrix_rate, checks=1)


@dataclass
class Lessons:
    """What a student learns between the rounds in which its weights are rounded.

    weights: how many there are to round. told: what came of each lesson.
    """

    descent: Descent
    tuning: Tuning
    weights: int
    rounded: int = 0
    taught: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def student(self) -> Student:
        """Who learns."""
        return self.descent.student

    def count(self, jobs: Iterable[Job]) -> None:
        """Count weights as rounded."""
        self.rounded += sum(site_of(job.sites[0]).shape.weights for job in jobs)

    @property
    def due(self) -> bool:
        """Whether a round, but not the last, ends here."""
        return self.taught + 1 < self.tuning.rounds and self.rounded * self.tuning.rounds >= self.weights * (self.taught + 1)

    def teach(self) -> None:
        """Let the weights that are left make up for those that are rounded."""
        self.taught += 1
        found = self.descent.run(self.tuning.between, f"tune, part {self.taught} of {self.tuning.rounds}")
        share = self.rounded / self.weights
        text = f"loss on held-out samples with {share:.0%} of the weights rounded {found.before:.4g}, tuned {found.after:.4g}"
        self.told += found.told(text)


@dataclass(frozen=True)
class Tune(Pass):
    """Moves scales and vectors of a rounded program; codes stay. samples: those of the calibration. seed: of their order."""

    name: ClassVar[str] = "tune"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    tuning: Tuning
    samples: Samples
    seed: int = 0
    progress: Progress = silent

    def run(self, program: Program) -> PassResult:
        """Change packed weights and `program.tuned`, never for the worse on held-out samples."""
        subject = type(program.module).__name__
        reason = self.tuning.declines(program, self.samples)
        if reason is not None:
            return PassResult(remarks=(self.declined(subject, reason),))
        try:
            student = Student(program)
            found = Descent(student, self.samples, self.seed, self.progress).run(self.tuning.last)
        except RuntimeError as error:
            return PassResult(remarks=(self.declined(subject, f"not tuned: {str(error).splitlines()[0]}"),))
        text = f"loss on held-out samples {found.before:.4g} before, {found.after:.4g} after {found.steps} of {self.tuning.steps} steps"
        return PassResult(student.write(), tuple(self.declined(subject, each) for each in found.told(text)))
