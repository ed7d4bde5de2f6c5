"""Multiplication by a scalar-quantized weight on a GPU: decoding and multiplying in one kernel.

A lane owns 32 consecutive weights: 2 rows of a 16 x 16 tile, which fill whole words. Levels come from a small table in the cache.
One launch takes 1, 2 or 4 rows of the activation; `cut_batch` cuts others into these.
Beyond `MAX_BATCH` the weight is decoded to memory once and multiplied by PyTorch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from qpc.kernels.computed_code import window_from, window_in_arc
from qpc.kernels.epilogue import finish, sum_splits
from qpc.kernels.launch import MAX_BATCH, MAX_PARTS, check_parts, choose_launch, cut_batch
from qpc.quant.quantizer import TILE
from qpc.quant.scalar import levels


@triton.jit
def _add_arcs(
    total, codes, levels, x, tile_row, columns, first, last, first_feature, features, x_stride,
    BITS: tl.constexpr, BATCH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the products of tile columns `first` to `last` of one part to `total`, a tuple of 2 sums per row of the activation."""
    lane = tl.arange(0, LANES)
    for start in range(first, last, LANES // 8):
        column = start + lane // 8
        tile = (tile_row.to(tl.int64) * columns + tl.minimum(column, last - 1)) * (8 * BITS)
        words = ()
        for i in tl.static_range(BITS):
            words += (tl.load(codes + tile + lane % 8 * BITS + i).to(tl.uint32, bitcast=True),)
        sums = ()
        for i in tl.static_range(2 * BATCH):
            sums += (total[i],)
        for inner in tl.static_range(16):
            feature = first_feature + column * 16 + inner
            xs = ()
            for item in tl.static_range(BATCH):
                value = tl.load(x + item * x_stride + feature, mask=(column < last) & (feature < features), other=0.0)
                xs += (value.to(tl.float32),)
            new = ()
            for row in tl.static_range(2):
                weight = tl.load(levels + window_in_arc(words, (row * 16 + inner) * BITS, BITS))
                for item in tl.static_range(BATCH):
                    new += (tl.fma(weight, xs[item], sums[row * BATCH + item]),)
            sums = new
        total = sums
    return total


@triton.jit
def _vector_kernel(
    x, codes_0, codes_1, levels_0, levels_1, scales, bias, out,
    columns_0, columns_1, chunk_0, chunk_1, features, out_features, x_stride, split_stride,
    BITS_0: tl.constexpr, BITS_1: tl.constexpr, BATCH: tl.constexpr, LANES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tile_row, split = tl.program_id(0), tl.program_id(1)
    total = ()
    for _ in tl.static_range(2 * BATCH):
        total += (tl.zeros((LANES,), tl.float32),)
    total = _add_arcs(
        total, codes_0, levels_0, x, tile_row, columns_0, split * chunk_0, tl.minimum((split + 1) * chunk_0, columns_0), 0,
        features, x_stride, BITS_0, BATCH, LANES,
    )  # fmt: skip
    if BITS_1 > 0:
        total = _add_arcs(
            total, codes_1, levels_1, x, tile_row, columns_1, split * chunk_1, tl.minimum((split + 1) * chunk_1, columns_1), columns_0 * 16,
            features, x_stride, BITS_1, BATCH, LANES,
        )  # fmt: skip
    rows = tile_row * 16 + tl.arange(0, 16)
    mask = rows < out_features
    for item in tl.static_range(BATCH):
        halves = tl.join(total[item], total[BATCH + item])
        result = tl.sum(tl.reshape(halves, (LANES // 8, 16)), axis=0)
        if not SPLIT:
            result = finish(result, rows, mask, scales, bias, HAS_BIAS)
        at = split.to(tl.int64) * split_stride + item * out_features
        tl.store(out + at + rows, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode_block(codes, levels, tile_row, columns, start, last, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Decode 16 rows by COLUMNS tile columns: float32 [16, 16 COLUMNS]."""
    row = tl.arange(0, 16)[:, None]
    inner = tl.arange(0, 16 * COLUMNS)[None, :]
    bit = (row * 16 + inner % 16) * BITS
    word = bit // 32
    tile = (tile_row.to(tl.int64) * columns + tl.minimum(start + inner // 16, last - 1)) * (8 * BITS)
    low = tl.load(codes + tile + word).to(tl.uint32, bitcast=True)
    high = tl.load(codes + tile + (word + 1) % (8 * BITS)).to(tl.uint32, bitcast=True)
    return tl.load(levels + window_from(low, high, bit % 32, BITS))


@triton.jit
def _dequantize_kernel(
    codes, levels, scales, out, columns, first_feature, features, out_features, out_stride, BITS: tl.constexpr, COLUMNS: tl.constexpr
):
    tile_row, start = tl.program_id(0), tl.program_id(1) * COLUMNS
    weights = _decode_block(codes, levels, tile_row, columns, start, columns, BITS, COLUMNS)
    row = (tile_row * 16 + tl.arange(0, 16))[:, None]
    local = tl.arange(0, 16 * COLUMNS)[None, :]
    feature = first_feature + start * 16 + local
    mask = (row < out_features) & (feature < features) & (start + local // 16 < columns)
    scale = tl.load(scales + row).to(tl.float32)
    at = out + row.to(tl.int64) * out_stride + feature
    tl.store(at, (weights * scale).to(out.dtype.element_ty), mask=mask)


def scalar_linear(x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], out_features: int) -> Tensor:
    """`qpc::scalar_linear` on a GPU; arguments as there, already checked."""
    check_parts(codes)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if len(rows) > MAX_BATCH:
        weight = scalar_dequantize(codes, scales, bits, out_features, x.shape[-1], x.dtype)
        out = functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        out = _small_batch(rows, [code.contiguous() for code in codes], scales.contiguous(), bias, bits, out_features)
    return out.reshape(*x.shape[:-1], out_features)


def scalar_dequantize(
    codes: list[Tensor], scales: Tensor, bits: list[int], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`qpc::scalar_dequantize` on a GPU; arguments as there, already checked."""
    out = torch.empty((out_features, in_features), dtype=dtype, device=scales.device)
    start, block = 0, 8
    for code, each in zip(codes, bits, strict=True):
        tile_rows, columns, _ = code.shape
        if columns:
            _dequantize_kernel[(tile_rows, triton.cdiv(columns, block))](
                code.contiguous(), _levels_on(each, scales.device), scales.contiguous(), out,
                columns, start * TILE, in_features, out_features, in_features, BITS=each, COLUMNS=block,
            )  # fmt: skip
        start += columns
    return out


@cache
def _levels_on(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return levels(bits).to(device)


def _small_batch(x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, bits: list[int], out_features: int) -> Tensor:
    batch, features = x.shape
    tile_rows = codes[0].shape[0]
    tables = [_levels_on(each, x.device) for each in bits]
    widths = [code.shape[1] for code in codes] + [0] * (MAX_PARTS - len(codes))
    bits = list(bits) + [0] * (MAX_PARTS - len(codes))
    launch = choose_launch(tile_rows, max(widths), 4, x.device)
    split = launch.splits > 1
    out = torch.empty((launch.splits, batch, out_features), dtype=torch.float32 if split else x.dtype, device=x.device)
    chunks = [-(-width // launch.splits) for width in widths]
    constants = {
        "BITS_0": bits[0], "BITS_1": bits[1], "LANES": 32 * launch.warps, "HAS_BIAS": bias is not None, "SPLIT": split,
        "num_warps": launch.warps,
    }  # fmt: skip
    for rows in cut_batch(batch):
        _vector_kernel[(tile_rows, launch.splits)](
            x[rows], codes[0], codes[-1], tables[0], tables[-1], scales, bias, out[:, rows],
            *widths, *chunks, features, out_features, x.stride(0), out.stride(0), BATCH=rows.stop - rows.start, **constants,
        )  # fmt: skip
    return sum_splits(out, scales, bias, x.dtype) if split else out[0]
