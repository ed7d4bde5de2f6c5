"""Which trellis encoder runs on a device."""

import torch

from qpc.quant.quantizer import RingEncoder
from qpc.quant.viterbi import encode_rings as cpu_encoder


def encoder_for(device: torch.device) -> RingEncoder:
    """The Triton encoder on a GPU that it supports, else the compiled CPU encoder. Both take and return tensors on the device."""
    if device.type == "cuda":
        from qpc.kernels.viterbi import encode_rings

        return encode_rings
    return cpu_encoder
