"""Multiplication by a trellis-coded weight on a GPU: decoding and multiplying in one kernel.

A lane owns an *arc*: 32 consecutive windows of a ring, which are 4 rows of a 16 x 16 tile. An arc starts at a word, so that every shift is
a constant, and no weight moves between lanes. One launch takes 1, 2 or 4 rows of the activation; `cut_batch` cuts others into these.
Beyond `MAX_BATCH` the weight is decoded to memory once and multiplied by PyTorch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from qpc.kernels.computed_code import decode_window, window_from, window_in_arc
from qpc.kernels.epilogue import finish, sum_splits
from qpc.kernels.launch import MAX_BATCH, MAX_PARTS, check_parts, choose_launch, cut_batch
from qpc.quant.quantizer import TILE
from qpc.quant.trellis import TrellisQuantizer


@triton.jit
def _add_arcs(
    total, codes, x, tile_row, columns, first, last, first_feature, features, x_stride,
    STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, UNIT: tl.constexpr, BATCH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the products of tile columns `first` to `last` of one part to `total`, a tuple of 4 sums per row of the activation."""
    lane = tl.arange(0, LANES)
    arc = lane % 4
    acc = ()
    for _ in tl.static_range(4 * BATCH):
        acc += (tl.zeros((LANES,), tl.float32),)
    for start in range(first, last, LANES // 4):
        column = start + lane // 4
        tile = (tile_row.to(tl.int64) * columns + tl.minimum(column, last - 1)) * (4 * STEP_BITS)
        words = ()
        for i in tl.static_range(STEP_BITS):
            words += (tl.load(codes + tile + arc * STEP_BITS + i).to(tl.uint32, bitcast=True),)
        words += (tl.load(codes + tile + (arc + 1) % 4 * STEP_BITS).to(tl.uint32, bitcast=True),)
        sums = ()
        for i in tl.static_range(4 * BATCH):
            sums += (acc[i],)
        for pair in tl.static_range(8):
            feature = first_feature + column * 16 + 2 * pair
            here = column < last
            xs = ()
            for item in tl.static_range(BATCH):
                at = x + item * x_stride + feature
                xs += (tl.load(at, mask=here & (feature < features), other=0.0).to(tl.float32),)
                xs += (tl.load(at + 1, mask=here & (feature + 1 < features), other=0.0).to(tl.float32),)
            new = ()
            for row in tl.static_range(4):
                even, odd = decode_window(window_in_arc(words, (row * 8 + pair) * STEP_BITS, WINDOW_BITS))
                for item in tl.static_range(BATCH):
                    grown = tl.fma(even.to(tl.float32), xs[2 * item], sums[row * BATCH + item])
                    new += (tl.fma(odd.to(tl.float32), xs[2 * item + 1], grown),)
            sums = new
        acc = sums
    result = ()
    for i in tl.static_range(4 * BATCH):
        result += (total[i] + acc[i] * UNIT,)
    return result


@triton.jit
def _vector_kernel(
    x, codes_0, codes_1, scales, bias, out, columns_0, columns_1, chunk_0, chunk_1, features, out_features, x_stride, split_stride,
    STEP_BITS_0: tl.constexpr, STEP_BITS_1: tl.constexpr, WINDOW_BITS: tl.constexpr, UNIT_0: tl.constexpr, UNIT_1: tl.constexpr,
    BATCH: tl.constexpr, LANES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tile_row, split = tl.program_id(0), tl.program_id(1)
    total = ()
    for _ in tl.static_range(4 * BATCH):
        total += (tl.zeros((LANES,), tl.float32),)
    total = _add_arcs(
        total, codes_0, x, tile_row, columns_0, split * chunk_0, tl.minimum((split + 1) * chunk_0, columns_0), 0,
        features, x_stride, STEP_BITS_0, WINDOW_BITS, UNIT_0, BATCH, LANES,
    )  # fmt: skip
    if STEP_BITS_1 > 0:
        total = _add_arcs(
            total, codes_1, x, tile_row, columns_1, split * chunk_1, tl.minimum((split + 1) * chunk_1, columns_1), columns_0 * 16,
            features, x_stride, STEP_BITS_1, WINDOW_BITS, UNIT_1, BATCH, LANES,
        )  # fmt: skip
    rows = tile_row * 16 + tl.arange(0, 16)
    mask = rows < out_features
    for item in tl.static_range(BATCH):
        quarters = tl.join(tl.join(total[item], total[2 * BATCH + item]), tl.join(total[BATCH + item], total[3 * BATCH + item]))
        result = tl.sum(tl.reshape(quarters, (LANES // 4, 16)), axis=0)
        if not SPLIT:
            result = finish(result, rows, mask, scales, bias, HAS_BIAS)
        at = split.to(tl.int64) * split_stride + item * out_features
        tl.store(out + at + rows, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode_block(
    codes, tile_row, columns, start, last, STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Decode 16 ROWS rows by COLUMNS tile columns: two int32 [16 ROWS, 8 COLUMNS], the even and the odd columns."""
    row = tl.arange(0, 16 * ROWS)[:, None]
    pair = tl.arange(0, 8 * COLUMNS)[None, :]
    bit = (row % 16 * 8 + pair % 8) * STEP_BITS
    word, offset = bit // 32, bit % 32
    tile = ((tile_row + row // 16).to(tl.int64) * columns + tl.minimum(start + pair // 8, last - 1)) * (4 * STEP_BITS)
    low = tl.load(codes + tile + word).to(tl.uint32, bitcast=True)
    high = tl.load(codes + tile + (word + 1) % (4 * STEP_BITS)).to(tl.uint32, bitcast=True)
    return decode_window(window_from(low, high, offset, WINDOW_BITS))


@triton.jit
def _dequantize_kernel(
    codes, scales, out, columns, first_feature, features, out_features, out_stride,
    STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile_row, start = tl.program_id(0), tl.program_id(1) * COLUMNS
    even, odd = _decode_block(codes, tile_row, columns, start, columns, STEP_BITS, WINDOW_BITS, 1, COLUMNS)
    weights = tl.reshape(tl.join(even, odd), (16, 16 * COLUMNS)).to(tl.float32) * UNIT
    row = (tile_row * 16 + tl.arange(0, 16))[:, None]
    local = tl.arange(0, 16 * COLUMNS)[None, :]
    feature = first_feature + start * 16 + local
    mask = (row < out_features) & (feature < features) & (start + local // 16 < columns)
    scale = tl.load(scales + row).to(tl.float32)
    at = out + row.to(tl.int64) * out_stride + feature
    tl.store(at, (weights * scale).to(out.dtype.element_ty), mask=mask)


def trellis_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, step_bits: list[int], window_bits: int, out_features: int
) -> Tensor:
    """`qpc::trellis_linear` on a GPU; arguments as there, already checked."""
    check_parts(codes)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if len(rows) > MAX_BATCH:
        weight = trellis_dequantize(codes, scales, step_bits, window_bits, out_features, x.shape[-1], x.dtype)
        out = functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        out = _small_batch(rows, [code.contiguous() for code in codes], scales.contiguous(), bias, step_bits, window_bits, out_features)
    return out.reshape(*x.shape[:-1], out_features)


def trellis_dequantize(
    codes: list[Tensor], scales: Tensor, step_bits: list[int], window_bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`qpc::trellis_dequantize` on a GPU; arguments as there, already checked."""
    out = torch.empty((out_features, in_features), dtype=dtype, device=scales.device)
    start, block = 0, 8
    for code, bits in zip(codes, step_bits, strict=True):
        tile_rows, columns, _ = code.shape
        if columns:
            _dequantize_kernel[(tile_rows, triton.cdiv(columns, block))](
                code.contiguous(), scales.contiguous(), out, columns, start * TILE, in_features, out_features, in_features,
                STEP_BITS=bits, WINDOW_BITS=window_bits, UNIT=TrellisQuantizer(bits, window_bits).unit, COLUMNS=block,
            )  # fmt: skip
        start += columns
    return out


def _small_batch(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, step_bits: list[int], window_bits: int, out_features: int
) -> Tensor:
    batch, features = x.shape
    tile_rows = codes[0].shape[0]
    widths = [code.shape[1] for code in codes] + [0] * (MAX_PARTS - len(codes))
    bits = list(step_bits) + [0] * (MAX_PARTS - len(codes))
    units = [TrellisQuantizer(each, window_bits).unit if each else 0.0 for each in bits]
    launch = choose_launch(tile_rows, max(widths), 8, x.device)
    split = launch.splits > 1
    out = torch.empty((launch.splits, batch, out_features), dtype=torch.float32 if split else x.dtype, device=x.device)
    chunks = [-(-width // launch.splits) for width in widths]
    constants = {
        "STEP_BITS_0": bits[0], "STEP_BITS_1": bits[1], "WINDOW_BITS": window_bits, "UNIT_0": units[0], "UNIT_1": units[1],
        "LANES": 32 * launch.warps, "HAS_BIAS": bias is not None, "SPLIT": split, "num_warps": launch.warps,
    }  # fmt: skip
    for rows in cut_batch(batch):
        _vector_kernel[(tile_rows, launch.splits)](
            x[rows], codes[0], codes[-1], scales, bias, out[:, rows], *widths, *chunks, features, out_features, x.stride(0), out.stride(0),
            BATCH=rows.stop - rows.start, **constants,
        )  # fmt: skip
    return sum_splits(out, scales, bias, x.dtype) if split else out[0]
