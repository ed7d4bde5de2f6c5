"""Distortion of a code on Gaussian weights: the trellis is searched as an encoder would, on tail-biting rings of 1024 weights."""

import numpy as np
from numpy.typing import NDArray

from benchmarks.codes.candidates import Points
from qpc.quant.viterbi import search_rings

RING_WEIGHTS = 1024
RESOLUTION = 4096
"""The search takes integer points: a code of unit deviation is rounded to this many steps of it."""

SPREADS = (1.08, 1.04, 1.00, 0.96, 0.92, 0.88, 0.84, 0.80)
"""Ratios of weights' deviation to the code's that are tried."""


def gaussian_rings(rings: int, seed: int) -> NDArray[np.float32]:
    """Weights of unit mean square: float32 [rings, 1024]."""
    values = np.random.default_rng(seed).standard_normal((rings, RING_WEIGHTS))
    return (values / np.sqrt(np.mean(values**2))).astype(np.float32)


def ring_windows(symbols: NDArray[np.uint16], step_bits: int, window_bits: int) -> NDArray[np.int64]:
    """The window of each step from the low `step_bits` bits of all: [rings, steps]."""
    result = np.zeros(symbols.shape, dtype=np.int64)
    for step in range(-(-window_bits // step_bits)):
        result |= np.roll(symbols.astype(np.int64), -step, axis=1) << (step * step_bits)
    return result & ((1 << window_bits) - 1)


def gap_db(points: Points, dimension: int, step_bits: int, weights: NDArray[np.float32], spread: float) -> float:
    """Mean squared error over the bound 2^(-2 rate) after the best common scale, in dB.

    points: [2^window_bits, 2]; of a code of dimension 1 only the first column counts, and a step has one weight.
    Its standard error is near 0.18 dB over the square root of the rings; much less between codes on the same weights.
    """
    window_bits = len(points).bit_length() - 1
    used = points[:, :dimension]
    table = np.zeros_like(points)
    table[:, :dimension] = np.round(used / np.sqrt(np.mean(used**2)) * RESOLUTION)
    steps = weights.reshape(len(weights), -1, dimension)
    padded = np.zeros((*steps.shape[:2], 2), dtype=np.float32)
    padded[..., :dimension] = steps * np.float32(RESOLUTION * spread)
    symbols = search_rings(padded, table.astype(np.int64), step_bits)
    made = table[ring_windows(symbols, step_bits, window_bits)][..., :dimension].ravel()
    source = steps.astype(np.float64).ravel()
    explained = (source @ made) ** 2 / ((made @ made) * (source @ source))
    return float(10 * np.log10((1 - explained) * 4.0 ** (step_bits / dimension)))


def best_gap_db(points: Points, dimension: int, step_bits: int, weights: NDArray[np.float32]) -> tuple[float, float]:
    """The least gap over `SPREADS` and the spread that reaches it: a walk downhill from the middle."""
    gaps: dict[int, float] = {}

    def gap(index: int) -> float:
        if not 0 <= index < len(SPREADS):
            return float("inf")
        if index not in gaps:
            gaps[index] = gap_db(points, dimension, step_bits, weights, SPREADS[index])
        return gaps[index]

    here = len(SPREADS) // 2
    while (best := min((here - 1, here, here + 1), key=gap)) != here:
        here = best
    return gap(here), SPREADS[here]
