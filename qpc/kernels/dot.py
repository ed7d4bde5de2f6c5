"""The product on tensor cores, with nothing lost of the weights."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


def dot_precision(dtype: torch.dtype) -> str:
    """The `DOT` of `exact_dot` for an activation of this dtype."""
    return {torch.float16: "float16", torch.bfloat16: "tf32", torch.float32: "tf32x2"}[dtype]


@triton.jit
def exact_dot(weights, x, acc, DOT: tl.constexpr):
    """`weights @ x + acc` in float32, for weights that float16 holds exactly; TF32 then holds them too, and any bfloat16.

    A float32 activation is multiplied in two parts: what TF32 holds of it, and the rest.
    """
    if DOT == "float16":
        return tl.dot(weights.to(tl.float16), x, acc)
    wide = x.to(tl.float32)
    if DOT == "tf32":
        return tl.dot(weights.to(tl.float32), wide, acc, input_precision="tf32")
    high = (wide.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    acc = tl.dot(weights.to(tl.float32), high, acc, input_precision="tf32")
    return tl.dot(weights.to(tl.float32), wide - high, acc, input_precision="tf32")
