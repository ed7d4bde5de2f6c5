"""RMSNorm alone, as one plain Triton kernel with a row in each program: what a transform behind a norm is compared with."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(x, residual, weight, total, out, features, eps, WIDTH: tl.constexpr, RESIDUAL: tl.constexpr):
    row = tl.program_id(0) * features
    at = tl.arange(0, WIDTH)
    kept = at < features
    value = tl.load(x + row + at, mask=kept, other=0).to(tl.float32)
    scale = tl.load(weight + at, mask=kept, other=0).to(tl.float32)
    if RESIDUAL:
        value = (value + tl.load(residual + row + at, mask=kept, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row + at, value, mask=kept)
        value = value.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / features + eps)
    tl.store(out + row + at, (value * scale).to(out.dtype.element_ty), mask=kept)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, warps: int = 8) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` for x [batch, features], contiguous, with the residual added first; and that sum, or `x`."""
    batch, features = x.shape
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    width = triton.next_power_of_2(features)
    arguments = (x, residual, weight, total, out, features, eps)
    _norm_kernel[(batch,)](*arguments, WIDTH=width, RESIDUAL=residual is not None, num_warps=warps)
    return out, total
