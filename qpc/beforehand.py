"""What a compile finds out about a model before it allocates, found out by itself, so that it can be given to any compile later.

A model that does not fit into memory can neither sample text nor be differentiated; another machine, or a smaller model of its family, can.
"""

from collections.abc import Iterable

from torch import nn

from qpc.budget import Budget
from qpc.calibration import Calibration, SelfSampled, collect, token_file
from qpc.compiler import captured, group
from qpc.ir.program import Program, Remark
from qpc.options import Options
from qpc.progress import Progress, silent
from qpc.sensitivity import Sensitivities
from qpc.sensitivity_cache import Gradients, Wanted, estimated
from qpc.token_file import TokenFile


def sampled_text(
    model: nn.Module, calibration: SelfSampled, *, seed: int = 0, progress: Progress = silent
) -> tuple[TokenFile, tuple[Remark, ...]]:
    """The text that a compile with this calibration and seed samples, and what is to be said of it.

    Raises `ModelError` if the model cannot sample text, or has no linears, and `CaptureError` if it cannot be captured.
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
    """At GROUPED, as every compile has it, whatever its budget."""
    options = Options(Budget.of(4), exclude=tuple(exclude))
    program = captured(model, options)
    group(program, options)
    return program
