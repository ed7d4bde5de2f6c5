"""The operators of packed stacks of experts: one per quantizer family.

A stack is packed as one matrix, its experts below each other, each with whole blocks of rows; so the packed weight of an expert is a range
of block rows. Activations come already rotated, as for the operators of `qpc.kernels.ops`.

On a GPU the packed rows of the experts that are needed go through the kernels of those operators: row by row if there are few, with a copy
of the codes (not of decoded weights), so that nothing waits for the routing; else expert by expert, which waits for it once. One launch for
all experts would save launches and the copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import cpu
from qpc.kernels.ops import ACTIVATION_DTYPES, check_weight, scalar_parts, trellis_parts, vector_parts
from qpc.kernels.select import Implementation, supports
from qpc.quant.experts import FEW_ROWS, by_row, rows_of_experts
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.quantizer import UniformQuantizer


@torch.library.custom_op("qpc::trellis_expert_linear", mutates_args=())
def trellis_expert_linear(
    x: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    expert: Tensor,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    experts: int,
) -> Tensor:
    """Multiply each row by the trellis-coded matrix of its expert: `y[r] = w[expert[r]] @ x[r]`.

    x: [rows, in_features], already rotated. codes[i]: int32 [experts * row_blocks, column_blocks_i, 16 * step_bits[i]]; scales: bfloat16
    [experts * out_features]; both as `trellis_linear` has them for all experts below each other. expert: int64 [rows], from 0 to
    experts - 1, in any order. out_features: of each expert, a multiple of 64.
    Returns [rows, out_features] in the dtype of `x`. Raises `KernelError`.
    """
    return _expert_linear(x, codes, scales, expert, trellis_parts(step_bits, window_bits), out_features, experts)


@trellis_expert_linear.register_fake
def _(
    x: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    expert: Tensor,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    experts: int,
) -> Tensor:
    return _fake_expert_linear(x, codes, scales, expert, trellis_parts(step_bits, window_bits), out_features, experts)


@torch.library.custom_op("qpc::scalar_expert_linear", mutates_args=())
def scalar_expert_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, bits: list[int], out_features: int, experts: int
) -> Tensor:
    """As `trellis_expert_linear`, with codes[i] int32 [experts * row_blocks, column_blocks_i, 32 * bits[i]]."""
    return _expert_linear(x, codes, scales, expert, scalar_parts(bits), out_features, experts)


@scalar_expert_linear.register_fake
def _(x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, bits: list[int], out_features: int, experts: int) -> Tensor:
    return _fake_expert_linear(x, codes, scales, expert, scalar_parts(bits), out_features, experts)


@torch.library.custom_op("qpc::vector_expert_linear", mutates_args=())
def vector_expert_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, bits: list[int], dimension: int, out_features: int, experts: int
) -> Tensor:
    """As `trellis_expert_linear`, with codes[i] int32 [experts * row_blocks, column_blocks_i, 32 / dimension * bits[i]]."""
    return _expert_linear(x, codes, scales, expert, vector_parts(bits, dimension), out_features, experts)


@vector_expert_linear.register_fake
def _(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, bits: list[int], dimension: int, out_features: int, experts: int
) -> Tensor:
    return _fake_expert_linear(x, codes, scales, expert, vector_parts(bits, dimension), out_features, experts)


def _expert_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, quantizers: list[UniformQuantizer], out_features: int, experts: int
) -> Tensor:
    """The multiplication by a stack of any family, on the device where it lies."""
    check_experts(x, codes, scales, expert, quantizers, out_features, experts)
    if expert.shape != x.shape[:1]:
        raise KernelError(f"expert_linear: {len(x)} rows and {len(expert)} experts of rows; required as many")
    if x.numel() == 0:
        return x.new_empty((len(x), out_features))
    if supports(x.device, x.dtype).require() is Implementation.TRITON:
        with torch.cuda.device(x.device):
            return _on_gpu(x, codes, scales, expert, quantizers, out_features, experts)
    return cpu.expert_linear(x, codes, scales, expert, quantizers, out_features, experts)


def _fake_expert_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, quantizers: list[UniformQuantizer], out_features: int, experts: int
) -> Tensor:
    check_experts(x, codes, scales, expert, quantizers, out_features, experts)
    return x.new_empty((x.shape[0], out_features))


def _on_gpu(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, quantizers: list[UniformQuantizer], out_features: int, experts: int
) -> Tensor:
    from qpc.kernels import gpu

    def multiply(x: Tensor, codes: list[Tensor], scales: Tensor) -> Tensor:
        return gpu.linear(x, codes, scales, None, quantizers, out_features)

    multiply_all = row_by_row if by_row(x) else expert_by_expert
    return multiply_all(x, codes, scales, expert, out_features, experts, multiply)


Multiply = Callable[[Tensor, list[Tensor], Tensor], Tensor]
"""`multiply(x [rows, in_features], codes, scales) -> [rows, out_features]`, by the packed weight of one expert."""


def row_by_row(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, out_features: int, experts: int, multiply: Multiply
) -> Tensor:
    """Each row by a copy of the packed weight of its expert; the copies of `FEW_ROWS` are in memory at once."""
    out = x.new_empty((len(x), out_features))
    for start in range(0, len(x), FEW_ROWS):
        chosen = expert[start : start + FEW_ROWS].clamp(max=experts - 1)
        copies = [code.view(experts, -1, *code.shape[1:])[chosen] for code in codes]
        scales_of = scales.view(experts, -1)[chosen]
        for number in range(len(chosen)):
            row = slice(start + number, start + number + 1)
            out[row] = multiply(x[row], [copy[number] for copy in copies], scales_of[number])
    return out


def expert_by_expert(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, out_features: int, experts: int, multiply: Multiply
) -> Tensor:
    """The rows of each expert at once."""
    out = x.new_zeros((len(x), out_features))
    stacks, scales_of = [code.view(experts, -1, *code.shape[1:]) for code in codes], scales.view(experts, -1)
    for index, rows in rows_of_experts(expert, experts):
        out[rows] = multiply(x[rows], [stack[index] for stack in stacks], scales_of[index])
    return out


def check_experts(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, quantizers: list[UniformQuantizer], out_features: int, experts: int
) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    if x.ndim != 2 or x.dtype not in ACTIVATION_DTYPES:
        raise KernelError(f"expert_linear: x is {x.dtype} {tuple(x.shape)}, required a floating point [rows, in_features]")
    if expert.ndim != 1 or expert.dtype != torch.int64:
        raise KernelError(f"expert_linear: the experts of the rows are {expert.dtype} {tuple(expert.shape)}, required int64 [rows]")
    if experts < 1 or out_features % BLOCK_ROWS:
        raise KernelError(f"expert_linear: {experts=} must be positive and {out_features=} of each divisible by {BLOCK_ROWS}")
    check_weight(codes, scales, quantizers, experts * out_features, x.shape[1])
    for name, tensor in (("scales", scales), ("expert", expert)):
        if tensor.device != x.device:
            raise KernelError(f"expert_linear: {name} is on {tensor.device}, x is on {x.device}; move them to one device")
