"""Trellis-coded quantization on the bitshift trellis, with a computed code and tail-biting.

Each block is one ring: a circular string of `512 * step_bits` bits. Step j, which is pair j of the block in the order of `layout`, is
decoded from the `window_bits` bits that start at bit `j * step_bits`, wrapping at the end of the string. The bits of a string lie in 32-bit
words as `bitstring` says; the first bit of a window is its least significant.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.bitstring import ring_windows
from qpc.quant.codebook import code_deviation, decode_windows, hash_words
from qpc.quant.distortion import trellis_distortion
from qpc.quant.layout import BLOCK_WEIGHTS, from_blocks, to_blocks
from qpc.quant.quantizer import RingEncoder, UniformQuantizer
from qpc.quant.viterbi import encode_rings

STEPS = BLOCK_WEIGHTS // 2
"""Pairs of weights in one ring."""

MIN_STEP_BITS, MAX_STEP_BITS = 2, 12
MIN_SUFFIX_BITS, MAX_SUFFIX_BITS = 6, 15
MAX_WINDOW_BITS = 24

SPREAD = {1: (1.13, 1.03, 0.975), 2: (1.13, 1.04, 1.005, 0.966, 0.945, 0.935, 0.928, 0.92, 0.915, 0.91, 0.905)}
"""Standard deviation of the weights over that of the code, by its words and the step bits from 2 on: measured to give the least distortion.

The higher the rate, the more the tails count, which sums of few bytes lack. The optimum is flat: 0.02 beside it costs less than 0.01 dB up
to 8 step bits. It is that of windows 13 bits longer than a step, but 15 for two words up to 4 step bits; with 10 it is up to 0.03 less.
"""


@dataclass(frozen=True)
class TrellisQuantizer(UniformQuantizer):
    """One rate of the trellis code.

    step_bits: bits per step of two weights, 2 to 12 (1 to 6 bits per weight).
    window_bits: 6 to 15 more than that, at most 24. Each more is better, and takes twice as long to encode.
    """

    family: ClassVar[str] = "trellis"
    step_bits: int
    window_bits: int

    def __post_init__(self) -> None:
        if not MIN_STEP_BITS <= self.step_bits <= MAX_STEP_BITS:
            raise QuantizerError(f"step_bits={self.step_bits} must be from {MIN_STEP_BITS} to {MAX_STEP_BITS}")
        least, most = self.step_bits + MIN_SUFFIX_BITS, min(self.step_bits + MAX_SUFFIX_BITS, MAX_WINDOW_BITS)
        if not least <= self.window_bits <= most:
            raise QuantizerError(f"window_bits={self.window_bits} must be from {least} to {most} for step_bits={self.step_bits}")

    def __str__(self) -> str:
        return f"{self.family} {self.rate} L{self.window_bits}"

    @property
    def rate(self) -> Fraction:
        return Fraction(self.step_bits, 2)

    @property
    def distortion(self) -> float:
        return trellis_distortion(self.step_bits, self.window_bits)

    @property
    def block_words(self) -> int:
        return STEPS * self.step_bits // 32

    @property
    def unit(self) -> float:
        """What a code value is multiplied by, for weights of unit variance."""
        spread = SPREAD[hash_words(self.step_bits, self.window_bits)][self.step_bits - MIN_STEP_BITS]
        return 1 / (code_deviation(self.step_bits, self.window_bits) * spread)

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        blocks = to_blocks(unit)
        rings = blocks.reshape(-1, STEPS, 2) / self.unit
        words = (encoder or encode_rings)(rings, self.step_bits, self.window_bits)
        return words.reshape(*blocks.shape[:2], self.block_words)

    def decode(self, codes: Tensor) -> Tensor:
        values = decode_windows(ring_windows(codes, self.step_bits, self.window_bits), self.step_bits, self.window_bits) * self.unit
        return from_blocks(values.flatten(-2))
