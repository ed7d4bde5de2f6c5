"""The kernel of the ring-order study: decoding and multiplying on tensor cores, with the order of the ring as the only thing that changes.

A warp decodes 16 x 16 tiles straight into the A operand of `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with
g = lane / 4 and t = lane % 4, the four registers of a lane ("quarters" q) are pairs of weights in row g + 8 (q % 2), columns
2 (t + 4 (q // 2)) and the next. No weight moves between lanes. The warps of a program take different columns and add up at the end.

A *unit* is what a lane decodes in one step of its loop: 16 windows (4 tiles) of one block of 64 x 16, or 64 windows (16 tiles) of one ring
along the input axis. Codes are int32 [row group, unit column, words of a unit]; activations are float16
[in_features / 16, lane, 2 (q // 2), 2], with lane = 4 * batch row + t, so that a lane loads both of its registers as one word of 64 bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from enum import IntEnum

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2  # type: ignore[import-untyped]


class Order(IntEnum):
    """How the windows of a ring lie over the weights."""

    TILE = 0
    """128 windows over 16 x 16: a lane's arc is 4 windows and starts anywhere in a word."""
    BLOCK = 1
    """512 windows over 64 x 16: a lane's arc is 16 windows, planar words."""
    LANE = 2
    """64 windows along the input axis (16 x 256 weights to 32 rings): a lane has its own ring, planar words."""


class Code(IntEnum):
    """How two words h1 and h2 are made from a window."""

    SUM = 0
    """Two multiply-adds of the window, which must be free of the bits above it: one mask, unless the window has 32 bits."""
    SHIFTED = 1
    """No mask: the first multiplier is shifted up until the bits above the window fall out of the product; h2 is the high half of h1's
    own product. A count of instructions rather than a code: the low 32 - L bits of h1 are zero, which leaves half of it a constant."""


MULTIPLIERS = (0x0551B2B5, 0x25C8E409)
INCREMENTS = (0x03D4552B, 0xE345C183)
AND, XOR = 0x8FFF8FFF, 0x3B603B60
"""h1 and h2 are masked and xored into two halves each, and these are added: two weights (after QTIP's 3INST, arXiv 2406.11235)."""

_TILE, _BLOCK, _LANE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
_SHIFTED = gl.constexpr(1)
_MULTIPLIER_0, _MULTIPLIER_1 = gl.constexpr(MULTIPLIERS[0]), gl.constexpr(MULTIPLIERS[1])
_INCREMENT_0, _INCREMENT_1 = gl.constexpr(INCREMENTS[0]), gl.constexpr(INCREMENTS[1])
_ADD_HALVES = gl.constexpr(f"""{{
.reg .b32 a, b, m, x;
mov.b32 m, {AND};
mov.b32 x, {XOR};
lop3.b32 a, $2, m, x, 0x6A;
lop3.b32 b, $3, m, x, 0x6A;
add.rn.f16x2 a, a, b;
mov.b32 {{$0, $1}}, a;
}}""")
_UNPACK_4 = gl.constexpr("mov.b64 {$0, $1, $2, $3}, $4;")


@gluon.jit
def _decode(words, BIT: gl.constexpr, WINDOW_BITS: gl.constexpr, CODE: gl.constexpr):
    """The pair of weights (float16 low, high) of the window at a fixed bit of a tuple of uint32 words."""
    low: gl.constexpr = BIT // 32
    offset: gl.constexpr = BIT % 32
    if offset + WINDOW_BITS <= 32:
        window = words[low] >> offset
    else:
        window = (((words[low + 1].to(gl.uint64) << 32) | words[low].to(gl.uint64)) >> offset).to(gl.uint32)
    if CODE == _SHIFTED:
        top: gl.constexpr = (_MULTIPLIER_0 << (32 - WINDOW_BITS)) & 0xFFFFFFFF
        first = window * top
        second = ((first.to(gl.uint64) * _MULTIPLIER_1) >> 32).to(gl.uint32)
    else:
        window = window & ((1 << WINDOW_BITS) - 1)
        first = window * _MULTIPLIER_0 + _INCREMENT_0
        second = window * _MULTIPLIER_1 + _INCREMENT_1
    return gl.inline_asm_elementwise(_ADD_HALVES, "=h,=h,r,r", [first, second], dtype=(gl.float16, gl.float16), is_pure=True, pack=1)


@gluon.jit
def _tile(words, FIRST_BIT: gl.constexpr, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, CODE: gl.constexpr, WARPS: gl.constexpr,
          LAYOUT: gl.constexpr):  # fmt: skip
    """Decode the four windows from `FIRST_BIT` into the A operand: float16 [WARPS, 16, 16]."""
    q0 = gl.join(*_decode(words, FIRST_BIT, WINDOW_BITS, CODE))
    q1 = gl.join(*_decode(words, FIRST_BIT + STEP_BITS, WINDOW_BITS, CODE))
    q2 = gl.join(*_decode(words, FIRST_BIT + 2 * STEP_BITS, WINDOW_BITS, CODE))
    q3 = gl.join(*_decode(words, FIRST_BIT + 3 * STEP_BITS, WINDOW_BITS, CODE))
    pairs = gl.join(gl.join(q0, q1), gl.join(q2, q3))
    by_lane = gl.reshape(pairs, (WARPS, 8, 4, 2, 2, 2))  # warp, g, t, value, q % 2, q // 2
    tile = gl.reshape(gl.permute(by_lane, (0, 4, 1, 5, 2, 3)), (WARPS, 16, 16))
    return gl.convert_layout(tile, LAYOUT, assert_trivial=True)


@gluon.jit
def _activation(word, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """The B operand from 64-bit words: float16 [WARPS, 16, 8]."""
    a, b, c, d = gl.inline_asm_elementwise(
        _UNPACK_4, "=h,=h,=h,=h,l", [word], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1
    )
    by_lane = gl.reshape(gl.join(gl.join(a, b), gl.join(c, d)), (WARPS, 8, 4, 2, 2))  # warp, batch row, t, value, q // 2
    tile = gl.reshape(gl.permute(by_lane, (0, 4, 2, 3, 1)), (WARPS, 16, 8))
    return gl.convert_layout(tile, LAYOUT, assert_trivial=True)


@gluon.jit
def _code_pointers(codes, halves, unit, lane, ORDER: gl.constexpr, STEP_BITS: gl.constexpr):
    """Where a lane reads: its own words, the word after them, and (blocks of odd STEP_BITS) its half word. unit: int32, of each lane."""
    own = codes + unit * ((64 if ORDER == _LANE else 16) * STEP_BITS)
    half = halves + unit * (32 * STEP_BITS) + (STEP_BITS - 1) * 32 + lane
    if ORDER == _TILE:
        first = lane * STEP_BITS // 8
        return own + first, own + (first + 1) % (4 * STEP_BITS), half
    else:
        return own + lane, own + (lane + 1) % 32, half


@gluon.jit
def _load_codes(at, unit: gl.constexpr, offset, ORDER: gl.constexpr, STEP_BITS: gl.constexpr):
    """All words of one unit of a lane, each as uint32. unit: how many units after the pointers `at`; offset: of a lane's arc in a tile."""
    words = ()
    if ORDER == _TILE:
        for tile in gl.static_range(4):
            low = gl.load(at[0] + (unit * 4 + tile) * 4 * STEP_BITS).to(gl.uint32, bitcast=True)
            high = gl.load(at[1] + (unit * 4 + tile) * 4 * STEP_BITS).to(gl.uint32, bitcast=True)
            if 4 * STEP_BITS == 32:
                words += (low, high)
            else:
                arc = ((high.to(gl.uint64) << 32) | low.to(gl.uint64)) >> offset
                words += (arc.to(gl.uint32), (arc >> 32).to(gl.uint32))
    elif ORDER == _BLOCK:
        for word in gl.static_range(STEP_BITS // 2):
            words += (gl.load(at[0] + (unit * 16 * STEP_BITS + word * 32)).to(gl.uint32, bitcast=True),)
        after = gl.load(at[1] + unit * 16 * STEP_BITS).to(gl.uint32, bitcast=True)
        if STEP_BITS % 2 == 1:
            half = gl.load(at[2] + unit * 32 * STEP_BITS).to(gl.uint16, bitcast=True)
            words += (half.to(gl.uint32) | (after << 16),)
        else:
            words += (after,)
    else:
        for word in gl.static_range(2 * STEP_BITS):
            words += (gl.load(at[0] + (unit * 64 * STEP_BITS + word * 32)).to(gl.uint32, bitcast=True),)
    return words


@gluon.jit
def _add_block(acc, words, x, ORDER: gl.constexpr, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, CODE: gl.constexpr,
               WARPS: gl.constexpr, A: gl.constexpr, B: gl.constexpr):  # fmt: skip
    """Add the products of one block of 64 x 16 to the sums of its four tiles."""
    fragment = _activation(x, WARPS, B)
    sums = ()
    for tile in gl.static_range(4):
        if ORDER == _TILE:
            weight = _tile((words[2 * tile], words[2 * tile + 1]), 0, STEP_BITS, WINDOW_BITS, CODE, WARPS, A)
        else:
            weight = _tile(words, tile * 4 * STEP_BITS, STEP_BITS, WINDOW_BITS, CODE, WARPS, A)
        sums += (mma_v2(weight, fragment, acc[tile]),)
    return sums


@gluon.jit
def _add_ring(acc, words, x, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, CODE: gl.constexpr, WARPS: gl.constexpr,
              A: gl.constexpr, B: gl.constexpr):  # fmt: skip
    """Add the products of the 16 tiles of a lane's ring; x: the activations of all of them. Two sums, so that products do not wait."""
    even = acc[0]
    odd = acc[1]
    ring = words
    ring += (words[0],)
    for tile in gl.static_range(16):
        weight = _tile(ring, tile * 4 * STEP_BITS, STEP_BITS, WINDOW_BITS, CODE, WARPS, A)
        fragment = _activation(x[tile], WARPS, B)
        if tile % 2 == 0:
            even = mma_v2(weight, fragment, even)
        else:
            odd = mma_v2(weight, fragment, odd)
    return even, odd


@gluon.jit
def _advance(at, ORDER: gl.constexpr, STEP_BITS: gl.constexpr, UNITS: gl.constexpr):
    """The pointers of `_code_pointers`, some units further."""
    words: gl.constexpr = UNITS * (64 if ORDER == _LANE else 16) * STEP_BITS
    return at[0] + words, at[1] + words, at[2] + 2 * words


@gluon.jit
def _load(at, x_at, unit: gl.constexpr, offset, has_row, ORDER: gl.constexpr, STEP_BITS: gl.constexpr):
    """Codes of one unit, and its first activation fragment."""
    fragment = gl.load(x_at + unit * (512 if ORDER == _LANE else 32), mask=has_row, other=0)
    return _load_codes(at, unit, offset, ORDER, STEP_BITS), fragment


@gluon.jit
def _add(acc, words, fragment, x_at, unit: gl.constexpr, has_row, ORDER: gl.constexpr, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr,
         CODE: gl.constexpr, WARPS: gl.constexpr, A: gl.constexpr, B: gl.constexpr):  # fmt: skip
    """Add the products of one unit; a ring along the input axis loads the other 15 fragments that it needs."""
    if ORDER == _LANE:
        row = (fragment,)
        for tile in gl.static_range(15):
            row += (gl.load(x_at + (unit * 512 + (tile + 1) * 32), mask=has_row, other=0),)
        return _add_ring(acc, words, row, STEP_BITS, WINDOW_BITS, CODE, WARPS, A, B)
    else:
        return _add_block(acc, words, fragment, ORDER, STEP_BITS, WINDOW_BITS, CODE, WARPS, A, B)


@gluon.jit
def _add_rows(out, sums, row, ROWS: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr):
    """Sum float32 [WARPS, 16, 8, ROWS / 16] over the warps and add it to ROWS rows of the output, float32 [out_features, BATCH].

    The sums change hands once, through a conversion that gives a thread the values of all warps: the compiler swizzles it so that no two
    lanes meet in a bank. (`gl.sum` across warps stores the same values at a stride of 128 bytes, all lanes of a warp in one bank.)
    """
    each: gl.constexpr = ROWS * 8 // (32 * WARPS) if ROWS * 8 > 32 * WARPS else 1
    layout: gl.constexpr = gl.BlockedLayout([WARPS, each], [1, 32], [1, WARPS], [1, 0])
    by_row = gl.reshape(gl.permute(sums, (0, 3, 1, 2)), (WARPS, ROWS * 8))
    total = gl.sum(gl.convert_layout(by_row, layout), axis=0)
    index = gl.arange(0, ROWS * 8, gl.SliceLayout(0, layout))
    gl.atomic_add(out + (row + index // 8) * BATCH + index % 8, total, mask=index % 8 < BATCH, sem="relaxed")


@gluon.jit(do_not_specialize=["columns", "steps"])
def multiply(codes, halves, x, out, columns, steps, ORDER: gl.constexpr, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr,
             BATCH: gl.constexpr, CODE: gl.constexpr, DEPTH: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Add the products of `steps` * DEPTH unit columns per warp to `out`, float32 [out_features, BATCH].

    Program (row group, split). columns: unit columns of the weight. DEPTH: units of codes loaded together; AHEAD: steps from their load
    to their use, at most `steps`. The assembler sinks all loads to the end of a turn of the loop, so that AHEAD = 1 leaves their latency
    to other warps, and AHEAD = 2 gives them a whole turn, for the registers of one more run.
    halves: `codes` as int16, read at odd STEP_BITS only. Units of tiles and blocks are 16 columns wide, of lanes 256.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread = gl.arange(0, 32 * WARPS, flat)
    lane = thread % 32
    group = gl.program_id(0)
    start = gl.program_id(1) * (steps * DEPTH * WARPS) + thread // 32 * DEPTH
    at = _code_pointers(codes, halves, group * columns + start, lane, ORDER, STEP_BITS)
    offset = (lane * (4 * STEP_BITS) % 32).to(gl.uint64)
    x_at = x + start * (512 if ORDER == _LANE else 32) + lane
    has_row = lane < 4 * BATCH
    acc = ()
    for _ in gl.static_range(2 if ORDER == _LANE else 4):
        acc += (gl.zeros((WARPS, 16, 8), gl.float32, mma),)

    turn: gl.constexpr = DEPTH * WARPS
    runs = ()
    for ahead in gl.static_range(AHEAD):
        run = ()
        for unit in gl.static_range(DEPTH):
            run += (_load(at, x_at, ahead * turn + unit, offset, has_row, ORDER, STEP_BITS),)
        runs += (run,)
    for _ in range(steps - AHEAD):
        run = ()
        for unit in gl.static_range(DEPTH):
            words, fragment = runs[0][unit]
            acc = _add(acc, words, fragment, x_at, unit, has_row, ORDER, STEP_BITS, WINDOW_BITS, CODE, WARPS, a_layout, b_layout)
            run += (_load(at, x_at, AHEAD * turn + unit, offset, has_row, ORDER, STEP_BITS),)
        later = ()
        for ahead in gl.static_range(1, AHEAD):
            later += (runs[ahead],)
        later += (run,)
        runs = later
        at = _advance(at, ORDER, STEP_BITS, turn)
        x_at += turn * (512 if ORDER == _LANE else 32)
    for ahead in gl.static_range(AHEAD):
        for unit in gl.static_range(DEPTH):
            words, fragment = runs[ahead][unit]
            acc = _add(acc, words, fragment, x_at, ahead * turn + unit, has_row, ORDER, STEP_BITS, WINDOW_BITS, CODE, WARPS, a_layout,
                       b_layout)  # fmt: skip

    if ORDER == _LANE:
        _add_rows(out, gl.reshape(acc[0] + acc[1], (WARPS, 16, 8, 1)), group * 16, 16, BATCH, WARPS)
    else:
        sums = gl.join(gl.join(acc[0], acc[2]), gl.join(acc[1], acc[3]))
        _add_rows(out, gl.reshape(sums, (WARPS, 16, 8, 4)), group * 64, 64, BATCH, WARPS)
