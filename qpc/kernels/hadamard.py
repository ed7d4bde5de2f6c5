"""The rotation on a GPU: signs, the dense base factor and the butterflies of the power of two in one kernel, float32 inside.

A program makes `MEMBERS` output rows of the base factor of one block, each of `POWER` values, so that large blocks spread over the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.quant.hadamard import factors, hadamard_matrix

MIN_VALUES = 1024
"""Values of one program, if the block is large enough."""


@triton.jit
def _butterflies(values, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Sylvester's transform along groups of 2^STAGES consecutive values of a vector of SIZE."""
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(values, (SIZE >> (stage + 1), 2, 1 << stage)), (0, 2, 1))
        first, second = tl.split(pairs)
        values = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (SIZE,))
    return values


@triton.jit
def _rotate_kernel(
    x, signs, matrix, out, features, x_stride, norm,
    BASE: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (BASE + MEMBERS - 1) // MEMBERS
    row = tl.program_id(0).to(tl.int64)
    first_feature = tl.program_id(1) // chunks * (BASE * POWER)
    member = tl.program_id(1) % chunks * MEMBERS + tl.arange(0, MEMBERS)
    inner = tl.arange(0, POWER)
    acc = tl.zeros((MEMBERS, POWER), tl.float32)
    for source in range(BASE):
        feature = first_feature + source * POWER + inner
        value = tl.load(x + row * x_stride + feature).to(tl.float32)
        negative = (tl.load(signs + feature // 8).to(tl.int32) >> (feature % 8)) & 1
        value = tl.where(negative == 1, -value, value)
        entry = tl.load(matrix + member * BASE + source, mask=member < BASE, other=0).to(tl.float32)
        acc += entry[:, None] * value[None, :]
    turned = tl.reshape(_butterflies(tl.reshape(acc, (MEMBERS * POWER,)), MEMBERS * POWER, STAGES), (MEMBERS, POWER))
    target = out + row * features + first_feature + member[:, None] * POWER + inner[None, :]
    tl.store(target, (turned * norm).to(out.dtype.element_ty), mask=(member < BASE)[:, None] & (inner >= 0)[None, :])


def rotate(x: Tensor, signs: Tensor, block: int, dtype: torch.dtype | None = None) -> Tensor:
    """`qpc::rotate` on a GPU; arguments as there, already checked. `select.supports_rotation` bounds the block.

    dtype: of the result, by default that of `x`.
    """
    features = x.shape[-1]
    base, power = factors(block)
    rows = x.reshape(-1, features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=dtype or x.dtype, device=x.device)
    members = min(triton.next_power_of_2(base), max(1, MIN_VALUES // power))
    warps = max(1, min(16, members * power // 256))
    grid = (len(rows), features // block * triton.cdiv(base, members))
    _rotate_kernel[grid](
        rows, signs.contiguous(), _matrix_on(base, x.device), out, features, rows.stride(0), 1 / math.sqrt(block),
        BASE=base, POWER=power, STAGES=power.bit_length() - 1, MEMBERS=members, num_warps=warps,
    )  # fmt: skip
    return out.reshape(x.shape)


@cache
def _matrix_on(order: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(order).to(device).contiguous()
