"""How the benchmarks call what they time: one place to change when a kernel does."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.weights import RandomWeight
from qpc.kernels import fused, gpu, ops
from qpc.kernels.operand import pack_operand

Call = Callable[[], Tensor]

OPERANDS = hasattr(torch.ops.qpc, "rotate_operand") and hasattr(torch.ops.qpc, "norm_operand")
"""Whether the transforms that write the operand of that multiplication are there."""


def multiplications(weights: list[RandomWeight], x: Tensor) -> list[Call]:
    """One product `x @ w.T` for each weight, [batch, out_features] in the dtype of x.

    x: [batch, in_features], already rotated. Where integer tensor cores multiply, it becomes their operand beforehand: that is what a
    rotation leaves there.
    """
    if fused.supports(list(weights[0].parts), len(x), x.dtype, x.device).implementation is not None:
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
