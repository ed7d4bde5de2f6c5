"""The computed code: two weights from one window of the bit string, by integer arithmetic and one addition of halves.

The window is hashed to two 32-bit words; of each, both 16-bit halves are read as float16 with a sign, two bits of exponent and the mantissa,
which is a bell-shaped variable; each weight is the sum of two of them, which is nearly Gaussian. (A computed code, and reading masked hashes
as halves, are QTIP's ideas, arXiv 2406.11235, section 3.1.) The halves have exponent fields 0 to 3, so that subnormals fill the middle: every
value is a multiple of 2^-24 below 2^-10, and the sum, rounded once, is the same on every device.

The first multiplier is shifted so that a product modulo 2^32 forgets all bits above the window: a kernel need not mask them.
`benchmarks/codes/README.md` tells how this code was chosen.
"""

import torch
from torch import Tensor

MULTIPLIER = 0xA4C525DD
"""Of the window, shifted left by 32 - window_bits."""
FOLD = 0x5E4E60E7
"""Of that product as a signed number; the upper 32 bits of the result are the first hash."""
SECOND_MULTIPLIER, SECOND_INCREMENT = 0x20A394E3, 0xAB4C9999
"""From the first hash to the second."""
HALF_MASK = 0x8FFF8FFF
"""Sign, two bits of exponent and mantissa of either half."""

CODE_DEVIATION = (2 * 148 / 12) ** 0.5 * 2.0**-14
"""Standard deviation of a code value over independent uniform bits."""


def decode_windows(windows: Tensor, window_bits: int) -> Tensor:
    """The code values of each window: int64 [...] with values in [0, 2^window_bits) -> float32 [..., 2], each exactly a float16."""
    spread = _multiplied(windows, shifted_multiplier(window_bits))
    first = (((spread ^ 0x80000000) - 0x80000000) * FOLD >> 32) & 0xFFFFFFFF
    second = (_multiplied(first, SECOND_MULTIPLIER) + SECOND_INCREMENT) & 0xFFFFFFFF
    return (_halves(first) + _halves(second)).float()


def shifted_multiplier(window_bits: int) -> int:
    """What a window is multiplied by, modulo 2^32."""
    return (MULTIPLIER << (32 - window_bits)) & 0xFFFFFFFF


def codebook(window_bits: int) -> Tensor:
    """All code points of windows of this length: float32 [2^window_bits, 2]."""
    return decode_windows(torch.arange(1 << window_bits, dtype=torch.int64), window_bits)


def _multiplied(x: Tensor, factor: int) -> Tensor:
    """`x * factor` modulo 2^32 of numbers below 2^32, without overflow of int64."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _halves(words: Tensor) -> Tensor:
    """The lower and the upper half of masked 32-bit words, as float16 [..., 2]."""
    masked = words & HALF_MASK
    bits = torch.stack([masked & 0xFFFF, masked >> 16], dim=-1)
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16)
