"""What the kernels are told of a quantizer's code: constants, and a table."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.scalar import ScalarQuantizer, levels
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer, codebook


@dataclass(frozen=True)
class Code:
    """A code as the kernels take it: the constants of `decode`, and the size of its unit for weights of unit variance."""

    bits: int
    window_bits: int
    dimension: int
    unit: float


NO_CODE = Code(bits=0, window_bits=0, dimension=0, unit=1.0)
"""Stands for a part that a weight does not have."""


def code_of(quantizer: UniformQuantizer) -> Code:
    """The constants of a quantizer's code."""
    match quantizer:
        case TrellisQuantizer(step_bits, window_bits):
            return Code(step_bits, window_bits, 2, quantizer.unit)
        case VectorQuantizer(dimension, bits):
            return Code(bits, 0, dimension, 1.0)
        case ScalarQuantizer(bits):
            return Code(bits, 0, 1, 1.0)
    raise KernelError(f"no GPU kernel decodes {quantizer}")


@cache
def table_of(quantizer: UniformQuantizer, device: torch.device) -> Tensor | None:
    """The table of a quantizer's code, None for a trellis: float16 [2^bits], of vectors int32 [2^bits, dimension / 2]."""
    with torch.inference_mode(False):
        match quantizer:
            case VectorQuantizer(dimension, bits):
                return codebook(dimension, bits).half().view(torch.int32).to(device)
            case ScalarQuantizer(bits):
                return levels(bits).half().to(device)
    return None
