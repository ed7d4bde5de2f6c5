"""Which implementation runs on which device, and why not. Nothing ever falls back in silence."""

import importlib.util
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch

from qpc.errors import KernelError
from qpc.quant.hadamard import factors


class Implementation(Enum):
    """A way of running the operators."""

    CPU = "cpu"
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True)
class Support:
    """The implementation that runs, or None, and the reason."""

    implementation: Implementation | None
    reason: str

    def require(self) -> Implementation:
        """The implementation. Raises `KernelError` with the reason if there is none."""
        if self.implementation is None:
            raise KernelError(self.reason)
        return self.implementation


MAX_ROTATION_POWER = 1 << 15
"""Largest power-of-two factor of a rotation block that one Triton program holds in registers."""

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability that the Triton kernels are compiled and tested for."""


@cache
def supports(device: torch.device, dtype: torch.dtype) -> Support:
    """The implementation of the linear operators for activations of this dtype on this device; each covers every shape and quantizer."""
    if device.type == "cpu":
        return Support(Implementation.CPU, "dequantized weights are kept in memory on a CPU")
    if device.type != "cuda" or torch.version.hip is not None:
        return Support(None, f"no kernel for device {device}; required cpu or an NVIDIA GPU: move the model with .to('cpu')")
    if dtype not in TRITON_DTYPES:
        return Support(None, f"no Triton kernel for {dtype}; required one of {', '.join(map(str, TRITON_DTYPES))}: convert the model")
    if importlib.util.find_spec("triton") is None:
        return Support(None, "the GPU kernels need Triton, which is not installed: pip install triton")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return Support(None, f"{capability=} of {device} must be at least {MIN_CAPABILITY} (Ampere): use the CPU")
    return Support(Implementation.TRITON, "Triton kernels")


@cache
def supports_rotation(block: int, device: torch.device, dtype: torch.dtype) -> Support:
    """The implementation of the rotation for blocks of this size."""
    found = supports(device, dtype)
    _, power = factors(block)
    if found.implementation is Implementation.TRITON and power > MAX_ROTATION_POWER:
        reason = f"matrix products of PyTorch: {block=} has a power-of-two factor {power}, the Triton kernel takes {MAX_ROTATION_POWER}"
        return Support(Implementation.TORCH, reason)
    return found


MIN_TRANSFORM_POWER = 16
MAX_TRANSFORM_OUTER = 64
"""Smallest power-of-two factor and largest other factor of a block that one launch transforms into an operand."""


@cache
def supports_one_launch(features: int, block: int) -> Support:
    """Whether a row is transformed into an operand in one launch on a GPU, with what lies in front of its rotation."""
    base, power = factors(block)
    if block != features:
        return Support(Implementation.TORCH, f"a launch of its own rotates a row of {features // block} blocks")
    if power < MIN_TRANSFORM_POWER or base > MAX_TRANSFORM_OUTER:
        required = f"at least {MIN_TRANSFORM_POWER} and at most {MAX_TRANSFORM_OUTER}"
        reason = f"a launch of its own rotates a row of {block} = {power} x {base} features; one that does more takes {required}"
        return Support(Implementation.TORCH, reason)
    return Support(Implementation.TRITON, "one launch")
