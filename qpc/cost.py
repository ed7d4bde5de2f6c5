"""What a quantizer costs on a linear: stored bytes, expected distortion, and time."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qpc.errors import QuantizerError
from qpc.ir.annotation import LinearShape
from qpc.quant.quantizer import Quantizer
from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Cost:
    """What is paid: memory, error and time.

    weight_bytes: everything stored. distortion: relative squared error of the weight, or a sum of such errors times sensitivities [nats].
    latency_ps: time to run it [picoseconds], launches and transforms included; 0 where nobody asks. Whole numbers, so that sums are exact.
    """

    weight_bytes: int
    distortion: float
    latency_ps: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.weight_bytes + other.weight_bytes, self.distortion + other.distortion, self.latency_ps + other.latency_ps)

    def weighted(self, sensitivity: float) -> "Cost":
        """The same bytes and time with the distortion times a sensitivity: nats of predicted KL."""
        return Cost(self.weight_bytes, sensitivity * self.distortion, self.latency_ps)


@dataclass(frozen=True)
class Weight:
    """A weight to store.

    sensitivity: loss per unit of the distortion of its quantizer. kept_bytes: its size as it is, or None if it may not stay so.
    rotated: its inputs are rotated already, so that it needs no signs.
    """

    shape: LinearShape
    sensitivity: float = 1.0
    kept_bytes: int | None = None
    rotated: bool = False

    def cost(self, quantizer: Quantizer | None) -> Cost:
        """Bytes and distortion of one way to store it; quantizer None leaves it as it is.

        The distortion counts the columns that each part really covers: a quarter of few columns cannot be met exactly.

        Raises `QuantizerError` if the quantizer does not support the shape, or the weight may not stay as it is.
        """
        if quantizer is None:
            if self.kept_bytes is None:
                raise QuantizerError(f"a weight of {self.shape} may not stay as it is here")
            return Cost(self.kept_bytes, 0.0)
        parts = quantizer.parts(self.shape.in_features)
        distortion = sum(part.distortion * columns for part, columns in parts) / sum(columns for _, columns in parts)
        stored = quantizer.weight_bytes(self.shape.out_features, self.shape.in_features)
        return Cost(stored - (Rotation.bytes_for(self.shape.in_features) if self.rotated else 0), distortion)


@dataclass(frozen=True)
class Choice:
    """One way to store one or more weights, and the sum of their costs, each weighted by its sensitivity."""

    quantizer: Quantizer | None
    cost: Cost


def possible(
    weights: Sequence[Weight], quantizers: Iterable[Quantizer], latency_ps: Callable[[Quantizer | None], int] | None = None
) -> tuple[Choice, ...]:
    """All the ways to store all of these weights alike: each quantizer that supports them all, and as they are if all may stay so.

    latency_ps: time to run them all with a quantizer [ps]; None counts no time.
    """
    found: list[Choice] = []
    for quantizer in (*quantizers, None):
        with suppress(QuantizerError):
            cost = sum((weight.cost(quantizer).weighted(weight.sensitivity) for weight in weights), start=Cost(0, 0.0))
            found.append(Choice(quantizer, cost if latency_ps is None else cost + Cost(0, 0.0, latency_ps(quantizer))))
    return tuple(found)


def choices(weights: Sequence[Weight], quantizers: Iterable[Quantizer]) -> tuple[Choice, ...]:
    """The undominated ways to store all of these weights alike, by rising bytes: each quantizer that supports them all, or as they are."""
    return undominated(possible(weights, quantizers))


def undominated(found: Iterable[Choice]) -> tuple[Choice, ...]:
    """Choices by rising bytes, none of which another equals or betters in bytes, distortion and time together; of equal ones the first."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda choice: (choice.cost.weight_bytes, choice.cost.distortion, choice.cost.latency_ps)):
        if not any(k.cost.distortion <= choice.cost.distortion and k.cost.latency_ps <= choice.cost.latency_ps for k in kept):
            kept.append(choice)
    return tuple(kept)
