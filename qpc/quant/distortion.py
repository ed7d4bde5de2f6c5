"""Measured distortion of the trellis code, so that an allocation need not quantize to know what a rate costs."""

import math

FIRST_STEP_BITS = 2

GAP_DB = {
    6: (0.80, 1.02, 1.16, 1.30, 1.39, 1.40, 1.49, 1.45, 1.46, 1.49, 1.52),
    9: (0.47, 0.60, 0.67, 0.72, 0.75, 0.78, 0.81, 0.78, 0.78, 0.79, 0.83),
    11: (0.35, 0.44, 0.50, 0.54, 0.56, 0.59, 0.63, 0.55, 0.57, 0.58, 0.59),
    13: (0.27, 0.34, 0.38, 0.41, 0.44, 0.48, 0.51, 0.43, 0.44, 0.44, 0.46),
    14: (0.24, 0.30, 0.34, 0.38, 0.41, 0.43, 0.47, 0.39, 0.39, 0.40, 0.42),
    15: (0.22, 0.27, 0.31, 0.34, 0.37, 0.39, 0.43, 0.36, 0.36, 0.37, 0.38),
}
"""By suffix bits (window bits less step bits): distortion of a Gaussian over the bound 2^(-2 rate) [dB] at 2, 3, ..., 12 step bits.

Measured by `python -m benchmarks distortion --table` on 2^20 weights; standard error 0.006 dB. Where window and step would exceed 24
bits the values only guide the interpolation.
"""


def trellis_distortion(step_bits: int, window_bits: int) -> float:
    """Expected mean squared error of a unit Gaussian, never under `2^-step_bits`.

    The gap to the bound is interpolated between the measured lengths.
    """
    suffix_bits = window_bits - step_bits
    below = max(measured for measured in GAP_DB if measured <= suffix_bits)
    above = min(measured for measured in GAP_DB if measured >= suffix_bits)
    share = (suffix_bits - below) / (above - below) if above > below else 0.0
    low, high = (GAP_DB[measured][step_bits - FIRST_STEP_BITS] for measured in (below, above))
    return math.ldexp(10 ** ((low + share * (high - low)) / 10), -step_bits)
