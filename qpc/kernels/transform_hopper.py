"""The kernel of `qpc.kernels.transform` with explicit layouts, for NVIDIA GPUs: the same programs and arithmetic.

A thread holds VECTOR neighbouring values of each member row, so the lowest stages of Sylvester's transform lie in registers, the next five
between the lanes of a warp (one shuffle and one multiply-add a value), and only the highest cross warps, through shared memory, once.
It reads nothing that an earlier kernel of the stream wrote before that has ended, so it may be launched while that still runs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, var-annotated"

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

from torch import Tensor
from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

from qpc.kernels.gate import GELU_CUBE, GELU_SLOPE, Activation
from qpc.kernels.operand import PEAK, PROJECTIONS, empty_operand
from qpc.kernels.transform import CREST, Front, front_arguments, outer_matrix
from qpc.quant.hadamard import factors

POWERS, FRONT_POWERS = (512, 1024), (1024, 512)
"""Largest inner factors, the best first: of a small one the block is spread over more programs, each of which reads all of it. Behind a
norm that counts for more, since the weights of the norm are read as well, and behind a gated activation, which each program computes."""

VECTORS = (8, 4, 2)
"""Values of a thread in each row, the best first."""

MAX_WARPS = 8
GATED_WARPS = 4
"""Of a program with a gated activation, if it can: fewer leave some of the special function units of their multiprocessor idle."""

MAX_HELD = 96
"""Registers of a thread for what it loads before it waits: pairs of values of all rows, and of as many weights of a norm. What is gated is
not counted: it comes after the wait, later where registers are short."""

MAX_ENTRIES = 112
"""Registers of a thread for the entries of the outer factor."""

_PEAK = gl.constexpr(float(PEAK))
_FIRST, _SECOND = (gl.constexpr(each) for each in zip(*PROJECTIONS, strict=True))
_BYTES = gl.constexpr("{.reg .b32 a, b; prmt.b32 a, $1, $2, SELECT; prmt.b32 b, $3, $4, SELECT; prmt.b32 $0, a, b, 0x5410;}")
_LOW, _HIGH = gl.constexpr(_BYTES.value.replace("SELECT", "0x0040")), gl.constexpr(_BYTES.value.replace("SELECT", "0x0051"))
"""Gather the lowest byte, or the second, of four words into one."""
_ROUND = gl.constexpr(12582912.0)
_SILU, _SLOPE, _CUBE = gl.constexpr(Activation.SILU.value), gl.constexpr(GELU_SLOPE), gl.constexpr(GELU_CUBE)
_LOG2_E = gl.constexpr(1 / math.log(2))
_SIGMOID = gl.constexpr("{.reg .f32 a; ex2.approx.ftz.f32 a, $1; add.rn.ftz.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 $0, a;}")
"""Of the negative exponent to base 2."""


@gluon.constexpr_function
def lane_stage(bit):
    """A stage between lanes whose index differs in one bit: `partner + own` in the lower, `partner - own` in the upper."""
    return f"""{{
.reg .b32 lane, sign;
.reg .f32 partner;
mov.u32 lane, %laneid;
shl.b32 sign, lane, {31 - bit};
lop3.b32 sign, sign, 0x80000000, 0x3f800000, 0xEA;
shfl.sync.bfly.b32 partner, $1, {1 << bit}, 0x1f, 0xffffffff;
fma.rn.f32 $0, $1, sign, partner;
}}"""


@gluon.constexpr_function
def exchanged(members, power, vector, warps):
    """The layout after the exchange, of [members * power]: a thread holds the bit of a pair and those that were on warps."""
    bits = [1 << bit for bit in range((members * power).bit_length() - 1)]
    first_warp = (32 * vector).bit_length() - 1
    on_warps = bits[first_warp : first_warp + warps.bit_length() - 1]
    rest = [bit for bit in bits if bit != 1 and bit not in on_warps]
    registers = (members * vector).bit_length() - 1
    lanes, outer = rest[:5], rest[5:]
    count = warps.bit_length() - 1
    own = [1, *on_warps, *outer[count:]]
    assert len(own) == registers and len(lanes) == 5, (own, registers, lanes)
    return gl.DistributedLinearLayout([[b] for b in own], [[b] for b in lanes], [[b] for b in outer[:count]], [], [members * power])


@gluon.jit
def _stage(values, SIZE: gl.constexpr, BIT: gl.constexpr):
    """A stage of Sylvester's transform along a bit of the index that lies in registers; values: [SIZE]."""
    layout: gl.constexpr = values.type.layout
    pairs = gl.permute(gl.reshape(values, (SIZE >> (BIT + 1), 2, 1 << BIT)), (0, 2, 1))
    first, second = gl.split(pairs)
    joined = gl.permute(gl.join(first + second, first - second), (0, 2, 1))
    return gl.convert_layout(gl.reshape(joined, (SIZE,)), layout, assert_trivial=True)


@gluon.jit
def _load_signs(signs, first, POWER: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr):
    """The sign bits of POWER features from `first` on, those of a thread lowest: int32 [POWER / VECTOR]."""
    by_thread: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, POWER // VECTOR, gl.SliceLayout(1, by_thread))
    byte = gl.load(signs + (first // 8 + thread // (8 // VECTOR))).to(gl.int32)
    return byte >> (thread % (8 // VECTOR) * VECTOR)


@gluon.jit
def _flips(bits, POWER: gl.constexpr, VECTOR: gl.constexpr, LAYOUT: gl.constexpr):
    """Sign bits at the top of an int32 for each feature: [POWER]."""
    place = gl.arange(0, VECTOR, gl.SliceLayout(0, bits.type.layout.parent))
    flip = (gl.expand_dims(bits, 1) << gl.expand_dims(31 - place, 0)) & -0x80000000
    return gl.convert_layout(gl.reshape(flip, (POWER,)), LAYOUT, assert_trivial=True)


@gluon.jit
def _digits(values, inverse):
    """The bits of 1.5 * 2^23 plus the rounded value: the lowest 16 are those of the fixed-point value."""
    scaled = gl.minimum(gl.maximum(values * inverse, -_PEAK), _PEAK)
    return (scaled + _ROUND).to(gl.int32, bitcast=True)


@gluon.jit
def _activated(value, ACTIVATION: gl.constexpr):
    """An activation (`qpc.kernels.gate`) of float32 values, by the two instructions that take most of the time of a gated transform."""
    logit = value if ACTIVATION == _SILU else value * (_SLOPE + _SLOPE * _CUBE * value * value)
    return value * gl.inline_asm_elementwise(_SIGMOID, "=f,f", [logit * -_LOG2_E], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit(do_not_specialize=["rows"])
def transform_kernel(
    x, second, weight, signs, matrix, hidden, words, scales, features, rows, x_stride, second_stride, eps, offset,
    CREST: gl.constexpr, OUTER: gl.constexpr, POWER: gl.constexpr, MEMBERS: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr,
    NORM: gl.constexpr, RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Programs (members of the outer factor, row). matrix: float32 [OUTER (source), OUTER (member)]. second: the residual, or what the
    activation of x gates."""
    SIZE: gl.constexpr = MEMBERS * POWER
    by_member: gl.constexpr = gl.BlockedLayout([MEMBERS, VECTOR], [1, 32], [1, WARPS], [1, 0])
    along: gl.constexpr = gl.SliceLayout(0, by_member)
    down: gl.constexpr = gl.SliceLayout(1, by_member)
    row = gl.program_id(1)
    first_member = gl.program_id(0) * MEMBERS
    inner = gl.arange(0, POWER, along)
    at_member = matrix + first_member + gl.arange(0, MEMBERS, down)
    in_block = first_member + gl.arange(0, MEMBERS, down) < OUTER
    at_x = x + row.to(gl.int64) * x_stride + inner
    if RESIDUAL or ACTIVATION is not None:
        at_second = second + row.to(gl.int64) * second_stride + inner
    if PDL:
        gdc_launch_dependents()
    entries = ()
    bits = ()
    weights = ()
    for source in gl.static_range(OUTER):
        if OUTER > 1:
            entries += (gl.load(at_member + source * OUTER, mask=in_block, other=0),)
        bits += (_load_signs(signs, source * POWER, POWER, VECTOR, WARPS),)
        if NORM:
            weights += (gl.load(weight + source * POWER + inner),)
    if PDL:
        gdc_wait()
    raws = ()
    for source in gl.static_range(OUTER):
        raws += (gl.load(at_x + source * POWER),)
    ups = ()
    if ACTIVATION is not None:
        for source in gl.static_range(OUTER):
            ups += (gl.load(at_second + source * POWER),)
    acc = gl.zeros((MEMBERS, POWER), gl.float32, by_member)
    squares = gl.zeros((POWER,), gl.float32, along)
    energies = gl.zeros((POWER,), gl.float32, along)
    for source in gl.static_range(OUTER):
        raw = raws[source]
        if RESIDUAL:
            other = gl.load(at_second + source * POWER)
            raw = (raw.to(gl.float32) + other.to(gl.float32)).to(raw.dtype)
            if source // MEMBERS == gl.program_id(0):
                gl.store(hidden + row.to(gl.int64) * features + source * POWER + inner, raw)
        if ACTIVATION is not None:
            raw = _activated(raw.to(gl.float32), ACTIVATION).to(raw.dtype) * ups[source]
        value = raw.to(gl.float32)
        if NORM:
            squares += value * value
            value = value * (weights[source].to(gl.float32) + offset)
        value = (value.to(gl.int32, bitcast=True) ^ _flips(bits[source], POWER, VECTOR, along)).to(gl.float32, bitcast=True)
        energies += value * value
        if OUTER > 1:
            acc += gl.expand_dims(entries[source], 1) * gl.expand_dims(value, 0)
        else:
            acc += gl.expand_dims(value, 0)
    energy = gl.sum(energies, 0)
    inverse_norm = gl.where(energy > 0, gl.rsqrt(energy), 0.0)
    inverse = inverse_norm * (_PEAK / CREST)
    if gl.program_id(0) == 0:
        scale = energy * inverse_norm * (CREST / _PEAK / (OUTER * POWER) ** 0.5)
        if NORM:
            scale = scale * gl.rsqrt(gl.sum(squares, 0) * (1.0 / (OUTER * POWER)) + eps)
        gl.store(scales + row, scale)

    VECTOR_BITS: gl.constexpr = VECTOR.bit_length() - 1
    values = gl.reshape(acc, (SIZE,))
    for bit in gl.static_range(VECTOR_BITS):
        values = _stage(values, SIZE, bit)
    for bit in gl.static_range(5):
        values = gl.inline_asm_elementwise(lane_stage(bit), "=f,f", [values], dtype=gl.float32, is_pure=False, pack=1)
    values = gl.convert_layout(values, exchanged(MEMBERS, POWER, VECTOR, WARPS))
    for bit in gl.static_range(WARPS.bit_length() - 1):
        values = _stage(values, SIZE, VECTOR_BITS + 5 + bit)

    first, second = gl.split(gl.reshape(values, (SIZE // 2, 2)))
    pair = first_member * (POWER // 2) + gl.arange(0, SIZE // 2, first.type.layout)
    at = words + (pair // 8 * rows + row) * 32 + pair % 4 * 4 + pair // 4 % 2
    kept = pair < features // 2
    for word in gl.static_range(2):
        low = ()
        high = ()
        for index in gl.static_range(4):
            projection = first * _FIRST[4 * word + index] + second * _SECOND[4 * word + index]
            digits = _digits(projection, inverse)
            low += (digits,)
            high += (digits + 128,)
        gl.store(at, gl.inline_asm_elementwise(_HIGH, "=r,r,r,r,r", high, dtype=gl.int32, is_pure=True, pack=1), mask=kept)
        gl.store(at + 16, gl.inline_asm_elementwise(_LOW, "=r,r,r,r,r", low, dtype=gl.int32, is_pure=True, pack=1), mask=kept)
        at += 2


@dataclass(frozen=True)
class Cut:
    """How a block is cut: `H_outer (kron) H_power`, members of the outer factor in a program."""

    outer: int
    power: int
    members: int
    warps: int

    @property
    def vector(self) -> int:
        """Neighbouring values of a thread."""
        return self.power // (32 * self.warps)

    @property
    def programs(self) -> int:
        """Programs of a row."""
        return -(-self.outer // self.members)


@cache
def cut(features: int, block: int, norm: bool = False, gated: bool = False) -> Cut | None:
    """How to transform a row of 16-bit values, behind a norm, a gated activation or neither; None where this kernel does not, or not
    without spilling registers."""
    assert not (norm and gated), "one of them lies in front of a rotation"
    _, power = factors(block)
    if block != features:
        return None
    inners = dict.fromkeys(min(power, each) for each in (FRONT_POWERS if norm or gated else POWERS))
    for least, inner, vector in product((GATED_WARPS, 1) if gated else (1,), inners, VECTORS):
        outer, warps = features // inner, inner // (32 * vector)
        members = max(1, 64 * warps * warps // inner)  # the exchange between warps needs as many values
        held = outer * vector * (1 + norm) // 2
        if least <= warps <= MAX_WARPS and held <= MAX_HELD and outer * members <= MAX_ENTRIES:
            return Cut(outer, inner, members, warps)
    return None


def transform(x: Tensor, signs: Tensor, front: Front, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """As `qpc.kernels.transform.transform`, by this kernel; x: [batch, features], a block of float16 or bfloat16 in each row."""
    batch, features = x.shape
    words, scales = empty_operand(batch, features, x.device)
    given = front_arguments(x, front)
    transform_kernel[(cut.programs, batch)](
        x, signs=signs, matrix=outer_matrix(cut.outer, features, x.device, True), words=words, scales=scales, features=features,
        rows=words.shape[1], x_stride=x.stride(0), **given,
        CREST=min(CREST, features**0.5), OUTER=cut.outer, POWER=cut.power, MEMBERS=cut.members, VECTOR=cut.vector, WARPS=cut.warps,
        PDL=True, num_warps=cut.warps, launch_pdl=True,
    )  # fmt: skip
    return words, scales, given["hidden"]
