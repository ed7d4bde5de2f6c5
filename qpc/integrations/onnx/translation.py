"""What each operator of `torch.ops.qpc` becomes in an exported graph: calls of the functions of `functions`."""
# mypy: disallow-untyped-calls=False

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.defs import OpSchema
from onnxscript import BFLOAT16, FLOAT, INT32, INT64, UINT8
from onnxscript import opset18 as op
from onnxscript.values import OnnxFunction, Op

from qpc.integrations.onnx import functions
from qpc.kernels import linear, lookup  # noqa: F401 - importing them registers torch.ops.qpc
from qpc.kernels.ops import scalar_parts, trellis_parts, vector_parts
from qpc.quant import vector
from qpc.quant.codebook import hash_words
from qpc.quant.hadamard import factors, hadamard_matrix
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.scalar import ScalarQuantizer, levels
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


def operator(function: OnnxFunction[..., Any]) -> Op:
    """An operator with the signature of a function: a call of it stays a call, while the exporter expands functions."""
    body = function.function_ir
    inputs, outputs = ([_parameter(value) for value in values] for values in (body.inputs, body.outputs))
    attributes = [OpSchema.Attribute(name, getattr(OpSchema.AttrType, each.type.name)) for name, each in body.attributes.items()]
    schema = OpSchema(function.name, functions.DOMAIN, functions.VERSION, inputs=inputs, outputs=outputs, attributes=attributes)
    return Op(functions.QPC, function.name, schema)


def _parameter(value: ir.Value) -> OpSchema.FormalParameter:
    assert value.name is not None and value.dtype is not None
    return OpSchema.FormalParameter(value.name, f"tensor({value.dtype.name.lower()})")


_CODEBOOK = operator(functions.trellis_codebook)
_ROTATE, _UNROTATE = operator(functions.rotate), operator(functions.unrotate)
_LINEAR, _MIXED, _LOOKUP = operator(functions.packed_linear), operator(functions.mixed_linear), operator(functions.packed_lookup)


def rotate(x: FLOAT, signs: UINT8, block: int) -> FLOAT:
    """`qpc::rotate`."""
    left, right = hadamard_pair(block)
    result: FLOAT = _ROTATE(x, signs, op.Constant(value=left), op.Constant(value=right), unit=1 / math.sqrt(block))
    return result


def trellis_linear(
    x: FLOAT,
    codes: Sequence[INT32],
    scales: BFLOAT16,
    bias: FLOAT | None,
    step_bits: Sequence[int],
    window_bits: Sequence[int],
    out_features: int,
) -> FLOAT:
    """`qpc::trellis_linear`."""
    return _linear(x, codes, scales, bias, trellis_parts(list(step_bits), list(window_bits)), out_features)


def scalar_linear(x: FLOAT, codes: Sequence[INT32], scales: BFLOAT16, bias: FLOAT | None, bits: Sequence[int], out_features: int) -> FLOAT:
    """`qpc::scalar_linear`."""
    return _linear(x, codes, scales, bias, scalar_parts(list(bits)), out_features)


def vector_linear(
    x: FLOAT, codes: Sequence[INT32], scales: BFLOAT16, bias: FLOAT | None, bits: Sequence[int], dimension: int, out_features: int
) -> FLOAT:
    """`qpc::vector_linear`."""
    return _linear(x, codes, scales, bias, vector_parts(list(bits), dimension), out_features)


def trellis_lookup(
    indices: INT64,
    codes: Sequence[INT32],
    scales: BFLOAT16,
    signs: UINT8,
    block: int,
    step_bits: Sequence[int],
    window_bits: Sequence[int],
    rows: int,
    features: int,
    dtype: int,
) -> FLOAT:
    """`qpc::trellis_lookup`."""
    return _lookup(indices, codes, scales, signs, block, trellis_parts(list(step_bits), list(window_bits)), features)


def scalar_lookup(
    indices: INT64,
    codes: Sequence[INT32],
    scales: BFLOAT16,
    signs: UINT8,
    block: int,
    bits: Sequence[int],
    rows: int,
    features: int,
    dtype: int,
) -> FLOAT:
    """`qpc::scalar_lookup`."""
    return _lookup(indices, codes, scales, signs, block, scalar_parts(list(bits)), features)


def _lookup(
    indices: Any, codes: Sequence[Any], scales: Any, signs: Any, block: int, parts: Sequence[UniformQuantizer], features: int
) -> FLOAT:
    pieces = []
    for part, code in zip(parts, codes, strict=True):
        step, window = bits_of(part)
        pieces.append(_LOOKUP(indices, code, table(part), scales, step_bits=step, window_bits=window))
    border: list[Any] = [op.Constant(value_ints=[each]) for each in (0, features, -1)]
    joined: Any = op.Concat(*pieces, axis=-1)
    rows: FLOAT = op.Slice(joined, *border)
    if not block:
        return rows
    left, right = hadamard_pair(block)
    result: FLOAT = _UNROTATE(rows, signs, op.Constant(value=left), op.Constant(value=right), unit=1 / math.sqrt(block))
    return result


def _linear(x: Any, codes: Sequence[Any], scales: Any, bias: Any | None, parts: Sequence[UniformQuantizer], out_features: int) -> FLOAT:
    added = op.Constant(value=_ZERO) if bias is None else bias
    tables = [table(part) for part in parts]
    if len(parts) == 1:
        step, window = bits_of(parts[0])
        result: FLOAT = _LINEAR(x, codes[0], tables[0], scales, added, step_bits=step, window_bits=window, out_features=out_features)
        return result
    (step0, window0), (step1, window1) = map(bits_of, parts)
    mixed: FLOAT = _MIXED(
        x,
        codes[0],
        tables[0],
        codes[1],
        tables[1],
        scales,
        added,
        step_bits0=step0,
        window_bits0=window0,
        step_bits1=step1,
        window_bits1=window1,
        out_features=out_features,
    )
    return mixed


def bits_of(part: UniformQuantizer) -> tuple[int, int]:
    """Bits of an index, and how many of them a window has."""
    match part:
        case TrellisQuantizer(step_bits, window_bits):
            return step_bits, window_bits
        case ScalarQuantizer(bits) | VectorQuantizer(_, bits):
            return bits, bits
    raise AssertionError(f"{part} has no function")


def table(part: UniformQuantizer) -> Any:
    """The table of a code: computed in the graph for a trellis, a constant for the others."""
    match part:
        case TrellisQuantizer(step_bits, window_bits):
            return _CODEBOOK(words=hash_words(step_bits, window_bits), window_bits=window_bits, unit=part.unit)
        case ScalarQuantizer(bits):
            return op.Constant(value=_proto(levels(bits)[:, None].numpy()))
        case VectorQuantizer(dimension, bits):
            return op.Constant(value=_proto(vector.codebook(dimension, bits).numpy()))
    raise AssertionError(f"{part} has no function")


@cache
def hadamard_pair(block: int) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    """Two matrices of +1 and -1, int8, of nearly equal size, whose Kronecker product is the Hadamard matrix of a block."""
    base, power = factors(block)
    right = 1 << min(power.bit_length() - 1, max(0, round(math.log2(block) / 2)))
    left = np.kron(hadamard_matrix(base).numpy(), hadamard_matrix(power // right).numpy())
    return _proto(left), _proto(hadamard_matrix(right).numpy())


def _proto(value: NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(value)


_ZERO = _proto(np.zeros(1, dtype=np.float32))

TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.qpc.rotate.default: rotate,
    torch.ops.qpc.trellis_linear.default: trellis_linear,
    torch.ops.qpc.scalar_linear.default: scalar_linear,
    torch.ops.qpc.vector_linear.default: vector_linear,
    torch.ops.qpc.trellis_lookup.default: trellis_lookup,
    torch.ops.qpc.scalar_lookup.default: scalar_lookup,
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
