"""Which plan is fastest: `python -m benchmarks.studies.fused_study [--bits 3] [--batch 1] [--product wgmma] [--json FILE]`.

Every plan of a grid for the four linears of a Llama 3.1 8B layer, each checked before it is timed; prints the best few of each shape, the
time of the default plan and their sums, beside bfloat16 in the same process.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.adapters import Variant
from benchmarks.plan import add_variant, variant_of
from benchmarks.rows import write_rows
from benchmarks.timing import EXACT, check, copies_for, require_gpu, time_calls
from benchmarks.weights import LAYER, Shape, random_weights
from qpc.kernels import fused
from qpc.kernels.launch import processors
from qpc.kernels.operand import operand_rows, pack_operand
from qpc.kernels.warpgroup import Product, in_cores
from qpc.quant.palette import Effort, trellis_at

CUTS = ((2, 2), (2, 4), (2, 8), (4, 2), (4, 4))
"""Warpgroups of a program and column blocks of a turn of one."""

PARTS = 4
"""In which the plans of a shape are compiled side by side."""


def main() -> None:
    """Compile all, then measure shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=Fraction, nargs="+", default=[Fraction(3)])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="default plans alone")
    add_variant(parser)
    options = parser.parse_args()
    device, variant = require_gpu(), variant_of(options)
    jobs = list(product(options.bits, options.batch, LAYER, range(1 if options.quick else PARTS)))
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_compile, quick=options.quick, variant=variant), jobs))
    rows: list[dict[str, Any]] = []
    for bits, batch in product(options.bits, options.batch):
        sums = {"best": 0.0, "default": 0.0, "bf16": 0.0}
        for shape in LAYER:
            found = list(_measured(bits, batch, shape, device, options.quick, variant))
            default = found[0]
            best = sorted(found, key=lambda row: row["us"])[:6]
            bf16 = _bf16_us(batch, shape, device)
            sums["best"] += best[0]["us"]
            sums["default"] += default["us"]
            sums["bf16"] += bf16
            shown = "; ".join(
                f"{row['us']:.2f} (w{row['warpgroups']} d{row['depth']} n{row['stages']} r{row['registers']} p{row['programs']})"
                for row in best
            )
            print(f"{float(bits)} bits, batch {batch}, {shape}: default {default['us']:.2f}, best {shown}; bf16 {bf16:.2f}", flush=True)
            rows += [row | variant.columns | {"bf16_us": bf16} for row in found]
            write_rows(options.json, "fused_study", rows)
        print(f"sum: default {sums['default']:.2f} best {sums['best']:.2f} bf16 {sums['bf16']:.2f} us", flush=True)


def plans(
    default: fused.Plan, block_rows: int, widths: tuple[int, ...], bits: tuple[int, ...], words: tuple[int, ...], rows: int, count: int
) -> list[fused.Plan]:
    """The default first, then the grid, as far as it fits."""
    found = [default]
    for (warpgroups, depth), registers, load, stages, even in product(CUTS, (96, 128), (2, 4), (2, 3), (False, True)):
        programs = load // warpgroups * count
        if any(width % (warpgroups * depth) for width in widths):
            continue
        cut = fused.cut_for(warpgroups, depth, block_rows, widths, words, rows, programs, even, stages, registers)
        if cut.resident * count >= programs and fused.program_bytes(cut, max(bits), rows) <= fused.SHARED_BYTES - 1024:
            found.append(replace(cut, finish=default.finish))
    return list(dict.fromkeys(found))


def _calls(bits: Fraction, batch: int, shape: Shape, device: torch.device, copies: int, variant: Variant) -> tuple[Any, Any, list[Any]]:
    quantizer = trellis_at(bits, Effort.DEFAULT)
    weights = random_weights(quantizer, shape, copies, device)
    x = torch.randn(batch, shape[1], device=device).bfloat16()
    words, scales = pack_operand(x)
    words = in_cores(words) if variant.product is Product.WGMMA else words
    return weights, x, [partial(_multiply, words, scales, weight) for weight in weights]


def _multiply(words: torch.Tensor, scales: torch.Tensor, weight: Any, cut: fused.Plan) -> torch.Tensor:
    parts = list(weight.parts)
    return fused.multiply(words, scales, list(weight.codes), weight.scales, None, parts, weight.out_features, torch.bfloat16, cut)


def _grid(weights: Any, batch: int, device: torch.device, quick: bool, variant: Variant) -> list[fused.Plan]:
    weight = weights[0]
    widths, bits = tuple(code.shape[1] for code in weight.codes), tuple(part.step_bits for part in weight.parts)
    rows, count, words = operand_rows(batch), processors(device), tuple(map(fused.words_of, weight.parts))
    default = fused.plan(weight.codes[0].shape[0], widths, words, rows, count)
    found = [default] if quick else plans(default, weight.codes[0].shape[0], widths, bits, words, rows, count)
    varied = [variant.of(cut, max(bits), rows) for cut in found]
    return [cut for cut in varied if fused.program_bytes(cut, max(bits), rows) <= fused.SHARED_BYTES - 1024]


def _compile(job: tuple[Fraction, int, Shape, int], quick: bool, variant: Variant) -> None:
    """Run some plans once, so that their kernels are compiled and cached."""
    bits, batch, shape, first = job
    device = require_gpu()
    weights, _, calls = _calls(bits, batch, shape, device, 1, variant)
    for cut in _grid(weights, batch, device, quick, variant)[first::PARTS]:
        calls[0](cut)
    torch.cuda.synchronize()


def _measured(bits: Fraction, batch: int, shape: Shape, device: torch.device, quick: bool, variant: Variant) -> Iterator[dict[str, Any]]:
    quantizer = trellis_at(bits, Effort.DEFAULT)
    copies = copies_for(quantizer.weight_bytes(*shape))
    weights, x, calls = _calls(bits, batch, shape, device, copies, variant)
    expected = weights[0].product(x)
    for cut in _grid(weights, batch, device, quick, variant):
        proof = check(partial(calls[0], cut), expected, EXACT)
        timing = time_calls([partial(call, cut) for call in calls], proof)
        check(partial(calls[0], cut), expected, EXACT)
        what = {"rate": float(bits), "batch": batch, "out_features": shape[0], "in_features": shape[1]}
        plan = {
            "warpgroups": cut.warpgroups,
            "depth": cut.depth,
            "stages": cut.stages,
            "registers": cut.registers,
            "programs": list(cut.programs),
        }
        yield what | plan | {"chunk_bytes": cut.chunk_bytes} | timing.row | {"max_rel_error": proof.max_rel_error}


def _bf16_us(batch: int, shape: Shape, device: torch.device) -> float:
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(copies_for(2 * shape[0] * shape[1]))]
    x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device=device)
    proof = check(partial(functional.linear, x, weights[0]), x.double() @ weights[0].double().T, 1e-2)
    return time_calls([partial(functional.linear, x, weight) for weight in weights], proof).us


if __name__ == "__main__":
    main()
