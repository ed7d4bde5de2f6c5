"""Activations into the operand of the integer multiplication on a GPU: which kernel does it.

One launch, where a row is one block of the rotation: with explicit layouts on a Hopper GPU, else as plain Triton. Other rotations take two
launches, and what lies in front of one, a norm or a gated activation, is computed by PyTorch. Nothing between is rounded to less than
float32, but a gated activation to the dtype of the activations, where a model rounds it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qpc.kernels import cpu, hadamard, transform
from qpc.kernels.gate import Activation, gated
from qpc.kernels.select import Implementation, supports_rotation
from qpc.kernels.transform import Front, Gate, Norm

LAYOUTS_CAPABILITY = (9, 0)
"""Compute capability of the kernel with explicit layouts."""

LAYOUTS_DTYPES = (torch.float16, torch.bfloat16)


def rotate(x: Tensor, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Words and scales of the operand of rotated rows. x: [batch, features], at least one row; signs, block: as `qpc::rotate` has them."""
    words, scales, _ = _in_one_launch(x, signs, block, None) or (*transform.pack(_rotated(x, signs, block)), x)
    return words, scales


def normalize(x: Tensor, signs: Tensor, block: int, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The same behind RMSNorm, and the sum of `x` and the residual in the dtype of `x` (`x` itself without one)."""
    found = _in_one_launch(x, signs, block, norm)
    if found is not None:
        return found
    hidden = x if norm.residual is None else x + norm.residual
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + norm.eps) * (norm.weight.float() + norm.offset)
    return *transform.pack(_rotated(wide, signs, block)), hidden


def gate(x: Tensor, up: Tensor, activation: Activation, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Words and scales of the operand of rotated rows `activation(x) * up`; both [batch, features], of one dtype."""
    found = _in_one_launch(x, signs, block, Gate(up, activation))
    words, scales, _ = found or (*transform.pack(_rotated(gated(x, up, activation), signs, block)), x)
    return words, scales


def _in_one_launch(x: Tensor, signs: Tensor, block: int, front: Front) -> tuple[Tensor, Tensor, Tensor] | None:
    """Words, scales and sum, or None where no kernel does this rotation in one launch."""
    x = _by_rows(x)
    if isinstance(front, Norm):
        residual = None if front.residual is None else _by_rows(front.residual)
        front = replace(front, weight=front.weight.contiguous(), residual=residual)
    elif isinstance(front, Gate):
        front = replace(front, up=_by_rows(front.up))
    if x.is_cuda and x.dtype in LAYOUTS_DTYPES and torch.cuda.get_device_capability(x.device) == LAYOUTS_CAPABILITY:
        from qpc.kernels import transform_hopper

        cut = transform_hopper.cut(x.shape[1], block, isinstance(front, Norm), isinstance(front, Gate))
        if cut is not None:
            return transform_hopper.transform(x, signs, front, cut)
    if transform.plan(x.shape[1], block) is not None:
        return transform.transform(x, signs, block, front)
    return None


def _by_rows(x: Tensor) -> Tensor:
    """Rows without gaps between their elements."""
    return x if x.stride(1) == 1 else x.contiguous()


def _rotated(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """Float32 rows, without gaps."""
    if x.is_cuda and supports_rotation(block, x.device, x.dtype).require() is Implementation.TORCH:
        return cpu.rotate(x.float(), signs, block)
    return hadamard.rotate(x, signs, block, torch.float32)
