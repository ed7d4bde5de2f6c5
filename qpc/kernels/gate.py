"""Gated activations, `activation(gate) * up`: which there are, and how PyTorch computes them."""

import math
from enum import StrEnum

from torch import Tensor
from torch.nn import functional

from qpc.errors import KernelError

GELU_SLOPE, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
"""Of GELU by tanh, `x (1 + tanh(u)) / 2 = x sigmoid(2 u)` with `2 u = GELU_SLOPE (x + GELU_CUBE x^3)`."""


class Activation(StrEnum):
    """What a gate goes through. Each is `x sigmoid(z)`: of `x` itself, or of a polynomial of it."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"

    @staticmethod
    def parse(name: str) -> "Activation":
        """The one of this name. Raises `KernelError` for another."""
        try:
            return Activation(name)
        except ValueError:
            raise KernelError(f"operand: unknown activation {name!r}; known: {', '.join(Activation)}") from None

    def __call__(self, x: Tensor) -> Tensor:
        """As PyTorch computes it: in float32 or better, rounded to the dtype of `x`."""
        match self:
            case Activation.SILU:
                return functional.silu(x)
            case Activation.GELU_TANH:
                return functional.gelu(x, approximate="tanh")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` in their dtype: rounded behind the activation, and behind the product."""
    return activation(gate) * up
