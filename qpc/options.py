"""The options of a compilation, for whichever door it comes through, and what their values may be written as."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from qpc.budget import Budget
from qpc.calibration import Calibration, SelfSampled
from qpc.calibration import parse as parse_calibration
from qpc.cluster import on_ray
from qpc.errors import SettingsError
from qpc.latency import LatencyModel, latency_of
from qpc.passes.allocate import Allocate
from qpc.passes.timed_items import Timing
from qpc.passes.tune import Tuning
from qpc.quant.palette import Effort, default_palette
from qpc.sensitivity import Method, Sensitivities
from qpc.sensitivity_cache import Wanted
from qpc.sensitivity_cache import parse as parse_sensitivity
from qpc.spread import HERE, Spread


@dataclass(frozen=True)
class Options:
    """What decides the result of a compilation, besides the model itself; and where it is computed.

    effort: how long the trellis windows are; better and slower to encode from FAST to MAX.
    exclude: patterns (as in a shell) of module names that stay as they are.
    seed: of the signs, the noise and the random tokens.
    same_quantizer_in_group: linears that read the same value get the same quantizer, as serving engines need it.
    rotation_block: most inputs that a rotation mixes; for tensor parallelism the width of the narrowest shard, or a power of two that
        divides it. None is no limit.
    fold: multiply gains and rotations into the weights around them where that changes no output, so that fewer activations are rotated at
        run time. Values between layers are then rotated ones.
    embeddings: bits per weight of embeddings and output heads, one of the rates of the palette; None leaves them as they are.
    calibration: the inputs on which the second moments for error feedback are taken; None: no feedback.
    weigh_positions: in these moments, by what gradients say of their importance.
    row_feedback: carry errors between the rows of a weight too, weighed by gradients; None: if the model is on a GPU.
    sensitivity: how sensitivities are estimated.
    tune: how scales and the vectors of norms and biases are tuned on the inputs of the calibration, after rounding; None: not at all.
    latency: the times of a GPU, with which linears are fused and times are predicted; None: no times. batch: of the times that are
        predicted where the budget names none.
    spread: where weights are packed and moments factored, which decides nothing but how long that takes.

    Raises `SettingsError` or `QuantizerError` for a value that cannot be met.
    """

    budget: Budget
    effort: Effort = Effort.DEFAULT
    exclude: tuple[str, ...] = ()
    seed: int = 0
    same_quantizer_in_group: bool = False
    rotation_block: int | None = None
    fold: bool = False
    embeddings: Fraction | None = None
    calibration: Calibration | None = field(default_factory=SelfSampled)
    weigh_positions: bool = True
    row_feedback: bool | None = None
    sensitivity: Wanted = field(default_factory=Wanted)
    tune: Tuning | None = None
    latency: LatencyModel | None = None
    batch: int = 1
    spread: Spread = HERE

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise SettingsError(f"batch={self.batch} must be positive")
        if self.embeddings is not None:
            default_palette(self.effort).at(self.embeddings)
        if self.rotation_block is not None and self.rotation_block < 1:
            raise SettingsError(f"rotation_block={self.rotation_block} must be positive, or None for no limit")

    @staticmethod
    def of(
        budget: Budget | Fraction | float | str,
        *,
        effort: Effort | str = Effort.DEFAULT,
        exclude: Iterable[str] = (),
        seed: int = 0,
        same_quantizer_in_group: bool = False,
        rotation_block: int | None = None,
        fold: bool = False,
        embeddings: Fraction | float | str | None = None,
        calibration: object = "self",
        tokenizer: Any | None = None,
        row_feedback: object = "auto",
        sensitivity: object = Method.GRADIENT,
        tune: object = "auto",
        gpu: LatencyModel | Path | str | None = None,
        batch: int = 1,
        ray: str | None = None,
    ) -> "Options":
        """From what the doors take, as `qpc.compile` describes it. Raises `QpcError` for a value that means nothing."""
        limits = Budget.of(budget)
        return Options(
            budget=limits,
            effort=Effort.parse(effort),
            exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
            seed=seed,
            same_quantizer_in_group=same_quantizer_in_group,
            rotation_block=rotation_block,
            fold=fold,
            embeddings=parse_rate(embeddings),
            calibration=parse_calibration(calibration, tokenizer=tokenizer),
            row_feedback=parse_switch("row_feedback", row_feedback),
            sensitivity=parse_sensitivity(sensitivity, tokenizer=tokenizer),
            tune=Tuning.parse(tune),
            latency=latency_for(gpu, limits),
            batch=batch,
            spread=on_ray.parse(ray),
        )

    def on(self, device: torch.device) -> "Options":
        """The same for weights that are packed on such a device. Raises `SettingsError` if there is none where they are to be packed."""
        return replace(self, spread=self.spread.on(device))

    def couples_rows(self, device: torch.device) -> bool:
        """Whether errors are carried between rows, for a model on a device."""
        wanted = device.type != "cpu" if self.row_feedback is None else self.row_feedback
        return wanted and self.weigh_positions

    def allocate(self, budget: Budget, sensitivities: Sensitivities | None) -> Allocate:
        """The pass that allocates with these options, within any budget; without sensitivities all linears matter alike."""
        return Allocate(
            budget, default_palette(self.effort), sensitivities, self.same_quantizer_in_group, timing=self.timing_within(budget)
        )

    def timing_within(self, budget: Budget) -> Timing | None:
        """How time is counted, at the batch of a budget that limits it."""
        if self.latency is None:
            return None
        return Timing(self.latency, self.batch if budget.latency_ps is None else budget.batch)


def latency_for(gpu: LatencyModel | Path | str | None, *budgets: Budget) -> LatencyModel | None:
    """The latency model of a GPU that is given, else of this machine's if a budget limits a time. Raises `ProfileError`."""
    if gpu is None and all(budget.latency_ps is None for budget in budgets):
        return None
    return latency_of(gpu)


def parse_switch(name: str, value: object) -> bool | None:
    """What "on", "off" or "auto" (None) means. Raises `SettingsError` for anything else."""
    match value:
        case "auto" | None:
            return None
        case bool():
            return value
        case "on" | "off":
            return value == "on"
    raise SettingsError(f"{name}={value!r} must be 'auto', 'on' or 'off'")


def parse_rate(value: Fraction | float | str | None) -> Fraction | None:
    """Bits per weight, exactly as written in decimals. Raises `SettingsError` for anything that is no number."""
    if value is None or isinstance(value, Fraction):
        return value
    try:
        return Fraction(str(value))
    except ValueError as error:
        raise SettingsError(f"embeddings={value!r} must be a number of bits per weight, such as 6 or 4.5") from error
