"""Activations that may be compared behind their rounding to 16 bits. Needs neither a test framework nor Triton."""

import torch
from torch import Tensor

from qpc.kernels.gate import Activation

UNSETTLED = 2e-5
"""Relative error of an activation in float32, or more."""


def settled(gate: Tensor, kind: Activation) -> Tensor:
    """A gate with zeros where float32 may round its activation to the dtype of the gate in two ways. Of float32 itself all is settled."""
    if gate.dtype not in (torch.float16, torch.bfloat16):
        return gate
    exact = kind(gate.double())
    low, high = ((exact * factor).to(gate.dtype) for factor in (1 - UNSETTLED, 1 + UNSETTLED))
    return torch.where(low == high, gate, 0)
