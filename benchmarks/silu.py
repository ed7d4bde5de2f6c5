"""`silu(gate) * up` alone, as one plain Triton kernel: what a transform behind a gated activation is compared with."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_kernel(gate, up, out, features, stride, WIDTH: tl.constexpr):
    row = tl.program_id(1)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    kept = at < features
    value = tl.load(gate + row * stride + at, mask=kept, other=0)
    other = tl.load(up + row * stride + at, mask=kept, other=0).to(tl.float32)
    wide = value.to(tl.float32)
    activated = (wide / (1 + tl.exp(-wide))).to(value.dtype)
    tl.store(out + row * features + at, (activated.to(tl.float32) * other).to(value.dtype), mask=kept)


def silu(gate: Tensor, up: Tensor, width: int = 1024, warps: int = 4) -> Tensor:
    """`silu(gate) * up` for halves [batch, features] of one tensor, rounded to their dtype behind each of the two."""
    batch, features = gate.shape
    out = torch.empty((batch, features), dtype=gate.dtype, device=gate.device)
    _silu_kernel[(triton.cdiv(features, width), batch)](gate, up, out, features, gate.stride(0), WIDTH=width, num_warps=warps)
    return out
