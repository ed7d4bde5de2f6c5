"""Whether `qpc compile` reads a model weight by weight, and how it then does."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qpc
from qpc.budget import Budget
from qpc.cli.inputs import pick_device
from qpc.errors import SettingsError, UsageError
from qpc.report import Report
from qpc.spread import HERE
from qpc.terminal import ProgressBars, silent_stdout

if TYPE_CHECKING:
    import torch

    from qpc.options import Options
    from qpc.sensitivity import Sensitivities

MEMORY_SHARE = 0.8
"""A model whose files have more bytes than this share of the memory is not loaded as a whole."""


def streamed(
    model: Path,
    output: Path,
    budget: Budget,
    *,
    wanted: bool | None,
    calibration: str,
    tokens: int | None,
    start: str | None,
    sensitivities: "Sensitivities | None",
    overwrite: bool,
    device: str | None,
    options: dict[str, Any],
) -> Report | None:
    """Compile MODEL weight by weight, if that is wanted, or None is and it has to be; returns None if it is to be compiled as a whole.

    Raises `QpcError` for options that need all of it in memory.
    """
    if wanted is False or (wanted is None and not oversized(model)):
        return None
    from qpc.calibration import SelfSampled
    from qpc.calibration import parse as parse_calibration
    from qpc.integrations.streamed import Stream
    from qpc.integrations.transformers import load_tokenizer
    from qpc.options import Options

    if qpc.is_checkpoint(model):
        raise UsageError(f"{model} is a compiled model already; give the original")
    with ProgressBars() as progress, silent_stdout():
        tokenizer = None if calibration in ("none", "self") else load_tokenizer(model)
        data = SelfSampled() if calibration == "self" else parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
        parsed = Options.of(budget, calibration=data, **options)
        try:
            plan = Stream.of(model, parsed, sensitivities, packing_device(device, parsed))
        except SettingsError as error:
            if wanted is None:
                raise SettingsError(
                    f"{model} has more weights than this machine has memory for (--no-stream tries anyway); {error}"
                ) from error
            raise
        return plan.carry_out(output, overwrite=overwrite, progress=progress)


def packing_device(name: str | None, options: "Options") -> "torch.device":
    """The device on which weights are packed, here or elsewhere. Raises `UsageError` if there can be none of this name."""
    import torch

    if options.spread is HERE:
        return torch.device(pick_device(name))
    try:
        return options.spread.usual() if name is None else torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def oversized(model: Path) -> bool:
    """Whether a directory of safetensors is larger than the memory of this machine, or of this container, allows."""
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model.is_dir() else 0
    return stored > MEMORY_SHARE * memory_bytes()


def memory_bytes() -> int:
    """Memory that this process may use."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or one without a limit
        return physical
