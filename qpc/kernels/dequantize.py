"""Decoding of a packed weight to memory.

A program decodes some block columns of a block row. A lane owns an arc of a block (`qpc.kernels.decode`), so that all shifts are constant;
what the lanes have decoded changes hands through shared memory once, and leaves as whole lines of the weight.

The sums of bytes become floats for nothing: they are added to the bits of 1.5 * 2^23, whose last place is 1, which makes the bits of that
number plus the sum. One multiply-add takes the number off again and multiplies by the scale; it is exact before it rounds, because the
scale is cut to 22 bits, of which 1.5 * 2^23 times as much has 24. Where a result is float32 the scale is not cut, and the sum is converted.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.kernels.code import code_of, table_of
from qpc.kernels.computed_code import PLAIN, bits_in_arc, sum_window
from qpc.kernels.decode import block_words, decode_in_arc, load_arc, place_in_arc
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.quantizer import UniformQuantizer

COLUMNS = 8
"""Block columns of one program, a power of two: rows of 256 bytes, two lines, in 16 bits."""

COLUMNS_PER_WARP = 2
"""Of them, so that a lane has one arc, which is 32 pairs."""

_LIFT = tl.constexpr(12582912.0)
_LIFT_BITS = tl.constexpr(0x4B400000)
"""1.5 * 2^23. Sums stay below 2^22 in size."""


@triton.jit
def dequantize_kernel(
    codes, table, scales, out, columns, first_column, out_features, out_stride,
    BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Programs (block row, COLUMNS block columns) of a part that has `columns`, from block column `first_column` of the weight on.

    HALVES: 0 where `out` holds weights; otherwise it holds int32 words of two weights, float16 with 1, bfloat16 with 2. out_stride: such
    elements of a row, all of which are of the weight.
    """
    EACH: tl.constexpr = 8 if HALVES else 16
    block_row, start = tl.program_id(0), tl.program_id(1) * COLUMNS
    lane = tl.arange(0, 16 * COLUMNS)
    group = lane % 16 // 2
    own = codes + (block_row.to(tl.int64) * columns + start) * block_words(BITS, DIMENSION)
    words = load_arc(own, tl.minimum(lane // 16, columns - 1 - start), lane % 16, BITS, WINDOW_BITS, DIMENSION)
    made, others = (), ()
    for row in tl.static_range(8):
        scale = tl.load(scales + block_row * 64 + 8 * row + group).to(tl.float32) * UNIT
        for pair in tl.static_range(4):
            if HALVES:
                made += (_pair_of_halves(words, table, scale, place_in_arc(row, pair), BITS, WINDOW_BITS, DIMENSION, HALVES),)
            else:
                even, odd = decode_in_arc(words, table, place_in_arc(row, pair), BITS, WINDOW_BITS, DIMENSION)
                made += (even * scale,)
                others += (odd * scale,)
    if HALVES:
        tile = _tile(made, COLUMNS)
    else:
        pairs = tl.join(_tile(made, COLUMNS), _tile(others, COLUMNS))
        tile = tl.reshape(pairs, (64, EACH * COLUMNS)).to(out.dtype.element_ty)
    row = tl.arange(0, 64)[:, None]
    local = tl.arange(0, EACH * COLUMNS)[None, :]
    inner = (first_column + start) * EACH + local
    mask = (block_row * 64 + row < out_features) & (start + local // EACH < columns) & (inner < out_stride)
    to = out + block_row.to(tl.int64) * 64 * out_stride
    tl.store(to + (row * out_stride + inner), tile, mask=mask)


@triton.jit
def _pair_of_halves(
    words, table, scale, PLACE: tl.constexpr, BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr, HALVES: tl.constexpr
):
    """Both weights of a pair of an arc times `scale`, rounded to 16 bits, in an int32."""
    if WINDOW_BITS > 0:
        cut = (scale.to(tl.int32, bitcast=True) & -4).to(tl.float32, bitcast=True)
        even, odd = sum_window(bits_in_arc(words, PLACE * BITS, WINDOW_BITS), _LIFT_BITS, BITS, WINDOW_BITS)
        even = tl.fma(even.to(tl.float32, bitcast=True), cut, -_LIFT * cut)
        odd = tl.fma(odd.to(tl.float32, bitcast=True), cut, -_LIFT * cut)
    else:
        even, odd = decode_in_arc(words, table, PLACE, BITS, WINDOW_BITS, DIMENSION)
        even, odd = even * scale, odd * scale
    if HALVES == 1:
        packed = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], tl.int32, is_pure=True, pack=1)
    else:
        packed = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], tl.int32, is_pure=True, pack=1)
    return packed


@triton.jit
def _tile(values, COLUMNS: tl.constexpr):
    """The 32 values of each lane, of 8 rows by 4 pairs, where they belong: [64 rows, 8 pairs of each block column]."""
    joined = _joined(values, 0, 32)  # block column, row % 8, then of the pair: bit 1, bit 2, bit 0; row // 8 from its lowest bit on
    bits = tl.reshape(joined, (COLUMNS, 8, 2, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(bits, (7, 6, 5, 1, 0, 3, 2, 4)), (64, 8 * COLUMNS))


@triton.jit
def _joined(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the values, a power of two, along new dimensions, one for each bit of their index, the lowest bit first."""
    HALF: tl.constexpr = COUNT // 2
    return values[FIRST] if COUNT == 1 else tl.join(_joined(values, FIRST, HALF), _joined(values, FIRST + HALF, HALF))


def dequantize(
    codes: Sequence[Tensor],
    scales: Tensor,
    quantizers: Sequence[UniformQuantizer],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The decoded weight in the rotated basis: a new [out_features, in_features] of `dtype`."""
    out = torch.empty((out_features, in_features), dtype=dtype, device=scales.device)
    decode_rows(codes, scales, quantizers, out)
    return out


def decode_rows(
    codes: Sequence[Tensor],
    scales: Tensor,
    quantizers: Sequence[UniformQuantizer],
    out: Tensor,
    first: int = 0,
    columns_per_program: int = COLUMNS,
) -> None:
    """Decode rows `first`, a multiple of 64, and following of a weight into `out` [rows, in_features], contiguous, of a float dtype."""
    assert first % BLOCK_ROWS == 0 and out.is_contiguous(), (first, out.shape, out.stride())
    rows, in_features = out.shape
    halves = 0 if PLAIN or in_features % 2 else {torch.float16: 1, torch.bfloat16: 2}.get(out.dtype, 0)
    packed = out.view(torch.int32) if halves else out
    block_rows = slice(first // BLOCK_ROWS, -(-(first + rows) // BLOCK_ROWS))
    chosen = scales[first : block_rows.stop * BLOCK_ROWS].contiguous()
    column = 0
    for part, quantizer in zip(codes, quantizers, strict=True):
        columns, code = part.shape[1], code_of(quantizer)
        if columns:
            dequantize_kernel[(block_rows.stop - block_rows.start, -(-columns // columns_per_program))](
                part[block_rows].contiguous(), table_of(quantizer, scales.device), chosen, packed,
                columns, column, rows, packed.shape[1],
                BITS=code.bits, WINDOW_BITS=code.window_bits, DIMENSION=code.dimension, UNIT=code.unit,
                COLUMNS=columns_per_program, HALVES=halves, num_warps=columns_per_program // COLUMNS_PER_WARP,
            )  # fmt: skip
        column += columns
