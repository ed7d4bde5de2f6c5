"""The oracles: what every operator means, in float64 PyTorch. Slow, for tests."""

import torch
from torch import Tensor
from torch.nn import functional

from qpc.quant.hadamard import hadamard_transform
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.rotation import unpack_signs


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """`H (s * x) / sqrt(block)` in each block of the last axis of `x` [..., features]; float64 inside, the dtype of `x` outside."""
    turned = hadamard_transform(x.double() * unpack_signs(signs, x.shape[-1], torch.float64), block)
    return turned.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)` along the last axis of `x` [..., features]: float64, without any rounding."""
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)


def dequantize(
    codes: list[Tensor],
    scales: Tensor,
    quantizers: list[UniformQuantizer],
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The decoded weight in the rotated basis: [out_features, in_features]. Each part is decoded by its own quantizer."""
    unit = torch.cat([quantizer.decode(code) for quantizer, code in zip(quantizers, codes, strict=True)], dim=1)
    return (unit.double() * scales.double()[:, None])[:out_features, :in_features].to(dtype)


def linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: list[UniformQuantizer], out_features: int
) -> Tensor:
    """`x @ w.T + bias` with the decoded weight; float64 inside, the dtype of `x` outside."""
    weight = dequantize(codes, scales, quantizers, out_features, x.shape[-1])
    return functional.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)
