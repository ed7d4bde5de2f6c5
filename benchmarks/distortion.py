"""Distortion of every quantizer: `python -m benchmarks distortion --json FILE [--plot FILE]`.

Unit Gaussian weights, 2^20 of them or more; mean squared error after the best common scale, over their sample variance; its gap to the
bound 2^(-2 rate) in dB, next to the paper's figures. The tables of `qpc.quant` come from it: `--table` prints that of the trellis.
"""

import argparse
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import write_rows
from qpc.kernels.encoder import encoder_for
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.palette import Effort, Family, trellis_at
from qpc.quant.quantizer import Quantizer
from qpc.quant.trellis import MAX_STEP_BITS, MAX_WINDOW_BITS, MIN_STEP_BITS, TrellisQuantizer

PAPER_MSE = {
    "paper TCQ": {
        1.5: 0.1403, 1.75: 0.1057, 2: 0.0710, 2.25: 0.0537, 2.5: 0.0363, 2.75: 0.0276, 3: 0.0189, 3.25: 0.01455, 3.5: 0.01018,
        3.75: 0.00804, 4: 0.00590, 4.25: 0.00414, 4.5: 0.00303, 4.75: 0.00219, 5: 0.00162,
    },
    "paper VQ-2": {1.5: 0.2012, 2: 0.1086, 2.5: 0.0571, 3: 0.0297, 3.5: 0.0152, 4: 0.00776, 4.5: 0.00392, 5: 0.00198},
    "paper SQ": {2: 0.1175, 3: 0.0345, 4: 0.00950, 5: 0.00251},
}  # fmt: skip
"""Q-Palette, arXiv 2509.20214, as its own repository tabulates them."""

BLOCKS_AT_ONCE = 1024
TABLE_SUFFIX_BITS = (6, 9, 11, 13, 14, 15)


def main(arguments: list[str]) -> None:
    """Measure, print a line per row, write the file and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks distortion", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--samples", type=int, default=1 << 20)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default", "high", "max"])
    parser.add_argument("--table", action="store_true", help="measure the table of qpc/quant/distortion.py instead")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.table:
        for suffix_bits in TABLE_SUFFIX_BITS:
            steps = range(MIN_STEP_BITS, MAX_STEP_BITS + 1)
            found = [TrellisQuantizer(k, min(k + suffix_bits, MAX_WINDOW_BITS)) for k in steps]
            gaps = ", ".join(f"{gap_db(q, measured_mse(q, options.samples, device)):.3f}" for q in found)
            print(f"    {suffix_bits}: ({gaps}),", flush=True)
        return
    rows = list(paper_rows())
    for name, preset, quantizer in quantizers([Effort.parse(each) for each in options.efforts]):
        mse = measured_mse(quantizer, options.samples, device)
        row = {"quantizer": name, "preset": preset, "rate": float(quantizer.rate), "mse": mse, "gap_db": gap_db(quantizer, mse)}
        print(f"{quantizer!s:22} {preset:8} mse {mse:.6f}  gap {row['gap_db']:.3f} dB", flush=True)
        rows.append(row)
        write_rows(options.json, "distortion", rows)
    if options.plot is not None:
        from benchmarks.plot_distortion import draw

        draw(rows, options.plot)


def quantizers(efforts: list[Effort]) -> Iterator[tuple[str, str, Quantizer]]:
    """Everything that is measured: family, preset, quantizer."""
    for effort in efforts:
        for quarters in range(4, 25):
            yield "trellis", str(effort), trellis_at(Fraction(quarters, 4), effort)
    for family in (Family.SCALAR, Family.PAIRS, Family.QUADRUPLES):
        for quantizer in family.ladder():
            yield family.value, "", quantizer


def paper_rows() -> Iterator[dict[str, Any]]:
    """The paper's figures, in the same form."""
    for name, figures in PAPER_MSE.items():
        for rate, mse in figures.items():
            yield {"quantizer": name, "preset": "", "rate": rate, "mse": mse, "gap_db": 10 * math.log10(mse * 4**rate)}


def measured_mse(quantizer: Quantizer, samples: int, device: torch.device, seed: int = 0) -> float:
    """Mean squared error over variance of so many Gaussian weights or a few more, after the best common scale."""
    columns = 16 * BLOCK_COLUMNS
    generator = torch.Generator().manual_seed(seed)
    energy = made_energy = product = 0.0
    for _ in range(-(-samples // (BLOCKS_AT_ONCE * BLOCK_ROWS * BLOCK_COLUMNS))):
        weight = torch.randn(BLOCKS_AT_ONCE // 16 * BLOCK_ROWS, columns, generator=generator).to(device)
        pieces, start = [], 0
        for part, width in quantizer.parts(columns):
            pieces.append(part.decode(part.encode(weight[:, start * BLOCK_COLUMNS : (start + width) * BLOCK_COLUMNS], encoder_for(device))))
            start += width
        made = torch.cat(pieces, dim=1).double()
        energy += float(weight.double().square().sum())
        made_energy += float(made.square().sum())
        product += float((weight.double() * made).sum())
    return 1 - product**2 / (made_energy * energy)


def gap_db(quantizer: Quantizer, mse: float) -> float:
    """How far the error lies above the bound 2^(-2 rate)."""
    return 10 * math.log10(mse * 4 ** float(quantizer.rate))
