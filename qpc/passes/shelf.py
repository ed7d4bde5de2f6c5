"""Where packed weights go that need not stay in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qpc.ir.annotation import LinearShape
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Facts:
    """What is known of a weight once it is packed; fields as those of `Annotation`."""

    distortion: float
    weight_bytes: int
    kurtosis: tuple[float, float]
    remaining: float | None = None


class Shelf(Protocol):
    """Takes each packed weight as soon as it is made; `hollow` stands for it from then on. It may know some from before."""

    def find(self, weight: str) -> Facts | None:
        """The facts of a weight, by name of its parameter, that need not be packed again."""

    def put(self, weight: str, sites: Sequence[str], packed: PackedWeight, facts: Facts) -> None:
        """Take a weight, which all these sites apply. Raises `QpcError` if it cannot be kept."""


def hollow(quantizer: Quantizer, shape: LinearShape, rotation: Rotation | None) -> PackedWeight:
    """A packed weight whose codes and scales are on the meta device, while its signs are there."""
    block = 0 if rotation is None else rotation.block
    return replace(QuantizedLinear(shape.out_features, shape.in_features, quantizer, block).packed, rotation=rotation)
