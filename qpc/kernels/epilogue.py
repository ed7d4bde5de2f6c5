"""The end of every multiplication: scales, bias, and the sum over programs that shared the input axis."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor


@triton.jit
def finish(total, rows, mask, scales, bias, HAS_BIAS: tl.constexpr):
    """`total * scale + bias` for some output rows; `total` is float32 and has the shape of `rows`."""
    result = total * tl.load(scales + rows, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def _sum_splits_kernel(partial, scales, bias, out, batch, out_features, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    item = tl.program_id(1)
    mask = rows < out_features
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + (split * batch + item) * out_features + rows, mask=mask, other=0.0)
    result = finish(total, rows, mask, scales, bias, HAS_BIAS)
    tl.store(out + item * out_features + rows, result.to(out.dtype.element_ty), mask=mask)


def sum_splits(partial: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add partial sums in a fixed order: float32 [splits, batch, out_features] -> [batch, out_features] of `dtype`."""
    splits, batch, out_features = partial.shape
    out = partial.new_empty((batch, out_features), dtype=dtype)
    block = 256
    _sum_splits_kernel[(triton.cdiv(out_features, block), batch)](
        partial, scales, bias, out, batch, out_features, SPLITS=splits, HAS_BIAS=bias is not None, BLOCK=block
    )
    return out
