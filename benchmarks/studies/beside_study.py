"""What room beside a multiplication is worth: `python -m benchmarks.studies.beside_study [--bits 3] [--batch 1 8] [--json FILE]`.

All launches of a decoder layer of Llama 3.1 8B in a row, four transforms (two of them behind RMSNorm with a residual) and four
multiplications, with more or fewer registers of a thread and with each way to put sums together. Two programs of 8 warps with 128 registers
fill a multiprocessor, so that the next transform is only placed where one of them has ended; with 104, one with 12,288 registers has room,
with 112 one with 8,192. Each variant is checked before and after it is timed, and all of them are timed in turns, `ROUNDS` times.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import Variant, add_norm_operand, multiplications, rotate_operand
from benchmarks.layer import linears_of
from benchmarks.plan import compile_ahead
from benchmarks.rows import write_rows
from benchmarks.timing import EXACT, Checked, check, copies_for, require_gpu, time_calls
from benchmarks.weights import RandomWeight, activations, random_weights
from qpc.kernels.fused import Finish
from qpc.quant.rotation import Rotation

REGISTERS = (128, 112, 104, 96)
FINISHES = (None, Finish.WIDE, Finish.WIDE_BY_FOUR)
ROUNDS = 3


def main() -> None:
    """Compile all, then measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=Fraction, nargs="+", default=[Fraction(3)])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--registers", type=int, nargs="+", default=REGISTERS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = require_gpu()
    variants = [Variant(finish=finish, registers=registers) for finish, registers in product(FINISHES, options.registers)]
    linears = [linear for bits in options.bits for linear in linears_of((str(bits),) * 4, fused=True)]
    compile_ahead([(linear.quantizer, (linear.shape,), batch) for linear, batch in product(linears, options.batch)], *variants)
    rows: list[dict[str, Any]] = []
    for bits, batch in product(options.bits, options.batch):
        layer = Layer.of(bits, batch, device)
        timed = [(variant, *layer.calls(variant)) for variant in variants]
        for turn, (variant, calls, proof) in product(range(ROUNDS), timed):
            timing = time_calls(calls, proof)
            row = {"bits": float(bits), "batch": batch, "turn": turn, **variant.columns, **timing.row}
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
            write_rows(options.json, "beside_study", rows)
        for variant in variants:
            layer.calls(variant)


@dataclass(frozen=True)
class Layer:
    """Four linears behind their transforms. expected: of the first copies, one after the other, float64 [batch, all out_features]."""

    weights: Sequence[list[RandomWeight]]
    inputs: Sequence[Tensor]
    transforms: Sequence[Callable[[], object]]
    expected: Tensor

    @staticmethod
    def of(bits: Fraction, batch: int, device: torch.device) -> "Layer":
        """Random weights, as many copies as keep them out of the cache."""
        linears = linears_of((str(bits),) * 4, fused=True)
        copies = copies_for(sum(linear.nbytes for linear in linears))
        weights = [random_weights(linear.quantizer, linear.shape, copies, device) for linear in linears]
        inputs = [activations(batch, linear.shape[1], device) for linear in linears]
        transforms = [transform_of(x, behind_norm=index in (0, 2)) for index, x in enumerate(inputs)]
        products = [each[0].product(x) for each, x in zip(weights, inputs, strict=True)]
        return Layer(weights, inputs, transforms, torch.cat(products, dim=1))

    def calls(self, variant: Variant) -> tuple[Sequence[Callable[[], None]], Checked]:
        """Calls of whole layers over different weights, and the proof that the first computes what it should."""
        works = [multiplications(weights, x, variant) for weights, x in zip(self.weights, self.inputs, strict=True)]
        proof = check(lambda: torch.cat([work[0]() for work in works], dim=1), self.expected, EXACT)

        def run(copy: int) -> None:
            for transform, work in zip(self.transforms, works, strict=True):
                transform()
                work[copy]()

        return [partial(run, copy) for copy in range(len(works[0]))], proof


def transform_of(x: Tensor, behind_norm: bool) -> Callable[[], object]:
    """What makes the operand; its result is nobody's argument, since that of the products was made before."""
    rotate = Rotation.random(x.shape[1], torch.Generator().manual_seed(0)).to(x.device)
    if not behind_norm:
        return rotate_operand(x, rotate.signs, rotate.block)
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return add_norm_operand(x, x.clone(), weight, 1e-5, rotate.signs, rotate.block)


if __name__ == "__main__":
    main()
