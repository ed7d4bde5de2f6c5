"""The computed code of `qpc.quant.codebook` in Triton, shared by the multiplication and the encoder."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.quant.codebook import FACTOR_MASK, FACTOR_ONE, FOLD, HALF_MASK, SECOND_INCREMENT, SECOND_MULTIPLIER, long_tails, shifted_multiplier

_FOLD, _HALF_MASK = tl.constexpr(FOLD), tl.constexpr(HALF_MASK)
_SECOND_MULTIPLIER, _SECOND_INCREMENT = tl.constexpr(SECOND_MULTIPLIER), tl.constexpr(SECOND_INCREMENT)

_FACTOR_MASK, _FACTOR_ONE = tl.constexpr(FACTOR_MASK), tl.constexpr(FACTOR_ONE)

_shifted_multiplier = triton.constexpr_function(shifted_multiplier)
_long_tails = triton.constexpr_function(long_tails)


@triton.jit
def bits_in_arc(words, BIT: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits from a fixed bit of a tuple of uint32 words on; the bits above them are of no account."""
    low: tl.constexpr = BIT // 32
    offset: tl.constexpr = BIT % 32
    if offset + WIDTH <= 32:
        found = words[low] >> offset
    else:
        found = (((words[low + 1].to(tl.uint64) << 32) | words[low].to(tl.uint64)) >> offset).to(tl.uint32)
    return found


@triton.jit
def bits_from(low, high, offset):
    """The 32 bits that start at bit `offset` (a tensor, 0 to 31) of the uint32 `low` and reach into `high`."""
    pair = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (pair >> offset.to(tl.uint64)).to(tl.uint32)


@triton.jit
def decode_window(word, STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr):
    """The two code values of the window in the low bits of a uint32, float32; the bits above it are of no account."""
    multiplier: tl.constexpr = _shifted_multiplier(WINDOW_BITS)
    return decode_product((word * multiplier).to(tl.uint32), _long_tails(STEP_BITS))


@triton.jit
def decode_product(spread, LONG_TAILS: tl.constexpr):
    """The same from the product of the window and its multiplier, `shifted_multiplier` of `qpc.quant.codebook`."""
    first = ((spread.to(tl.int32, bitcast=True).to(tl.int64) * _FOLD) >> 32).to(tl.uint32)
    second = (first * _SECOND_MULTIPLIER + _SECOND_INCREMENT).to(tl.uint32)
    p, q = first & _HALF_MASK, second & _HALF_MASK
    p_0, p_1 = _lower(p), _upper(p)
    if LONG_TAILS:
        r = (second & _FACTOR_MASK) ^ _FACTOR_ONE
        p_0, p_1 = p_0 * _lower(r), p_1 * _upper(r)
    even, odd = p_0 + _lower(q), p_1 + _upper(q)
    return even.to(tl.float16).to(tl.float32), odd.to(tl.float16).to(tl.float32)


@triton.jit
def _lower(word):
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _upper(word):
    return (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
