"""Trellis-coded quantization on the bitshift trellis, with a computed code and tail-biting.

Each tile of 16 x 16 weights is one ring: a circular string of `128 * step_bits` bits. Step j (pair j, row-major: row j // 8, columns
2 (j % 8) and the next) is decoded from the `window_bits` bits that start at bit `j * step_bits`, wrapping at the end of the string.
Bit i of the string is bit `i % 32` (least significant first) of word `i // 32`; the first bit of a window is its least significant.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.codebook import CODE_DEVIATION, decode_windows
from qpc.quant.distortion import trellis_distortion
from qpc.quant.quantizer import TILE, RingEncoder, UniformQuantizer
from qpc.quant.viterbi import encode_rings

STEPS = TILE * TILE // 2
"""Pairs of weights in one ring."""

MIN_STEP_BITS, MAX_STEP_BITS = 3, 12
MIN_WINDOW_BITS, MAX_WINDOW_BITS = 12, 20


@dataclass(frozen=True)
class TrellisQuantizer(UniformQuantizer):
    """One rate of the trellis code.

    step_bits: bits per step of two weights, 3 to 12 (1.5 to 6 bits per weight).
    window_bits: 12 to 20; longer is better and slower to encode.
    """

    family: ClassVar[str] = "trellis"
    step_bits: int
    window_bits: int = 16

    def __post_init__(self) -> None:
        if not MIN_STEP_BITS <= self.step_bits <= MAX_STEP_BITS:
            raise QuantizerError(f"step_bits={self.step_bits} must be from {MIN_STEP_BITS} to {MAX_STEP_BITS}")
        if not MIN_WINDOW_BITS <= self.window_bits <= MAX_WINDOW_BITS:
            raise QuantizerError(f"window_bits={self.window_bits} must be from {MIN_WINDOW_BITS} to {MAX_WINDOW_BITS}")

    @property
    def rate(self) -> Fraction:
        return Fraction(self.step_bits, 2)

    @property
    def distortion(self) -> float:
        return trellis_distortion(self.step_bits, self.window_bits)

    @property
    def tile_words(self) -> int:
        return STEPS * self.step_bits // 32

    @property
    def unit(self) -> float:
        """Size of one integer step of the code, for weights of unit variance.

        A reproduction at distortion D has variance 1 - D, so the code shrinks by sqrt(1 - 2^(-2 rate)).
        """
        return math.sqrt(1 - 2.0 ** (-self.step_bits)) / CODE_DEVIATION

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        rows, columns = unit.shape[0] // TILE, unit.shape[1] // TILE
        rings = unit.reshape(rows, TILE, columns, TILE).transpose(1, 2).reshape(rows * columns, STEPS, 2)
        words = (encoder or encode_rings)(rings / self.unit, self.step_bits, self.window_bits)
        return words.reshape(rows, columns, self.tile_words)

    def decode(self, codes: Tensor) -> Tensor:
        rows, columns, _ = codes.shape
        values = decode_windows(ring_windows(codes, self.step_bits, self.window_bits)).float() * self.unit
        return values.reshape(rows, columns, TILE, TILE).transpose(1, 2).reshape(rows * TILE, columns * TILE)


def ring_windows(words: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Every window of each ring: int32 [..., words] -> int64 [..., steps]."""
    count = words.shape[-1]
    bit = torch.arange(count * 32 // step_bits, device=words.device) * step_bits
    word, offset = bit // 32, bit % 32
    wide = words.long() & 0xFFFFFFFF
    pair = wide[..., word] | (wide[..., (word + 1) % count] << 32)
    return (pair >> offset) & ((1 << window_bits) - 1)
