"""The computed code: two weights from one window of the bit string, as sums of the signed bytes of a hash of it.

The window is written into the mantissa of a float32 f from 0.5 on, and g = f C + D, rounded once. D lies near -C times the middle of all f,
so that g is small and of either sign: the bits of g are the middle bits of the product, which depend on the whole window, and so do sign
and exponent. From g, read as a 32-bit integer, multiply-adds modulo 2^32 make two words, three at high rates. The first weight of the pair
is the sum of the signed bytes 0 and 2 of all words, the second that of bytes 1 and 3: an integer, nearly Gaussian, four bytes reaching to
3.5 deviations and six to 4.2. (A computed code, and its sums of bytes, are QTIP's ideas, arXiv 2406.11235, section 3.1.)

What a tensor core needs is the words themselves: its product of bytes adds the bytes up, and no mask and no conversion stands between the
multiply-add and the product. `benchmarks/codes/README.md` tells how this code was chosen.
"""

import torch
from torch import Tensor

START = 0x3F000000
"""The bits of 0.5, into whose mantissa the window is written. The highest bit of a window of 24 bits doubles f instead."""
FACTOR = 0xB504F3 / 2**23
"""C: the square root of 2 in float32."""

MULTIPLIERS = (0xAB8F3EFB, 0x65DA3213, 0xBD5351A3)
"""What g is multiplied by, for each word; modulo 2^32."""
INCREMENTS = (0x3AD5F537, 0x0E2F3119, 0x8468433F)
"""What is added to the product, for each word."""

THREE_WORDS_FROM = 9
"""Step bits from which three words are added: at high rates the tails count, and a sum of six bytes reaches farther."""

DEVIATION = {2: 147.8, 3: 181.0}
"""Standard deviation of a code value, by the number of words; that of independent uniform bytes."""


def hash_words(step_bits: int) -> int:
    """How many words the bytes are taken from: 2 or 3."""
    return 3 if step_bits >= THREE_WORDS_FROM else 2


def code_deviation(step_bits: int) -> float:
    """Standard deviation of a code value."""
    return DEVIATION[hash_words(step_bits)]


def addend(window_bits: int) -> float:
    """D for windows of this length, exactly a float32: -C times the middle of all f."""
    exact = -FACTOR * (0.5 + 2.0 ** (window_bits - 25))
    unit = 2.0**-23 if exact < -1 else 2.0**-24
    return round(exact / unit) * unit


def decode_windows(windows: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """The code values of each window: int64 [...] with values in [0, 2^window_bits) -> float32 [..., 2], integers of at most 768.

    The same on every device: float64 holds f C + D exactly, a multiple of 2^-47 below 4, so that the one rounding to float32 is that of a
    fused multiply-add.
    """
    f = (windows | START).int().view(torch.float32)
    g = (f.double() * FACTOR + addend(window_bits)).float().view(torch.int32).long() & 0xFFFFFFFF
    even, odd = torch.zeros_like(g), torch.zeros_like(g)
    for multiplier, increment in zip(MULTIPLIERS[: hash_words(step_bits)], INCREMENTS, strict=False):
        word = (_multiplied(g, multiplier) + increment) & 0xFFFFFFFF
        even += _signed_byte(word, 0) + _signed_byte(word, 2)
        odd += _signed_byte(word, 1) + _signed_byte(word, 3)
    return torch.stack([even, odd], dim=-1).float()


def codebook(step_bits: int, window_bits: int) -> Tensor:
    """All code points of windows of this length: float32 [2^window_bits, 2]."""
    return decode_windows(torch.arange(1 << window_bits, dtype=torch.int64), step_bits, window_bits)


def _multiplied(x: Tensor, factor: int) -> Tensor:
    """`x * factor` modulo 2^32 of numbers below 2^32, without overflow of int64."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _signed_byte(words: Tensor, index: int) -> Tensor:
    """A byte of 32-bit words, counted from the lowest, as a number from -128 to 127."""
    return ((words >> 8 * index & 0xFF) ^ 0x80) - 0x80
