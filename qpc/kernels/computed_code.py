"""The computed code of `qpc.quant.codebook` in Triton, shared by the multiplication and the encoder."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.quant.codebook import INCREMENTS, MULTIPLIERS

_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_INCREMENT_0, _INCREMENT_1 = tl.constexpr(INCREMENTS[0]), tl.constexpr(INCREMENTS[1])


@triton.jit
def window_in_arc(words, BIT: tl.constexpr, WINDOW_BITS: tl.constexpr):
    """The window that starts at a fixed bit of a tuple of uint32 words."""
    low: tl.constexpr = BIT // 32
    offset: tl.constexpr = BIT % 32
    if offset + WINDOW_BITS <= 32:
        shifted = words[low] >> offset
    else:
        shifted = (((words[low + 1].to(tl.uint64) << 32) | words[low].to(tl.uint64)) >> offset).to(tl.uint32)
    return shifted & ((1 << WINDOW_BITS) - 1)


@triton.jit
def window_from(low, high, offset, WINDOW_BITS: tl.constexpr):
    """The window that starts at bit `offset` (a tensor, 0 to 31) of the uint32 `low` and may reach into `high`."""
    pair = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (pair >> offset.to(tl.uint64)).to(tl.uint32) & ((1 << WINDOW_BITS) - 1)


@triton.jit
def decode_window(window):
    """The two integer weights of a uint32 window. Sums of bytes are formed two at a time, in 16-bit halves."""
    first = (window * _MULTIPLIER_0 + _INCREMENT_0).to(tl.uint32)
    second = (window * _MULTIPLIER_1 + _INCREMENT_1).to(tl.uint32)
    bytes_3_and_1 = ((first >> 8) & 0x00FF00FF) + ((second >> 8) & 0x00FF00FF)
    bytes_2_and_0 = (first & 0x00FF00FF) + (second & 0x00FF00FF)
    even = (bytes_3_and_1 >> 16).to(tl.int32) - (bytes_2_and_0 & 0xFFFF).to(tl.int32)
    odd = (bytes_2_and_0 >> 16).to(tl.int32) - (bytes_3_and_1 & 0xFFFF).to(tl.int32)
    return even, odd
