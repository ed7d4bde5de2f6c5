"""The operators: one per quantizer family, and the rotation.

Registered under `torch.ops.qpc`, so that they survive `torch.compile` and `torch.export` as single nodes. Every linear operator takes its
activation already rotated. Accumulation is in float32 or better; results have the dtype of the activation. They are for inference: no
gradient is registered. Which implementation runs, and why another does not, is said by `qpc.kernels.select`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import cpu
from qpc.kernels.select import Implementation, supports, supports_rotation
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def _operator(function: F) -> F: ...

    def _fake(operator: object) -> Callable[[F], F]: ...

else:

    def _operator(function):
        """Register a function without side effects as the operator of its own name."""
        return torch.library.custom_op(f"qpc::{function.__name__}", function, mutates_args=())

    def _fake(operator):
        """Register what an operator returns when only shapes are known."""
        return operator.register_fake


@_operator
def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """Change signs, then apply a Hadamard transform to each block of the last axis: `H (s * x) / sqrt(block)`.

    x: [..., features], any float dtype. signs: packed as in `Rotation`, uint8 [ceil(features / 8)]. Returns the shape and dtype of `x`.
    Raises `KernelError` for malformed arguments or a device without an implementation.
    """
    check_rotation(x, signs, block)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if supports_rotation(block, x.device, x.dtype).require() is Implementation.TRITON:
        from qpc.kernels.hadamard import rotate as triton_rotate

        with torch.cuda.device(x.device):
            return triton_rotate(x, signs, block)
    return cpu.rotate(x, signs, block)


@_fake(rotate)
def _(x: Tensor, signs: Tensor, block: int) -> Tensor:
    check_rotation(x, signs, block)
    return x.new_empty(x.shape)


@_operator
def trellis_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, step_bits: list[int], window_bits: list[int], out_features: int
) -> Tensor:
    """Multiply by a trellis-coded weight: `x @ w.T + bias`.

    x: [..., in_features], already rotated. codes[i]: int32 [row_blocks, column_blocks_i, 16 * step_bits[i]], parts in the order of the
    input axis; the last block column may reach beyond `in_features`. scales: bfloat16 [row_blocks * 64]. bias: [out_features] or None.
    Returns [..., out_features] in the dtype of `x`. Raises `KernelError`.
    """
    return _linear(x, codes, scales, bias, trellis_parts(step_bits, window_bits), out_features)


@_fake(trellis_linear)
def _(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, step_bits: list[int], window_bits: list[int], out_features: int
) -> Tensor:
    return _fake_linear(x, codes, scales, bias, trellis_parts(step_bits, window_bits), out_features)


@_operator
def scalar_linear(x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], out_features: int) -> Tensor:
    """Multiply by a scalar-quantized weight: `x @ w.T + bias`.

    As `trellis_linear`, with codes[i] int32 [row_blocks, column_blocks_i, 32 * bits[i]].
    """
    return _linear(x, codes, scales, bias, scalar_parts(bits), out_features)


@_fake(scalar_linear)
def _(x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], out_features: int) -> Tensor:
    return _fake_linear(x, codes, scales, bias, scalar_parts(bits), out_features)


@_operator
def vector_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], dimension: int, out_features: int
) -> Tensor:
    """Multiply by a vector-quantized weight: `x @ w.T + bias`.

    As `trellis_linear`, with codes[i] int32 [row_blocks, column_blocks_i, 32 / dimension * bits[i]].
    """
    return _linear(x, codes, scales, bias, vector_parts(bits, dimension), out_features)


@_fake(vector_linear)
def _(x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], dimension: int, out_features: int) -> Tensor:
    return _fake_linear(x, codes, scales, bias, vector_parts(bits, dimension), out_features)


@_operator
def trellis_dequantize(
    codes: list[Tensor],
    scales: Tensor,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a trellis-coded weight: [out_features, in_features] of `dtype`, in the rotated basis."""
    return _dequantize(codes, scales, trellis_parts(step_bits, window_bits), out_features, in_features, dtype)


@_fake(trellis_dequantize)
def _(
    codes: list[Tensor],
    scales: Tensor,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return _fake_dequantize(codes, scales, trellis_parts(step_bits, window_bits), out_features, in_features, dtype)


@_operator
def scalar_dequantize(
    codes: list[Tensor], scales: Tensor, bits: list[int], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Decode a scalar-quantized weight: [out_features, in_features] of `dtype`, in the rotated basis."""
    return _dequantize(codes, scales, scalar_parts(bits), out_features, in_features, dtype)


@_fake(scalar_dequantize)
def _(codes: list[Tensor], scales: Tensor, bits: list[int], out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return _fake_dequantize(codes, scales, scalar_parts(bits), out_features, in_features, dtype)


@_operator
def vector_dequantize(
    codes: list[Tensor], scales: Tensor, bits: list[int], dimension: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Decode a vector-quantized weight: [out_features, in_features] of `dtype`, in the rotated basis."""
    return _dequantize(codes, scales, vector_parts(bits, dimension), out_features, in_features, dtype)


@_fake(vector_dequantize)
def _(
    codes: list[Tensor], scales: Tensor, bits: list[int], dimension: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return _fake_dequantize(codes, scales, vector_parts(bits, dimension), out_features, in_features, dtype)


def _linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: list[UniformQuantizer], out_features: int
) -> Tensor:
    """The multiplication by a weight of any family, on the device where it lies."""
    check_linear(x, codes, scales, bias, quantizers, out_features)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if supports(x.device, x.dtype).require() is Implementation.TRITON:
        from qpc.kernels import gpu

        with torch.cuda.device(x.device):
            return gpu.linear(x, codes, scales, bias, quantizers, out_features)
    return cpu.linear(x, codes, scales, bias, quantizers, out_features)


def _fake_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: list[UniformQuantizer], out_features: int
) -> Tensor:
    check_linear(x, codes, scales, bias, quantizers, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _dequantize(
    codes: list[Tensor], scales: Tensor, quantizers: list[UniformQuantizer], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The decoded weight of any family, on the device where it lies."""
    check_weight(codes, scales, quantizers, out_features, in_features)
    if supports(scales.device, dtype).require() is Implementation.TRITON:
        from qpc.kernels import gpu

        with torch.cuda.device(scales.device):
            return gpu.dequantize(codes, scales, quantizers, out_features, in_features, dtype)
    return cpu.dequantize(codes, scales, quantizers, out_features, in_features, dtype)


def _fake_dequantize(
    codes: list[Tensor], scales: Tensor, quantizers: list[UniformQuantizer], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    check_weight(codes, scales, quantizers, out_features, in_features)
    return scales.new_empty((out_features, in_features), dtype=dtype)


def trellis_parts(step_bits: list[int], window_bits: list[int]) -> list[UniformQuantizer]:
    """The quantizer of each part. Raises `KernelError` if the lists differ in length."""
    if len(step_bits) != len(window_bits):
        raise KernelError(f"packed weight: {step_bits=} and {window_bits=} must have one entry for each part")
    return [TrellisQuantizer(bits, window) for bits, window in zip(step_bits, window_bits, strict=True)]


def scalar_parts(bits: list[int]) -> list[UniformQuantizer]:
    """The quantizer of each part."""
    return [ScalarQuantizer(each) for each in bits]


def vector_parts(bits: list[int], dimension: int) -> list[UniformQuantizer]:
    """The quantizer of each part."""
    return [VectorQuantizer(dimension, each) for each in bits]


def check_rotation(x: Tensor, signs: Tensor, block: int) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise KernelError(f"rotate: {x.dtype=} must be a floating point dtype; convert the activation")
    if x.ndim == 0 or block < 1 or x.shape[-1] % block:
        raise KernelError(f"rotate: the last axis of x {tuple(x.shape)} must be divisible by {block=}")
    required = Rotation.bytes_for(x.shape[-1])
    if signs.dtype != torch.uint8 or signs.ndim != 1 or signs.shape[0] != required:
        raise KernelError(f"rotate: signs are {signs.dtype} {tuple(signs.shape)}, required uint8 ({required},)")
    if signs.device != x.device:
        raise KernelError(f"rotate: signs are on {signs.device}, x is on {x.device}; move them to one device")


def check_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: list[UniformQuantizer], out_features: int
) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    if x.ndim == 0 or x.dtype not in ACTIVATION_DTYPES:
        raise KernelError(f"linear: x is {x.dtype} {tuple(x.shape)}, required a floating point [..., in_features]")
    check_weight(codes, scales, quantizers, out_features, x.shape[-1])
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != out_features or bias.dtype not in ACTIVATION_DTYPES):
        raise KernelError(f"linear: bias is {bias.dtype} {tuple(bias.shape)}, required floating point ({out_features},)")
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"linear: {name} is on {tensor.device}, x is on {x.device}; move them to one device")


def check_weight(codes: list[Tensor], scales: Tensor, quantizers: list[UniformQuantizer], out_features: int, in_features: int) -> None:
    """Raise `KernelError` unless the parts form a packed weight [out_features, in_features]."""
    if not codes or len(codes) != len(quantizers):
        raise KernelError(f"packed weight: {len(codes)} code tensors for {len(quantizers)} parts; required one or more of each")
    rows = row_blocks(out_features)
    for index, (code, quantizer) in enumerate(zip(codes, quantizers, strict=True)):
        if code.dtype != torch.int32 or code.ndim != 3 or code.shape[0] != rows or code.shape[2] != quantizer.block_words:
            shape = f"({rows}, block columns, {quantizer.block_words})"
            raise KernelError(f"packed weight: codes[{index}] is {code.dtype} {tuple(code.shape)}, required int32 {shape} for {quantizer}")
        if code.device != scales.device:
            raise KernelError(f"packed weight: codes[{index}] is on {code.device}, scales on {scales.device}; move them to one device")
    columns = sum(code.shape[1] for code in codes)
    if columns != column_blocks(in_features):
        raise KernelError(
            f"packed weight: {columns} block columns of {BLOCK_COLUMNS} do not fit {in_features=}; required {column_blocks(in_features)}"
        )
    if scales.dtype != torch.bfloat16 or scales.ndim != 1 or scales.shape[0] != rows * BLOCK_ROWS:
        raise KernelError(f"packed weight: scales are {scales.dtype} {tuple(scales.shape)}, required bfloat16 ({rows * BLOCK_ROWS},)")
