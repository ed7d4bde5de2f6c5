"""How the benchmarks call what they time: one place to change when a kernel does."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.weights import RandomWeight
from qpc.kernels import gpu, ops
from qpc.kernels.launch import MAX_BATCH

Call = Callable[[], Tensor]

FUSED = find_spec("qpc.kernels.fused") is not None
"""Whether the multiplication on integer tensor cores is there; else trellis weights take the way of the others."""

OPERANDS = hasattr(torch.ops.qpc, "rotate_operand") and hasattr(torch.ops.qpc, "norm_operand")
"""Whether the transforms that write the operand of that multiplication are there."""


def multiplications(weights: list[RandomWeight], x: Tensor) -> list[Call]:
    """One product `x @ w.T` for each weight, [batch, out_features] in the dtype of x, with whatever x becomes made beforehand.

    x: [batch, in_features], already rotated.
    """
    if FUSED and x.is_cuda and len(x) <= MAX_BATCH and weights[0].parts[0].family == "trellis":
        from qpc.kernels import fused
        from qpc.kernels.operand import pack_operand

        words, scales = pack_operand(x)
        return [
            partial(fused.multiply, words, scales, list(w.codes), w.scales, None, list(w.parts), w.out_features, x.dtype) for w in weights
        ]
    return [partial(gpu.linear, x, list(w.codes), w.scales, None, list(w.parts), w.out_features) for w in weights]


def dequantizations(weights: list[RandomWeight], dtype: torch.dtype) -> list[Call]:
    """One decoded weight for each: [out_features, in_features]."""
    return [partial(gpu.dequantize, list(w.codes), w.scales, list(w.parts), w.out_features, w.in_features, dtype) for w in weights]


def rotation(x: Tensor, signs: Tensor, block: int) -> Call:
    """`qpc::rotate`."""
    return partial(ops.rotate, x, signs, block)


def rotate_operand(x: Tensor, signs: Tensor, block: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """`qpc::rotate_operand`: words and scales of the operand."""
    return partial(torch.ops.qpc.rotate_operand, x, signs, block)


def norm_operand(x: Tensor, weight: Tensor, epsilon: float, signs: Tensor, block: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """`qpc::norm_operand` without a residual: the same behind RMSNorm."""

    def call() -> tuple[Tensor, Tensor]:
        *_, words, scales = torch.ops.qpc.norm_operand(x, None, weight, epsilon, 0.0, signs, block)
        return words, scales

    return call
