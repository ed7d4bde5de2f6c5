"""The computed code of `qpc.quant.codebook` in Triton, shared by the multiplication and the encoder."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.quant.codebook import FACTOR, INCREMENTS, MULTIPLIERS, START, addend, hash_words

_START, _FACTOR = tl.constexpr(START), tl.constexpr(FACTOR)
_MULTIPLIERS, _INCREMENTS = tl.constexpr(MULTIPLIERS), tl.constexpr(INCREMENTS)

_addend, _hash_words = triton.constexpr_function(addend), triton.constexpr_function(hash_words)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, which rounds twice in a fused multiply-add."""


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
    return hash_window(word & ((1 << WINDOW_BITS) - 1), _addend(WINDOW_BITS), _hash_words(STEP_BITS))


@triton.jit
def hash_window(window, addend, WORDS: tl.constexpr):
    """The same of a window with nothing above it, from `addend` and `hash_words` of `qpc.quant.codebook`."""
    f = (window | _START).to(tl.float32, bitcast=True)
    # float64 is exact here
    g = (f.to(tl.float64) * _FACTOR + addend).to(tl.float32) if _INTERPRETED else tl.fma(f, _FACTOR, addend)
    even, odd = tl.zeros_like(window).to(tl.int32), tl.zeros_like(window).to(tl.int32)
    for index in tl.static_range(WORDS):
        word = (g.to(tl.uint32, bitcast=True) * _MULTIPLIERS[index] + _INCREMENTS[index]).to(tl.uint32)
        even, odd = _add_bytes(even, word, 0), _add_bytes(odd, word, 1)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _add_bytes(total, word, FIRST: tl.constexpr):
    """An int32 plus the signed bytes FIRST and FIRST + 2 of a uint32: on a GPU one instruction, the dot product of four bytes."""
    if _INTERPRETED:
        total += (word << (24 - 8 * FIRST)).to(tl.int32, bitcast=True) >> 24
        total += (word << (8 - 8 * FIRST)).to(tl.int32, bitcast=True) >> 24
    elif FIRST == 0:
        total = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, 0x00010001, $2;", "=r,r,r", [word, total], tl.int32, is_pure=True, pack=1)
    else:
        total = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, 0x01000100, $2;", "=r,r,r", [word, total], tl.int32, is_pure=True, pack=1)
    return total
