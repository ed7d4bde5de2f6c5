"""A quantizer with a cost and no codes: what the allocation needs, and nothing else."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from qpc.quant.quantizer import RingEncoder, UniformQuantizer


@dataclass(frozen=True)
class ToyQuantizer(UniformQuantizer):
    """Stores `bits` per weight at the distortion bound, times `waste`."""

    family: ClassVar[str] = "toy"
    bits: int
    waste: float = 1.0

    @property
    def rate(self) -> Fraction:
        """Bits per weight."""
        return Fraction(self.bits)

    @property
    def distortion(self) -> float:
        """Expected relative squared error."""
        return float(self.waste * 2.0 ** (-2 * self.bits))

    @property
    def block_words(self) -> int:
        """32-bit words of a block."""
        return 32 * self.bits

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        """Never called: an allocation codes nothing."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Never called: an allocation codes nothing."""
        raise NotImplementedError
