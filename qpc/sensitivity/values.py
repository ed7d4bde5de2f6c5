"""Sensitivities as a value: the coefficients, how they were estimated, and how far from linear the loss was found to be."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch

from qpc.errors import ModelError
from qpc.ir.program import Program
from qpc.plain_files import parse_json

FORMAT = 2
"""Version of the JSON form of `Sensitivities`."""

TOLERANCE = 1.3
"""A loss per unit of noise that changes by more than this factor over the noise sizes checked is not linear."""


class Loss(StrEnum):
    """What an error is measured by.

    KL: nats per token between the outputs of a language model, averaged over all positions.
    RELATIVE_ERROR: squared error of any other output over its squared norm.
    """

    KL = "kl"
    RELATIVE_ERROR = "relative error"


class Method(StrEnum):
    """How sensitivities are estimated.

    RANDOM: by noise, on tokens drawn uniformly. SELF: by noise, on text that the model samples from itself.
    GIVEN: by noise, on given inputs. GRADIENT: from gradients, on the inputs of the calibration, or on sampled text if there is none.
    LAYERS: by noise and what it disturbs of what its layer leaves, where the whole model does not fit into memory.
    """

    RANDOM = "random"
    SELF = "self"
    GIVEN = "given"
    GRADIENT = "gradient"
    LAYERS = "layers"


@dataclass(frozen=True)
class Linearity:
    """How the loss per unit of noise changes with the size of the noise.

    smaller, larger: relative squared errors that were injected, with the same draw. growth: loss per unit at the larger over that at the
    smaller, by name of the site; 1 is linear. Only the linears with the largest coefficient per weight are checked.
    """

    smaller: float
    larger: float
    growth: Mapping[str, float]

    @property
    def broken(self) -> dict[str, float]:
        """The growth of the sites where it is outside of the tolerance."""
        return {name: value for name, value in self.growth.items() if not 1 / TOLERANCE <= value <= TOLERANCE}

    def __str__(self) -> str:
        """In a sentence."""
        total, broken = len(self.growth), self.broken
        text = f"{total - len(broken)} of {total} checked linears are linear from {self.smaller:g} to {self.larger:g}"
        if not broken:
            return text
        worst = max(broken, key=lambda name: abs(math.log(broken[name])))
        return f"{text}; farthest from it is {worst}, whose loss per unit of noise changes by a factor of {broken[worst]:.2f}"


LARGEST = 1e100
"""Sums of products of larger ones might overflow."""


@dataclass(frozen=True)
class Sensitivities:
    """Coefficients a_l, and how they were estimated.

    values: loss per unit of relative squared error, by name of the site; sites that share a weight share the value, and it counts once.
    noise: the relative squared error that was injected; 0 for gradients, which are its limit. tokens: number of positions (rows of the
    input) averaged over. linearity: None where it was not checked.
    """

    values: Mapping[str, float]
    loss: Loss
    noise: float
    seed: int
    tokens: int
    method: Method = Method.GIVEN
    linearity: Linearity | None = None

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if not 0 <= value <= LARGEST:
                raise ModelError(f"the sensitivity of {name} is {value:g}, it must lie between 0 and {LARGEST:.0e}")

    def to_json(self) -> str:
        """The JSON form, equal for equal values."""
        return json.dumps({"format": FORMAT, **asdict(self), "values": dict(self.values)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Sensitivities":
        """Inverse of `to_json`. Raises `ModelError` if the text is not that."""
        try:
            data = parse_json(text)
            if data.pop("format") != FORMAT:
                raise ModelError(f"sensitivities must have format {FORMAT}")
            values = _numbers(data.pop("values"))
            linearity = data.pop("linearity")
            if linearity is not None:
                linearity = Linearity(growth=_numbers(linearity.pop("growth")), **linearity)
            return Sensitivities(values, Loss(data.pop("loss")), method=Method(data.pop("method")), linearity=linearity, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"these are no sensitivities: {type(error).__name__}: {error}") from error


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    found = {str(name): float(value) for name, value in values.items()}
    bad = [name for name, value in found.items() if not (math.isfinite(value) and value >= 0)]
    if bad:
        raise ValueError(f"{bad[0]} must be a number from 0, got {found[bad[0]]}")
    return found


def check_finite(program: Program) -> None:
    """Raise `ModelError` that names the first parameter with a NaN or an infinity, of those that are in memory."""
    for name, value in program.module.named_parameters():
        there = value.numel() and not value.is_meta and value.is_floating_point()
        if there and not torch.stack(torch.aminmax(value.detach())).isfinite().all():
            bad = (~value.detach().isfinite()).nonzero()
            raise ModelError(f"{name} has {len(bad)} values that are not finite, the first at {bad[0].tolist()}; repair the model first")
