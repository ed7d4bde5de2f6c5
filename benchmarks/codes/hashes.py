"""Integer hashes of a window: numpy int64 arrays hold uint32 values."""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]
"""Any shape; values in [0, 2^32)."""

MASK = 0xFFFFFFFF


def windows(window_bits: int) -> Words:
    """All windows of this length: int64 [2^window_bits]."""
    return np.arange(1 << window_bits, dtype=np.int64)


def multiply_add(words: Words, factor: int, addend: int = 0) -> Words:
    """`words * factor + addend` modulo 2^32 (one IMAD)."""
    low, high = factor & 0xFFFF, factor >> 16
    return (words * low + ((words * high & 0xFFFF) << 16) + addend) & MASK


def fused_multiply_add(words: Words, factor: float, addend: float) -> Words:
    """Bits of `f * factor + addend`, rounded once to float32, where f is the float32 with the bits `words` (one FFMA).

    The factor and the addend are float32 as well. float64 holds the product exactly, and the sum where it needs at most 53 bits: with
    f from 0.5 and the factor from 1 on, a multiple of 2^-47.
    """
    f = words.astype(np.uint32).view(np.float32).astype(np.float64)
    return (f * factor + addend).astype(np.float32).view(np.uint32).astype(np.int64)


def single_bits(value: float) -> int:
    """Bits of a float32."""
    return int(np.float32(value).view(np.uint32))


def multiply_high(words: Words, factor: int) -> Words:
    """High 32 bits of the signed product with `factor`, which is in [0, 2^31) (one IMAD.HI)."""
    signed = (words ^ 0x80000000) - 0x80000000
    return (signed * factor >> 32) & MASK


def multiply_wide(words: Words, factor: int) -> tuple[Words, Words]:
    """Low and high 32 bits of the unsigned product with `factor`, which is in [0, 2^32) (one IMAD.WIDE)."""
    product = words.astype(np.uint64) * np.uint64(factor)
    return (product & np.uint64(MASK)).astype(np.int64), (product >> np.uint64(32)).astype(np.int64)


def permute(words: Words, selector: int) -> Words:
    """Byte i of the result is the byte that digit i of `selector`, 0 to 3, names (one PRMT)."""
    return sum((byte(words, selector >> (4 * index) & 0xF) << (8 * index) for index in range(4)), start=np.zeros_like(words))


def halves(words: Words) -> NDArray[np.float16]:
    """Bit patterns of two IEEE halves, the low one first: float16 [..., 2]."""
    pair = np.stack([words & 0xFFFF, words >> 16], axis=-1)
    return pair.astype(np.uint16).view(np.float16)


def byte(words: Words, index: int) -> Words:
    """Byte `index` of each word, 0 the least significant."""
    return (words >> (8 * index)) & 0xFF
