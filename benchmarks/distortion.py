"""Measures the distortion of the trellis code: prints the table of `qpc.quant.distortion`. Run as `python -m benchmarks.distortion`."""

import math
from collections.abc import Sequence

import torch

from qpc.quant.quantizer import TILE
from qpc.quant.trellis import MAX_STEP_BITS, MIN_STEP_BITS, TrellisQuantizer

WINDOWS = (12, 14, 16, 18, 20)


def gap_db(quantizer: TrellisQuantizer, rings: int, seed: int = 0) -> float:
    """Measured distortion over the bound 2^(-2 rate), in dB: of Gaussian weights, after the best common scale, over their sample variance.

    Its standard error is near 0.35 dB over the square root of `rings`.
    """
    unit = torch.randn(TILE * rings, TILE, generator=torch.Generator().manual_seed(seed))
    made = quantizer.decode(quantizer.encode(unit)).double()
    wide = unit.double()
    explained = (wide * made).sum().square() / (made.square().sum() * wide.square().sum())
    return 10 * math.log10((1 - explained.item()) * 2**quantizer.step_bits)


def table(windows: Sequence[int] = WINDOWS) -> dict[int, tuple[float, ...]]:
    """Gap in dB at all step bits, for each window length; fewer rings at the longer, slower ones."""
    step_bits = range(MIN_STEP_BITS, MAX_STEP_BITS + 1)
    return {w: tuple(round(gap_db(TrellisQuantizer(k, w), rings=max(96, 4096 >> (w - 12))), 2) for k in step_bits) for w in windows}


if __name__ == "__main__":
    for window in WINDOWS:
        print(f"    {window}: {table([window])[window]},", flush=True)
