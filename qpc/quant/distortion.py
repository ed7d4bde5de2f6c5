"""Measured distortion of the trellis code, so that an allocation need not quantize to know what a rate costs."""

import math

FIRST_STEP_BITS = 2

GAP_DB = {
    6: (0.70, 0.82, 0.99, 1.17, 1.29, 1.36, 1.40, 1.38, 1.51, 1.54, 1.86),
    9: (0.45, 0.57, 0.67, 0.71, 0.76, 0.78, 0.80, 0.86, 0.88, 0.90, 0.93),
    11: (0.36, 0.45, 0.51, 0.52, 0.56, 0.57, 0.58, 0.60, 0.61, 0.62, 0.64),
    13: (0.28, 0.37, 0.43, 0.43, 0.44, 0.45, 0.46, 0.46, 0.47, 0.48, 0.49),
    14: (0.26, 0.34, 0.41, 0.38, 0.41, 0.41, 0.42, 0.43, 0.43, 0.44, 0.45),
    15: (0.23, 0.28, 0.31, 0.35, 0.37, 0.38, 0.39, 0.39, 0.40, 0.40, 0.41),
}
"""By suffix bits (window bits less step bits): distortion of a Gaussian over the bound 2^(-2 rate) [dB] at 2, 3, ..., 12 step bits.

Measured by `python -m benchmarks distortion --table` on 2^20 weights (standard error 0.006 dB) at suffixes of 6, 9 and 11 bits, but for 12
step bits at 11. The others are estimates from at most 2^18 weights (0.02 dB or more). Where window and step would exceed 24 bits the values
only guide the interpolation.
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
