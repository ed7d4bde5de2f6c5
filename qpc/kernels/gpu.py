"""The GPU path: decoding and multiplying in one kernel, for every family of quantizers.

A lane owns an *arc* of a block: what two neighbouring lanes of the layout hold, 8 rows by 4 pairs of columns. All shifts within an arc are
constant, and no weight moves between lanes. One launch takes 1, 2 or 4 rows of the activation; `cut_batch` cuts others into these.
Where `qpc.kernels.fused` can multiply on integer tensor cores, it does so instead, and beyond `MAX_BATCH` `qpc.kernels.large_batch`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.kernels import fused, large_batch, transform
from qpc.kernels.code import NO_CODE, code_of, table_of
from qpc.kernels.decode import decode_in_arc, load_arc, place_in_arc
from qpc.kernels.dequantize import dequantize as dequantize
from qpc.kernels.epilogue import finish, sum_splits
from qpc.kernels.launch import MAX_BATCH, MAX_PARTS, check_parts, choose_launch, cut_batch
from qpc.quant.quantizer import UniformQuantizer

COLUMNS_PER_WARP = 2
"""Block columns that the lanes of a warp hold together in a multiplication."""


@triton.jit
def _add_arcs(
    total, codes, table, x, block_row, columns, first, last, first_feature, features, x_stride,
    BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, DIMENSION: tl.constexpr, BATCH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the products of block columns `first` to `last` of one part to `total`, a tuple of 8 sums per row of the activation.

    Sum r of a lane belongs to row 8 r + lane % 8 of the block.
    """
    lane = tl.arange(0, LANES)
    side = lane // 8 % 2
    for start in range(first, last, LANES // 16):
        column = start + lane // 16
        block = block_row.to(tl.int64) * columns + tl.minimum(column, last - 1)
        words = load_arc(codes, block, lane % 8 * 2 + side, BITS, WINDOW_BITS, DIMENSION)
        sums = ()
        for i in tl.static_range(8 * BATCH):
            sums += (total[i],)
        for pair in tl.static_range(4):
            feature = first_feature + column * 16 + side * 4 + pair // 2 * 2 + pair % 2 * 8
            xs = ()
            for item in tl.static_range(BATCH):
                at = x + item * x_stride + feature
                xs += (tl.load(at, mask=(column < last) & (feature < features), other=0.0).to(tl.float32),)
                xs += (tl.load(at + 1, mask=(column < last) & (feature + 1 < features), other=0.0).to(tl.float32),)
            new = ()
            for row in tl.static_range(8):
                even, odd = decode_in_arc(words, table, place_in_arc(row, pair), BITS, WINDOW_BITS, DIMENSION)
                for item in tl.static_range(BATCH):
                    new += (tl.fma(odd, xs[2 * item + 1], tl.fma(even, xs[2 * item], sums[row * BATCH + item])),)
            sums = new
        total = sums
    return total


@triton.jit
def _scaled(total, factor):
    """Every sum times `factor`."""
    result = ()
    for i in tl.static_range(len(total)):
        result += (total[i] * factor,)
    return result


@triton.jit
def _vector_kernel(
    x, codes_0, codes_1, table_0, table_1, scales, bias, out,
    columns_0, columns_1, chunk_0, chunk_1, features, out_features, x_stride, split_stride,
    BITS_0: tl.constexpr, BITS_1: tl.constexpr, WINDOW_BITS_0: tl.constexpr, WINDOW_BITS_1: tl.constexpr,
    UNIT_0: tl.constexpr, UNIT_1: tl.constexpr, DIMENSION: tl.constexpr,
    BATCH: tl.constexpr, LANES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    block_row, split = tl.program_id(0), tl.program_id(1)
    total = ()
    for _ in tl.static_range(8 * BATCH):
        total += (tl.zeros((LANES,), tl.float32),)
    total = _add_arcs(
        total, codes_0, table_0, x, block_row, columns_0, split * chunk_0, tl.minimum((split + 1) * chunk_0, columns_0), 0,
        features, x_stride, BITS_0, WINDOW_BITS_0, DIMENSION, BATCH, LANES,
    )  # fmt: skip
    if BITS_1 > 0:
        total = _scaled(total, UNIT_0 / UNIT_1)
        total = _add_arcs(
            total, codes_1, table_1, x, block_row, columns_1, split * chunk_1, tl.minimum((split + 1) * chunk_1, columns_1), columns_0 * 16,
            features, x_stride, BITS_1, WINDOW_BITS_1, DIMENSION, BATCH, LANES,
        )  # fmt: skip
    unit: tl.constexpr = UNIT_1 if BITS_1 > 0 else UNIT_0
    row = tl.arange(0, 8)[:, None] + 8 * (tl.arange(0, 2)[None, :])
    for quarter in tl.static_range(4):
        rows = block_row * 64 + quarter * 16 + row
        mask = rows < out_features
        for item in tl.static_range(BATCH):
            halves = tl.join(total[2 * quarter * BATCH + item], total[(2 * quarter + 1) * BATCH + item])
            result = tl.sum(tl.reshape(halves, (LANES // 8, 8, 2)), axis=0) * unit
            if not SPLIT:
                result = finish(result, rows, mask, scales, bias, HAS_BIAS)
            at = split.to(tl.int64) * split_stride + item * out_features
            tl.store(out + at + rows, result.to(out.dtype.element_ty), mask=mask)


def linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: Sequence[UniformQuantizer], out_features: int
) -> Tensor:
    """`x @ w.T + bias` with a packed weight. x: [..., in_features]; returns [..., out_features]. Raises `KernelError`."""
    check_parts(codes)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if fused.supports(quantizers, len(rows), x.dtype, x.device).implementation is not None:
        out = fused.multiply(*transform.pack(rows), codes, scales, bias, quantizers, out_features, x.dtype)
    elif len(rows) > MAX_BATCH:
        out = large_batch.multiply(rows, codes, scales, bias, quantizers, out_features)
    else:
        out = _small_batch(rows, [code.contiguous() for code in codes], scales.contiguous(), bias, quantizers, out_features)
    return out.reshape(*x.shape[:-1], out_features)


def _small_batch(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: Sequence[UniformQuantizer], out_features: int
) -> Tensor:
    batch, features = x.shape
    rows = codes[0].shape[0]
    absent = MAX_PARTS - len(codes)
    widths = [code.shape[1] for code in codes] + [0] * absent
    tables = [table_of(quantizer, x.device) for quantizer in quantizers]
    first, second = [code_of(quantizer) for quantizer in quantizers] + [NO_CODE] * absent
    launch = choose_launch(rows, max(widths), COLUMNS_PER_WARP, x.device)
    split = launch.splits > 1
    out = torch.empty((launch.splits, batch, out_features), dtype=torch.float32 if split else x.dtype, device=x.device)
    chunks = [-(-width // launch.splits) for width in widths]
    constants = {
        "BITS_0": first.bits, "BITS_1": second.bits, "WINDOW_BITS_0": first.window_bits, "WINDOW_BITS_1": second.window_bits,
        "UNIT_0": first.unit, "UNIT_1": second.unit, "DIMENSION": first.dimension,
        "LANES": 32 * launch.warps, "HAS_BIAS": bias is not None, "SPLIT": split, "num_warps": launch.warps,
    }  # fmt: skip
    for cut in cut_batch(batch):
        _vector_kernel[(rows, launch.splits)](
            x[cut], codes[0], codes[-1], tables[0], tables[-1], scales, bias, out[:, cut],
            *widths, *chunks, features, out_features, x.stride(0), out.stride(0), BATCH=cut.stop - cut.start, **constants,
        )  # fmt: skip
    return sum_splits(out, scales, bias, x.dtype) if split else out[0]
