"""How the benchmarks call what they time: one place to change when a kernel does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.weights import RandomWeight
from qpc.kernels import fused, gpu, operand_ops, ops
from qpc.kernels.fused import Copies, Finish
from qpc.kernels.gate import Activation
from qpc.kernels.operand import operand_rows, pack_operand
from qpc.kernels.warpgroup import ROWS, Product, in_cores
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.rotation import Rotation

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """A way of multiplying on integer tensor cores; by default the one that the operators take.

    finish, registers: None is what plans say; other registers are those of plans that have `fused.REGISTERS`. copies: in pieces with the
    deepest ring that has room.
    """

    product: Product = Product.MMA
    finish: Finish | None = None
    registers: int | None = None
    copies: Copies = Copies.BULK

    def takes(self, batch: int) -> bool:
        """Whether it multiplies so many rows."""
        return self.product is Product.MMA or operand_rows(batch) in ROWS

    @property
    def columns(self) -> dict[str, str | int]:
        """Columns of a row of results, none for the default."""
        if self == DEFAULT:
            return {}
        columns: dict[str, str | int] = {"product": str(self.product), "finish": str(self.finish or "as plans say")}
        columns |= {} if self.copies is Copies.BULK else {"copies": str(self.copies)}
        return columns | ({} if self.registers is None else {"registers": self.registers})

    def of(self, cut: fused.Plan, step_bits: int, operand_rows: int) -> fused.Plan:
        """A plan with what this varies. step_bits: the most of a part."""
        registers = self.registers if self.registers is not None and cut.registers == fused.REGISTERS else cut.registers
        varied = replace(cut, product=self.product, finish=self.finish or cut.finish, registers=registers, copies=self.copies)
        if self.copies is Copies.BULK:
            return varied
        room = fused.SHARED_BYTES // min(varied.resident, 2) - fused.RESERVED_BYTES
        deep = (replace(varied, stages=stages) for stages in fused.PIECE_STAGES)
        return next(each for each in deep if each.stages == 2 or fused.program_bytes(each, step_bits, operand_rows) <= room)


DEFAULT = Variant()


def reads_operand(parts: Sequence[UniformQuantizer], x: Tensor) -> bool:
    """Whether a product with a weight of these parts is made on integer tensor cores here. x: [batch, in_features]."""
    return fused.supports(parts, len(x), x.dtype, x.device).implementation is not None


def multiplications(weights: list[RandomWeight], x: Tensor, variant: Variant = DEFAULT) -> list[Call]:
    """One product `x @ w.T` for each weight, [batch, out_features] in the dtype of x, with whatever x becomes made beforehand.

    x: [batch, in_features], already rotated. All weights have the shape and the quantizer of the first.
    """
    if reads_operand(weights[0].parts, x):
        words, scales = pack_operand(x)
        cut = fused.plan_of(list(weights[0].codes), weights[0].parts, words.shape[1], x.device)
        cut = variant.of(cut, max(part.step_bits for part in weights[0].parts), words.shape[1])
        words = in_cores(words) if variant.product is Product.WGMMA else words
        return [
            partial(fused.multiply, words, scales, list(w.codes), w.scales, None, list(w.parts), w.out_features, x.dtype, cut)
            for w in weights
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
    return partial(operand_ops.rotate_operand, x, signs, block)


def transform_of(weight: RandomWeight, x: Tensor) -> Callable[[], object]:
    """What makes activations x [batch, in_features] what the product with this weight reads. Its result is nobody's argument."""
    rotate = Rotation.random(x.shape[1], torch.Generator().manual_seed(0)).to(x.device)
    return (rotate_operand if reads_operand(weight.parts, x) else rotation)(x, rotate.signs, rotate.block)


def norm_operand(x: Tensor, weight: Tensor, epsilon: float, signs: Tensor, block: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """`qpc::norm_operand`: the same behind RMSNorm."""
    return partial(operand_ops.norm_operand, x, weight, epsilon, 0.0, signs, block)


def gated_operand(gate: Tensor, up: Tensor, activation: Activation, signs: Tensor, block: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """`qpc::gated_operand`: the same behind `activation(gate) * up`."""
    return partial(operand_ops.gated_operand, gate, up, activation.value, signs, block)


def add_norm_operand(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, signs: Tensor, block: int
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """`qpc::add_norm_operand`: the same behind the sum with a residual."""
    return partial(operand_ops.add_norm_operand, x, residual, weight, epsilon, 0.0, signs, block)
