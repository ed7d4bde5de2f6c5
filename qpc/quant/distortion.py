"""Measured distortion of the trellis code, so that an allocation need not quantize to know what a rate costs."""

import math

FIRST_STEP_BITS = 2

GAP_DB = {
    6: (0.85, 0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25, 1.30, 1.35),
    16: (0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25),
}
"""By suffix bits (window bits less step bits): distortion of a Gaussian over the bound 2^(-2 rate) [dB] at 2, 3, ..., 12 step bits."""


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
