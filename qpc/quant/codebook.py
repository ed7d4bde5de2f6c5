"""The computed code: two weights from one window of the bit string, by integer arithmetic and one addition of halves.

The window is hashed to two 32-bit words h and i. Their 16-bit halves p and q, read as float16 with a sign, two bits of exponent and the
mantissa, are bell-shaped variables. Up to 3 bits per weight each weight is p + q, which is nearly Gaussian; above, where tails count
more, it is p r + q with r between 1 and 2 from the low bits of i. (A computed code, and reading masked hashes as halves, are QTIP's ideas,
arXiv 2406.11235, section 3.1.) Exponent fields are 0 to 3, so that subnormals fill the middle; p r + q is exact in float32, and either form
is rounded to float16 once, so that values are the same on every device.

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

FACTOR_MASK, FACTOR_ONE = 0x03FC03FC, 0x3C003C00
"""The mantissa bits of r in either half, and 1.0 in both, which is xored to them."""

LONG_TAILS_FROM = 7
"""Step bits from which weights are p r + q."""


def long_tails(step_bits: int) -> bool:
    """Whether weights of this many bits per step are p r + q, not p + q."""
    return step_bits >= LONG_TAILS_FROM


def code_deviation(step_bits: int) -> float:
    """Standard deviation of a code value."""
    return (6.38 if long_tails(step_bits) else 4.955) * 2.0**-14


def decode_windows(windows: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """The code values of each window: int64 [...] with values in [0, 2^window_bits) -> float32 [..., 2], each exactly a float16."""
    spread = _multiplied(windows, shifted_multiplier(window_bits))
    first = (((spread ^ 0x80000000) - 0x80000000) * FOLD >> 32) & 0xFFFFFFFF
    second = (_multiplied(first, SECOND_MULTIPLIER) + SECOND_INCREMENT) & 0xFFFFFFFF
    p, q = _halves(first & HALF_MASK), _halves(second & HALF_MASK)
    if long_tails(step_bits):
        p = p * _halves((second & FACTOR_MASK) ^ FACTOR_ONE)
    return (p + q).half().float()


def shifted_multiplier(window_bits: int) -> int:
    """What a window is multiplied by, modulo 2^32."""
    return (MULTIPLIER << (32 - window_bits)) & 0xFFFFFFFF


def codebook(step_bits: int, window_bits: int) -> Tensor:
    """All code points of windows of this length: float32 [2^window_bits, 2]."""
    return decode_windows(torch.arange(1 << window_bits, dtype=torch.int64), step_bits, window_bits)


def _multiplied(x: Tensor, factor: int) -> Tensor:
    """`x * factor` modulo 2^32 of numbers below 2^32, without overflow of int64."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _halves(words: Tensor) -> Tensor:
    """The lower and the upper half of 32-bit words, read as float16: float32 [..., 2]."""
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16).float()
