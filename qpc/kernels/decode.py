"""How a GPU decodes a block of a packed weight (`qpc.quant.layout`), for every family of quantizers.

A *code* is described by three constants. Trellis: BITS of a step, WINDOW_BITS, DIMENSION 2. Tables (scalar and vector quantizers): BITS of
an index, WINDOW_BITS 0, DIMENSION weights for each index; the table holds float16 numbers, from DIMENSION 2 on as int32 words of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.kernels.computed_code import bits_in_arc, decode_window


@triton.constexpr_function
def place_in_arc(row, pair):
    """Which pair of an arc lies in its row `row` (0 to 7) and, of the layout's lane `pair // 2` in the arc, on the left (0) or right."""
    return pair // 2 * 16 + row // 2 * 4 + pair % 2 * 2 + row % 2


@triton.constexpr_function
def block_words(BITS, DIMENSION):
    """Words of a block."""
    return 1024 // DIMENSION * BITS // 32


@triton.jit
def load_arc(codes, block, arc, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr):
    """The uint32 words of one arc for each lane, the first bit of the arc foremost.

    They reach a word into the next arc where a window does, and where arcs of an odd number of half words may start in the middle of one.
    """
    size: tl.constexpr = block_words(BITS, DIMENSION)
    halves: tl.constexpr = size // 8
    first = arc * halves // 2
    words = ()
    for i in tl.static_range(halves // 2 + (WINDOW_BITS > 0) + 2 * (halves % 2)):
        word = first + i
        if i >= halves // 2:
            word = tl.where(word < size, word, word - size)
        words += (tl.load(codes + block * size + word).to(tl.uint32, bitcast=True),)
    if halves % 2:
        shift = (arc % 2 * 16).to(tl.uint64)
        aligned = ()
        for i in tl.static_range(halves // 2 + 1):
            pair = (words[i + 1].to(tl.uint64) << 32) | words[i].to(tl.uint64)
            aligned += ((pair >> shift).to(tl.uint32),)
        words = aligned
    return words


@triton.jit
def decode_in_arc(words, table, PAIR: tl.constexpr, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr):
    """The two weights of a fixed pair of an arc, float32, in the unit of the code."""
    if WINDOW_BITS > 0:
        even, odd = decode_window(bits_in_arc(words, PAIR * BITS, WINDOW_BITS), BITS, WINDOW_BITS)
    elif DIMENSION == 1:
        even = tl.load(table + (bits_in_arc(words, 2 * PAIR * BITS, BITS) & ((1 << BITS) - 1)))
        odd = tl.load(table + (bits_in_arc(words, (2 * PAIR + 1) * BITS, BITS) & ((1 << BITS) - 1)))
    else:
        entry_words: tl.constexpr = DIMENSION // 2
        index = bits_in_arc(words, PAIR // entry_words * BITS, BITS) & ((1 << BITS) - 1)
        even, odd = _halves(tl.load(table + index * entry_words + PAIR % entry_words))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _halves(word):
    """The two float16 numbers of an int32 word."""
    even = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    odd = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return even, odd
