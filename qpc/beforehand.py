"""What a compile finds out about a model before it allocates, found out by itself, so that it can be given to any compile later.

A model that does not fit into memory can neither sample text nor be differentiated; another machine, or a smaller model of its family, can.
"""

from collections.abc import Iterable

from torch import nn

from qpc.calibration import Calibration, SelfSampled, collect, token_file
from qpc.capture import capture
from qpc.compiler import irreplaceable
from qpc.ir.program import Program, Remark
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from qpc.progress import Progress, silent
from qpc.sensitivity import Sensitivities, check_finite
from qpc.sensitivity_cache import Gradients, Wanted, estimated
from qpc.token_file import TokenFile


def sampled_text(
    model: nn.Module, calibration: SelfSampled, *, seed: int = 0, progress: Progress = silent
) -> tuple[TokenFile, tuple[Remark, ...]]:
    """The text that a compile with this calibration and seed samples, and what is to be said of it.

    Raises `ModelError` if the model cannot sample text, and `CaptureError` if it cannot be captured.
    """
    return token_file(calibration, _grouped(model, ()), seed, progress)


def sensitivities(
    model: nn.Module,
    wanted: Wanted,
    calibration: Calibration | None,
    *,
    exclude: Iterable[str] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Sensitivities, tuple[Remark, ...]]:
    """What a compile with these options estimates, and what is to be said of it.

    Raises `ModelError` if the model has no linears, or a parameter that is not finite, and `CaptureError` if it cannot be captured.
    """
    program = _grouped(model, exclude)
    samples, remarks = collect(calibration, program, seed, progress)
    gradients = None if samples is None else Gradients(program, samples, seed, progress)
    found, more = estimated(program, wanted, seed, gradients, progress)
    return found, remarks + more


def _grouped(model: nn.Module, exclude: Iterable[str]) -> Program:
    program = capture(model, exclude=exclude)
    program.excluded.update(irreplaceable(model))
    Pipeline((Canonicalize(), Fusion())).run(program)
    check_finite(program)
    return program
