"""The functions of the domain `qpc` in an exported model: decoding and rotating, in standard operators of ONNX alone.

A runtime that knows nothing of qpc expands them; one that has an operator of the same domain, name, inputs and attributes may run that
instead. Activations, tables and results are float32. `qpc.quant` defines what they compute: `layout` the order of weights in a block,
`bitstring` that of bits in words, `codebook` the trellis code, `rotation` the transform.

A code is told by three things: `step_bits`, the bits of an index; `window_bits`, how many of them are read, which is more where windows
overlap (a trellis) and the same where they do not; and a table float32 [2^window_bits, dimension], the `dimension` weights (1, 2 or 4) that
each window stands for.
"""
# mypy: ignore-errors
# What onnxscript reads below is a language of its own in Python's syntax.

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxscript import BFLOAT16, FLOAT, INT8, INT32, INT64, UINT8, UINT64, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from qpc.quant.codebook import DIRECTIONS, MULTIPLIERS, START

OPSET = 18
"""Version of the standard operators: the first with bitwise ones."""

DOMAIN, VERSION = "qpc", 1
QPC = Opset(DOMAIN, VERSION)

_LOW_WORD = 0xFFFFFFFF
_FLOAT, _INT32, _INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
_UINT8, _UINT32, _UINT64 = TensorProto.UINT8, TensorProto.UINT32, TensorProto.UINT64


def _constant(value: object, dtype: type) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype=dtype))


_MULTIPLIERS = _constant(MULTIPLIERS, np.int64)
_DIRECTIONS = _constant(DIRECTIONS, np.float32)
_START = _constant(START, np.int64)
_MASK = _constant(_LOW_WORD, np.int64)
_BYTES = _constant([0, 8, 16, 24], np.uint32)
_BYTE = _constant(0xFF, np.uint32)
_SIGN = _constant(0x80, np.uint32)
_BITS = _constant(range(8), np.uint8)
_BIT = _constant(1, np.uint8)
_WORD = _constant(32, np.uint64)
_ONE = _constant(1, np.uint64)


@script(QPC, default_opset=op)
def trellis_codebook(words: int, window_bits: int, unit: float) -> FLOAT:
    """The table of a trellis code: float32 [2^window_bits, 2].

    words: how many words a window is hashed to, 1 or 2. unit: what a code value is multiplied by.
    """
    count = op.Constant(value_int=words)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    width = op.Cast(op.Constant(value_int=window_bits), to=_UINT64)
    size = op.Cast(op.BitShift(op.Constant(value=_ONE), width, direction="LEFT"), to=_INT64)
    windows = op.BitwiseOr(op.Range(zero, size, one), op.Constant(value=_START))
    multipliers = op.Slice(op.Constant(value=_MULTIPLIERS), op.Constant(value_ints=[0]), op.Reshape(count, op.Constant(value_ints=[1])))
    product = op.Unsqueeze(windows, op.Constant(value_ints=[1])) * multipliers
    hashed = op.Cast(op.BitwiseAnd(product, op.Constant(value=_MASK)), to=_UINT32)
    shifted = op.BitShift(op.Unsqueeze(hashed, op.Constant(value_ints=[2])), op.Constant(value=_BYTES), direction="RIGHT")
    flipped = op.BitwiseXor(op.BitwiseAnd(shifted, op.Constant(value=_BYTE)), op.Constant(value=_SIGN))
    signed = op.Cast(flipped, to=_FLOAT) - op.Constant(value_float=128.0)
    directions = op.Slice(op.Constant(value=_DIRECTIONS), op.Constant(value_ints=[0]), op.Reshape(count, op.Constant(value_ints=[1])))
    steps = op.Reshape(directions, op.Constant(value_ints=[-1, 2]))
    return op.MatMul(op.Flatten(signed, axis=1), steps) * op.Constant(value_float=unit)


@script(QPC, default_opset=op)
def word_pairs(codes: INT32) -> UINT64:
    """Each word of circular strings with the next above it: int32 [..., words] -> uint64 of that shape."""
    words = op.Cast(op.BitwiseAnd(op.Cast(codes, to=_INT64), op.Constant(value=_MASK)), to=_UINT64)
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    last, axis = op.Constant(value_ints=[2147483647]), op.Constant(value_ints=[-1])
    following = op.Concat(op.Slice(words, second, last, axis), op.Slice(words, first, second, axis), axis=-1)
    return op.BitwiseOr(words, op.BitShift(following, op.Constant(value=_WORD), direction="LEFT"))


@script(QPC, default_opset=op)
def decode(codes: INT32, table: FLOAT, step_bits: int, window_bits: int) -> FLOAT:
    """Weights before their scales, transposed.

    codes: int32 [row_blocks, column_blocks, words]. Returns float32 [column_blocks * 16, row_blocks * 64].
    """
    zero, one, two = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
    dimension = op.Squeeze(op.Shape(table, start=1, end=2))
    # Along each axis of a block, where its weights are: column = 8 half + 2 lane + odd, row = 16 tile + 8 below + group.
    half = op.Constant(value_ints=[0, 4])
    lane = op.Constant(value_ints=[0, 32, 64, 96])
    tile = op.Constant(value_ints=[0, 8, 16, 24])
    group = op.Constant(value_ints=[0, 128, 256, 384, 512, 640, 768, 896])
    columns = op.Unsqueeze(half, op.Constant(value_ints=[1])) + lane
    # A window holds neighbouring columns, then rows 8 apart: it is read once for all of them.
    odd = op.Range(zero, two, op.Min(dimension, two))
    below = op.Range(zero, two, op.Max(dimension / two, one)) * two
    by_column = op.Reshape(columns, op.Constant(value_ints=[8, 1])) + odd
    by_row = op.Unsqueeze(op.Unsqueeze(tile, op.Constant(value_ints=[1])) + below, op.Constant(value_ints=[2])) + group
    place = op.Unsqueeze(by_column, op.Constant(value_ints=[2, 3, 4])) + by_row
    bit = place / dimension * op.Constant(value_int=step_bits)
    bits = op.Constant(value_int=32)
    turned = op.Transpose(codes, perm=[1, 0, 2])
    picked = op.Gather(word_pairs(turned), bit / bits, axis=2)
    shifted = op.BitShift(picked, op.Cast(op.Mod(bit, bits), to=_UINT64), direction="RIGHT")
    unit = op.Constant(value=_ONE)
    mask = op.BitShift(unit, op.Cast(op.Constant(value_int=window_bits), to=_UINT64), direction="LEFT") - unit
    windows = op.Cast(op.BitwiseAnd(shifted, mask), to=_INT32)
    across = op.Reshape(op.Constant(value_ints=[0, 1]), op.Constant(value_ints=[2, 1, 1, 1]))
    down = op.Reshape(op.Constant(value_ints=[0, 2]), op.Constant(value_ints=[2, 1]))
    member = op.Cast(op.Mod(across + down, dimension), to=_INT32)
    index = windows * op.Cast(dimension, to=_INT32) + member
    values = op.Gather(op.Reshape(table, op.Constant(value_ints=[-1])), index)
    blocks = op.Transpose(op.Reshape(values, op.Constant(value_ints=[0, 0, 16, 64])), perm=[0, 2, 1, 3])
    height = op.Shape(codes, start=0, end=1) * op.Constant(value_ints=[64])
    return op.Reshape(blocks, op.Concat(op.Constant(value_ints=[-1]), height, axis=0))


@script(QPC, default_opset=op)
def scaled(y: FLOAT, scales: BFLOAT16, bias: FLOAT, out_features: int) -> FLOAT:
    """What a multiplication by unscaled rows [..., row_blocks * 64] lacks: scales, the cut to the rows that there are, bias."""
    end = op.Reshape(op.Constant(value_int=out_features), op.Constant(value_ints=[1]))
    rows = op.Slice(y * op.Cast(scales, to=_FLOAT), op.Constant(value_ints=[0]), end, op.Constant(value_ints=[-1]))
    return rows + bias


@script(QPC, default_opset=op)
def padded(x: FLOAT, blocks: INT64) -> FLOAT:
    """An activation with zeros behind it, so that it fills so many block columns: [..., in_features] -> [..., blocks * 16]."""
    axis = op.Constant(value_ints=[-1])
    missing = blocks * op.Constant(value_ints=[16]) - op.Shape(x, start=-1)
    return op.Pad(x, op.Concat(op.Constant(value_ints=[0]), missing, axis=0), op.Constant(value_float=0.0), axis)


@script(QPC, default_opset=op)
def packed_linear(
    x: FLOAT,
    codes: INT32,
    table: FLOAT,
    scales: BFLOAT16,
    bias: FLOAT,
    step_bits: int,
    window_bits: int,
    out_features: int,
) -> FLOAT:
    """Multiply by a packed weight: `x @ w.T + bias`, float32 [..., in_features] -> [..., out_features].

    x: rotated already. codes: int32 [row_blocks, column_blocks, words]. table: of the code. scales: bfloat16 [row_blocks * 64].
    bias: float32 [out_features], or a zero [1].
    """
    wide = padded(x, op.Shape(codes, start=1, end=2))
    unit = decode(codes, table, step_bits=step_bits, window_bits=window_bits)
    return scaled(op.MatMul(wide, unit), scales, bias, out_features=out_features)


@script(QPC, default_opset=op)
def mixed_linear(
    x: FLOAT,
    codes0: INT32,
    table0: FLOAT,
    codes1: INT32,
    table1: FLOAT,
    scales: BFLOAT16,
    bias: FLOAT,
    step_bits0: int,
    window_bits0: int,
    step_bits1: int,
    window_bits1: int,
    out_features: int,
) -> FLOAT:
    """`packed_linear` with a weight of two rates, whose parts follow each other along the input axis."""
    blocks = op.Shape(codes0, start=1, end=2)
    wide = padded(x, blocks + op.Shape(codes1, start=1, end=2))
    border = blocks * op.Constant(value_ints=[16])
    first, last, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2147483647]), op.Constant(value_ints=[-1])
    unit0 = decode(codes0, table0, step_bits=step_bits0, window_bits=window_bits0)
    unit1 = decode(codes1, table1, step_bits=step_bits1, window_bits=window_bits1)
    left = op.MatMul(op.Slice(wide, first, border, axis), unit0)
    right = op.MatMul(op.Slice(wide, border, last, axis), unit1)
    return scaled(left + right, scales, bias, out_features=out_features)


@script(QPC, default_opset=op)
def packed_lookup(
    indices: INT64,
    codes: INT32,
    table: FLOAT,
    scales: BFLOAT16,
    step_bits: int,
    window_bits: int,
) -> FLOAT:
    """Rows of a packed table, decoded without their neighbours: int64 [...] -> float32 [..., column_blocks * 16]."""
    dimension = op.Squeeze(op.Shape(table, start=1, end=2))
    height, below, tile, bits = op.Constant(value_int=64), op.Constant(value_int=8), op.Constant(value_int=16), op.Constant(value_int=32)
    flat = op.Reshape(indices, op.Constant(value_ints=[-1, 1]))
    row = op.Mod(flat, height)
    half = op.Constant(value_ints=[0, 1, 32, 33, 64, 65, 96, 97])
    columns = op.Concat(half, half + op.Constant(value_int=4), axis=0)
    at_row = op.Mod(row, below) * op.Constant(value_int=128) + op.Mod(row / below, op.Constant(value_int=2)) * op.Constant(value_int=2)
    place = row / tile * below + at_row + columns
    bit = op.Unsqueeze(place / dimension * op.Constant(value_int=step_bits), op.Constant(value_ints=[1]))
    strings = op.Gather(codes, op.Squeeze(flat / height, op.Constant(value_ints=[1])), axis=0)
    ones = op.Constant(value_ints=[1])
    spread = op.Concat(ones, op.Shape(codes, start=1, end=2), ones, axis=0)
    picked = op.GatherElements(word_pairs(strings), op.Expand(bit / bits, spread), axis=2)
    shifted = op.BitShift(picked, op.Cast(op.Mod(bit, bits), to=_UINT64), direction="RIGHT")
    unit = op.Constant(value=_ONE)
    mask = op.BitShift(unit, op.Cast(op.Constant(value_int=window_bits), to=_UINT64), direction="LEFT") - unit
    windows = op.Cast(op.BitwiseAnd(shifted, mask), to=_INT64)
    member = op.Unsqueeze(op.Mod(place, dimension), op.Constant(value_ints=[1]))
    values = op.Gather(op.Reshape(table, op.Constant(value_ints=[-1])), windows * dimension + member)
    scale = op.Cast(op.Gather(scales, op.Squeeze(flat, op.Constant(value_ints=[1]))), to=_FLOAT)
    rows = op.Flatten(values, axis=1) * op.Unsqueeze(scale, op.Constant(value_ints=[1]))
    return op.Reshape(rows, op.Concat(op.Shape(indices), op.Constant(value_ints=[-1]), axis=0))


@script(QPC, default_opset=op)
def sign_vector(signs: UINT8, features: INT64) -> FLOAT:
    """Packed sign bits, the least significant first, as +1 and -1: float32 [features]."""
    column = op.Unsqueeze(signs, op.Constant(value_ints=[1]))
    bits = op.BitwiseAnd(op.BitShift(column, op.Constant(value=_BITS), direction="RIGHT"), op.Constant(value=_BIT))
    flat = op.Reshape(op.Cast(bits, to=_FLOAT), op.Constant(value_ints=[-1]))
    cut = op.Slice(flat, op.Constant(value_ints=[0]), features)
    return op.Constant(value_float=1.0) - op.Constant(value_float=2.0) * cut


@script(QPC, default_opset=op)
def rotate(x: FLOAT, signs: UINT8, left: INT8, right: INT8, unit: float) -> FLOAT:
    """Change signs, then multiply each block by a Hadamard matrix: `unit * H (s * x)`, H being left (kron) right.

    x: float32 [..., features]. signs: uint8 [ceil(features / 8)]. left, right: int8 [n, n] and [m, m], the block being n m.
    unit: 1 / sqrt(n m).
    """
    changed = x * sign_vector(signs, op.Shape(x, start=-1))
    shape = op.Concat(op.Constant(value_ints=[-1]), op.Shape(left, start=0, end=1), op.Shape(right, start=0, end=1), axis=0)
    blocks = op.Reshape(changed, shape)
    inner = op.MatMul(blocks, op.Transpose(op.Cast(right, to=_FLOAT), perm=[1, 0]))
    outer = op.MatMul(op.Cast(left, to=_FLOAT), inner)
    return op.Reshape(outer, op.Shape(x)) * op.Constant(value_float=unit)


@script(QPC, default_opset=op)
def unrotate(x: FLOAT, signs: UINT8, left: INT8, right: INT8, unit: float) -> FLOAT:
    """The inverse of `rotate`: `s * (unit * H^T x)`."""
    shape = op.Concat(op.Constant(value_ints=[-1]), op.Shape(left, start=0, end=1), op.Shape(right, start=0, end=1), axis=0)
    blocks = op.Reshape(x, shape)
    inner = op.MatMul(blocks, op.Cast(right, to=_FLOAT))
    outer = op.MatMul(op.Transpose(op.Cast(left, to=_FLOAT), perm=[1, 0]), inner)
    return op.Reshape(outer, op.Shape(x)) * op.Constant(value_float=unit) * sign_vector(signs, op.Shape(x, start=-1))
