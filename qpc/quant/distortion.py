"""Measured distortion of the trellis code, so that an allocation need not quantize to know what a rate costs."""

import math

FIRST_STEP_BITS = 2

GAP_DB = {
    6: (0.78, 1.01, 1.14, 1.17, 1.26, 1.35, 1.35, 1.39, 1.37, 1.37, 1.42),
    9: (0.47, 0.58, 0.65, 0.69, 0.73, 0.75, 0.76, 0.79, 0.79, 0.81, 0.84),
    11: (0.35, 0.42, 0.47, 0.50, 0.54, 0.58, 0.58, 0.61, 0.61, 0.64, 0.70),
    13: (0.28, 0.32, 0.37, 0.40, 0.43, 0.44, 0.44, 0.46, 0.48, 0.50, 0.49),
    14: (0.25, 0.29, 0.33, 0.36, 0.38, 0.39, 0.40, 0.42, 0.44, 0.45, 0.44),
    15: (0.22, 0.25, 0.30, 0.32, 0.35, 0.36, 0.37, 0.38, 0.39, 0.40, 0.39),
}
"""By suffix bits (window bits less step bits): distortion of a Gaussian over the bound 2^(-2 rate) [dB] at 2, 3, ..., 12 step bits.

Measured by `python -m benchmarks distortion --table` on 2^18 to 2^20 weights; standard error 0.005 to 0.01 dB. Where window and step would
exceed 24 bits the values only guide the interpolation.
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
