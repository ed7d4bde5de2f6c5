"""What a quantizer costs on a linear: stored bytes and expected distortion."""

from collections.abc import Iterable
from dataclasses import dataclass

from qpc.errors import QuantizerError
from qpc.ir.annotation import LinearShape
from qpc.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Cost:
    """What is paid: memory and error.

    weight_bytes: everything stored. distortion: relative squared error of the weight, or a sum of such errors times sensitivities [nats].
    """

    weight_bytes: int
    distortion: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.weight_bytes + other.weight_bytes, self.distortion + other.distortion)

    def weighted(self, sensitivity: float) -> "Cost":
        """The same bytes with the distortion times a sensitivity: nats of predicted KL."""
        return Cost(self.weight_bytes, sensitivity * self.distortion)


@dataclass(frozen=True)
class Choice:
    """One way to store a linear; quantizer None leaves it as it is."""

    quantizer: Quantizer | None
    cost: Cost


def quantized_cost(quantizer: Quantizer, shape: LinearShape) -> Cost:
    """Cost of a quantizer on a weight of this shape.

    The distortion counts the columns that each part really covers: a quarter of few columns cannot be met exactly. Raises `QuantizerError`
    if the quantizer does not support the shape.
    """
    parts = quantizer.parts(shape.in_features)
    columns = sum(width for _, width in parts)
    distortion = sum(part.distortion * width for part, width in parts) / columns
    return Cost(quantizer.weight_bytes(shape.out_features, shape.in_features), distortion)


def choices(shape: LinearShape, quantizers: Iterable[Quantizer], *, kept_bytes: int | None = None) -> tuple[Choice, ...]:
    """The table of a weight: its undominated choices by rising bytes.

    quantizers: those that do not support the shape are left out. kept_bytes: stored bytes of the weight as it is, if it may stay so.
    """
    found = [] if kept_bytes is None else [Choice(None, Cost(kept_bytes, 0.0))]
    for quantizer in quantizers:
        try:
            found.append(Choice(quantizer, quantized_cost(quantizer, shape)))
        except QuantizerError:
            continue
    return undominated(found)


def undominated(found: Iterable[Choice]) -> tuple[Choice, ...]:
    """Choices by rising bytes and strictly falling distortion; of equal ones the first is kept."""
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda choice: (choice.cost.weight_bytes, choice.cost.distortion)):
        if not kept or choice.cost.distortion < kept[-1].cost.distortion:
            kept.append(choice)
    return tuple(kept)
