"""The oracles: what every operator means, in float64 PyTorch. Slow, for tests."""

import torch
from torch import Tensor
from torch.nn import functional

from qpc.kernels.gate import Activation
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


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`, each of the two from float64 rounded to the dtype of both."""
    activated = activation(gate.double()).to(gate.dtype)
    return (activated.double() * up.double()).to(gate.dtype)


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


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, `x cos + rotate_half(x) sin`. x: [batch, heads, n, width]; cos, sin: [batch or 1, n, width]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """`qpc::decode_attention` in float64, from the keys and values that it writes."""
    wide, fresh = q.double(), k.double()
    if cos is not None and sin is not None:
        wide, fresh = turn(wide, cos.double(), sin.double()), turn(fresh, cos.double(), sin.double())
    keys.index_copy_(2, position[None], fresh.to(keys.dtype))
    values.index_copy_(2, position[None], v.to(values.dtype))
    groups = q.shape[1] // keys.shape[1]
    known, read = (each.double().repeat_interleave(groups, dim=1) for each in (keys, values))
    place = torch.arange(keys.shape[2], device=q.device)
    first = starts if window == 0 else starts.maximum(position + 1 - window)
    there = (place <= position) & (place >= first[:, None])
    scores = (wide @ known.transpose(2, 3) * scale).masked_fill(~there[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ read).to(q.dtype).transpose(1, 2).contiguous()
