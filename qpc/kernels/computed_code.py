"""The computed code of `qpc.quant.codebook` in Triton, shared by the multiplication and the encoder."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.quant.codebook import DIRECTIONS, MULTIPLIERS, START, hash_words

_START, _MULTIPLIERS = tl.constexpr(START), tl.constexpr(MULTIPLIERS)
_COORDINATES = tl.constexpr(
    tuple(int.from_bytes([c & 0xFF for c in each], "little", signed=True) for word in DIRECTIONS for each in zip(*word, strict=True))
)
"""What the bytes of a word count, as the four signed bytes of an int32: for both weights of the first word, then of the second."""

_hash_words = triton.constexpr_function(hash_words)

PLAIN = tl.constexpr(triton.knobs.runtime.interpret or torch.version.hip is not None)
"""Whether kernels do without PTX: in Triton's interpreter, and on GPUs of other vendors."""


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
def decode_window(word, STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr):
    """The two code values of the window in the low bits of a uint32, float32; the bits above it are of no account."""
    even, odd = sum_window(word, 0, STEP_BITS, WINDOW_BITS)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def sum_window(word, START: tl.constexpr, STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr):
    """The same as int32, with START added to each."""
    return _sum_words(word & ((1 << WINDOW_BITS) - 1), START, _hash_words(STEP_BITS, WINDOW_BITS))


@triton.jit
def hash_window(window, WORDS: tl.constexpr):
    """The two code values of a window with nothing above it, from so many words, float32."""
    even, odd = _sum_words(window, 0, WORDS)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _sum_words(window, START: tl.constexpr, WORDS: tl.constexpr):
    """START plus the bytes of so many words along the directions of both weights, int32."""
    even = tl.zeros_like(window).to(tl.int32) + START
    odd = even
    for index in tl.static_range(WORDS):
        word = ((window | _START) * _MULTIPLIERS[index]).to(tl.uint32)
        even = _add_bytes(even, word, _COORDINATES[2 * index])
        odd = _add_bytes(odd, word, _COORDINATES[2 * index + 1])
    return even, odd


@triton.jit
def _add_bytes(total, word, COORDINATES: tl.constexpr):
    """An int32 plus the signed bytes of a uint32, each times its coordinate: on a GPU one instruction."""
    if PLAIN:
        for index in tl.static_range(4):
            byte = (word << (24 - 8 * index)).to(tl.int32, bitcast=True) >> 24
            total += byte * (((COORDINATES >> (8 * index) & 0xFF) ^ 0x80) - 0x80)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, COORDINATES, total], tl.int32, is_pure=True, pack=1
        )
    return total
