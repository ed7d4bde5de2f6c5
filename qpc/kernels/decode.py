"""How a GPU decodes a block of a packed weight (`qpc.quant.layout`), for every family of quantizers.

A *code* is described by three constants. Trellis: BITS of a step, WINDOW_BITS, DIMENSION 2. Tables (scalar and vector quantizers): BITS of
an index, WINDOW_BITS 0, DIMENSION weights for each index; the table holds float16 numbers, from DIMENSION 2 on as int32 words of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qpc.kernels.computed_code import bits_from, bits_in_arc, decode_window


@triton.constexpr_function
def arc_pairs(DIMENSION):
    """Pairs of one *arc*: the shortest run of whole lanes of the layout that starts and ends at a word, whatever the rate."""
    return 64 if DIMENSION == 4 else 32


@triton.constexpr_function
def place_in_arc(row, pair):
    """Which pair of an arc lies in its row `row` (0 to 7) and, of the layout's lane `pair // 2` in the arc, on the left (0) or right."""
    return pair // 2 * 16 + row // 2 * 4 + pair % 2 * 2 + row % 2


@triton.constexpr_function
def words_of(pairs, BITS, DIMENSION):
    """Words of a run of pairs."""
    return 2 * pairs // DIMENSION * BITS // 32


@triton.jit
def load_arc(codes, block, arc, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr):
    """The uint32 words of one arc for each lane, and of a trellis the word after it, into which its last windows reach."""
    arc_words: tl.constexpr = words_of(arc_pairs(DIMENSION), BITS, DIMENSION)
    block_words: tl.constexpr = words_of(512, BITS, DIMENSION)
    words = ()
    for i in tl.static_range(arc_words):
        words += (tl.load(codes + block * block_words + arc * arc_words + i).to(tl.uint32, bitcast=True),)
    if WINDOW_BITS > 0:
        after = (arc + 1) * arc_words % block_words
        words += (tl.load(codes + block * block_words + after).to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def decode_in_arc(words, table, PAIR: tl.constexpr, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr):
    """The two weights of a fixed pair of an arc, float32, in the unit of the code."""
    if WINDOW_BITS > 0:
        even, odd = decode_window(bits_in_arc(words, PAIR * BITS, WINDOW_BITS), WINDOW_BITS)
    elif DIMENSION == 1:
        even = tl.load(table + (bits_in_arc(words, 2 * PAIR * BITS, BITS) & ((1 << BITS) - 1)))
        odd = tl.load(table + (bits_in_arc(words, (2 * PAIR + 1) * BITS, BITS) & ((1 << BITS) - 1)))
    else:
        entry_words: tl.constexpr = DIMENSION // 2
        index = bits_in_arc(words, PAIR // entry_words * BITS, BITS) & ((1 << BITS) - 1)
        even, odd = _halves(tl.load(table + index * entry_words + PAIR % entry_words))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def decode_anywhere(codes, table, block, pair, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr):
    """The same for any pairs of any blocks: tensors of the shape of `block` and `pair`."""
    if WINDOW_BITS > 0:
        even, odd = decode_window(_field(codes, block, pair, BITS, WINDOW_BITS, DIMENSION), WINDOW_BITS)
    elif DIMENSION == 1:
        even = tl.load(table + _field(codes, block, 2 * pair, BITS, BITS, DIMENSION))
        odd = tl.load(table + _field(codes, block, 2 * pair + 1, BITS, BITS, DIMENSION))
    else:
        entry_words: tl.constexpr = DIMENSION // 2
        index = _field(codes, block, pair // entry_words, BITS, BITS, DIMENSION)
        even, odd = _halves(tl.load(table + index * entry_words + pair % entry_words))
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _field(codes, block, index, BITS: tl.constexpr, WIDTH: tl.constexpr, DIMENSION: tl.constexpr):
    """The WIDTH bits that start at bit `index * BITS` of the ring of each block."""
    block_words: tl.constexpr = words_of(512, BITS, DIMENSION)
    bit = index * BITS
    word = bit // 32
    low = tl.load(codes + block * block_words + word).to(tl.uint32, bitcast=True)
    high = tl.load(codes + block * block_words + (word + 1) % block_words).to(tl.uint32, bitcast=True)
    return bits_from(low, high, bit % 32) & ((1 << WIDTH) - 1)


@triton.jit
def _halves(word):
    """The two float16 numbers of an int32 word."""
    even = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    odd = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return even, odd
