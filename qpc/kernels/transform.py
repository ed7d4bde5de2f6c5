"""Rotation, and a norm or gated activation before it, straight into the operand of the integer multiplication: one launch, float32 inside.

A block of the rotation is `H_outer (kron) H_power`. A program makes `MEMBERS` output rows of the outer factor, each of `POWER` values, and
for that reads its whole block; so a row is spread over several multiprocessors, which never wait for each other. The scale of a row must
then be known before its rotated values are. The rotation keeps the norm of a block, and under random signs a rotated value is beyond c root
mean squares with probability at most 2 exp(-c^2 / 2) (Hoeffding's inequality); never beyond sqrt(block) of them. So the scale holds
min(8, sqrt(block)) root mean squares of the block, which every program has summed up; what is beyond saturates. A row in a single program
can have the scale of its peak instead (`PEAK_SCALE`), about half as large.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.kernels.gate import GELU_CUBE, GELU_SLOPE, Activation
from qpc.kernels.operand import PEAK, PROJECTIONS, empty_operand
from qpc.kernels.select import Implementation, supports_one_launch
from qpc.quant.hadamard import factors, hadamard_matrix

CREST = 8.0
"""Root mean squares that the scale of a rotated block holds: a value is beyond with probability at most 2 exp(-32), 3e-14."""

_PEAK = tl.constexpr(float(PEAK))
_FIRST, _SECOND = (tl.constexpr(each) for each in zip(*PROJECTIONS, strict=True))
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it is rounded to the nearest integer, whose low bits are those of the sum."""
_ROUND_BITS = tl.constexpr(0x4B400000)
_SILU, _SLOPE, _CUBE = tl.constexpr(Activation.SILU.value), tl.constexpr(GELU_SLOPE), tl.constexpr(GELU_CUBE)


@triton.jit
def _digits(values, inverse):
    """Fixed-point values, int32, of float32 values over their scale."""
    scaled = tl.minimum(tl.maximum(values * inverse, -_PEAK), _PEAK)
    return (scaled + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def _projection(first, second, INDEX: tl.constexpr):
    """One of the eight projections of columns 2 pair and 2 pair + 1."""
    return first * _FIRST[INDEX] + second * _SECOND[INDEX]


@triton.jit
def _store_projections(words, first, second, inverse, pair, row, rows, mask):
    """Store the limbs of all projections of columns 2 pair and 2 pair + 1 of a row, over their scale."""
    for word in tl.static_range(2):
        high, low = tl.zeros_like(pair), tl.zeros_like(pair)
        for index in tl.static_range(4):
            digits = _digits(_projection(first, second, 4 * word + index), inverse)
            high |= (((digits + 128) >> 8) & 0xFF) << (8 * index)
            low |= (digits & 0xFF) << (8 * index)
        at = words + (pair // 8 * rows + row) * 32 + pair % 4 * 4 + 2 * word + pair // 4 % 2
        tl.store(at, high, mask=mask)
        tl.store(at + 16, low, mask=mask)


@triton.jit
def _rotated_pairs(values, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Sylvester's transform along groups of 2^STAGES consecutive values of a vector of SIZE; even and odd places, each [SIZE / 2]."""
    for back in tl.static_range(STAGES - 1):
        pairs = tl.permute(tl.reshape(values, (SIZE >> (STAGES - back), 2, 1 << (STAGES - 1 - back))), (0, 2, 1))
        first, second = tl.split(pairs)
        values = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (SIZE,))
    first, second = tl.split(tl.reshape(values, (SIZE // 2, 2)))
    return first + second, first - second


@triton.jit
def _largest(first, second):
    """Size of the largest projection of each pair of columns."""
    largest = tl.zeros_like(first)
    for index in tl.static_range(8):
        largest = tl.maximum(largest, tl.abs(_projection(first, second, index)))
    return largest


@triton.jit
def _load_pairs(x, row, x_stride, pair, features):
    """Columns 2 pair and 2 pair + 1 of a row, float32, zeros behind the last."""
    at = x + row * x_stride + 2 * pair
    first = tl.load(at, mask=2 * pair < features, other=0)
    return first.to(tl.float32), tl.load(at + 1, mask=2 * pair + 1 < features, other=0).to(tl.float32)


@triton.jit
def _pack_kernel(x, words, scales, features, rows, x_stride, CHUNK: tl.constexpr):
    """The operand of rows as they are; the scale is that of the peak. Programs (row, CHUNK columns) each look for the peak themselves."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, CHUNK // 2)
    largest = tl.zeros((CHUNK // 2,), tl.float32)
    for start in range(0, features, CHUNK):
        first, second = _load_pairs(x, row, x_stride, start // 2 + pair, features)
        largest = tl.maximum(largest, _largest(first, second)) + (first * 0 + second * 0)  # NaN if a value is not finite
    finite = tl.sum(largest * 0, 0)
    peak = tl.max(largest, 0)
    inverse = tl.where(peak > 0, _PEAK / peak, 0.0)
    tl.store(scales + row, peak / _PEAK + finite, mask=tl.program_id(1) == 0)
    pair += tl.program_id(1) * (CHUNK // 2)
    first, second = _load_pairs(x, row, x_stride, pair, features)
    _store_projections(words, first, second, inverse, pair, row, rows, pair < (features + 15) // 16 * 8)


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """An activation (`qpc.kernels.gate`) of float32 values."""
    logit = value if ACTIVATION == _SILU else value * (_SLOPE + _SLOPE * _CUBE * value * value)
    return value / (1 + tl.exp(-logit))


@triton.jit
def _read(x, second, weight, signs, hidden, row, octet, x_stride, second_stride, features, offset, keep,
          NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Values to be rotated, float32: with their signs, in front of a norm times its weight; and the values that are normalized.

    octet: [N], which eight features; returns [N, 8]. With a residual the sum is stored to `hidden` where `keep` is true.
    """
    feature = octet[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(x + row * x_stride + feature)
    if RESIDUAL:
        other = tl.load(second + row * second_stride + feature)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(hidden + row * features + feature, value, mask=keep & (feature >= 0))
    if ACTIVATION is not None:
        other = tl.load(second + row * second_stride + feature)
        activated = _activated(value.to(tl.float32), ACTIVATION).to(value.dtype)
        value = (activated.to(tl.float32) * other.to(tl.float32)).to(value.dtype)
    plain = value.to(tl.float32)
    signed = plain
    if NORM:
        signed = plain * (tl.load(weight + feature).to(tl.float32) + offset)
    byte = tl.load(signs + octet).to(tl.int32)
    flip = (byte[:, None] << (31 - tl.arange(0, 8))[None, :]) & -0x80000000
    return (signed.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True), plain


@triton.jit(do_not_specialize=["rows"])
def _transform_kernel(
    x, second, weight, signs, matrix, hidden, words, scales, features, rows, x_stride, second_stride, eps, offset, crest,
    OUTER: tl.constexpr, POWER: tl.constexpr, STAGES: tl.constexpr, MEMBERS: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PEAK_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (members of the outer factor, row). second: the residual, or what the activation of x gates. crest: root mean squares that
    the scale holds, unless PEAK_SCALE."""
    SIZE: tl.constexpr = MEMBERS * POWER
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    member = tl.program_id(0) * MEMBERS + tl.arange(0, MEMBERS)
    octet = tl.arange(0, POWER // 8)
    acc = tl.zeros((MEMBERS, POWER // 8, 8), tl.float32)
    squares = tl.zeros((POWER // 8, 8), tl.float32)
    energies = tl.zeros((POWER // 8, 8), tl.float32)
    for source in tl.static_range(OUTER):
        value, plain = _read(
            x, second, weight, signs, hidden, row, source * (POWER // 8) + octet, x_stride, second_stride, features, offset,
            source // MEMBERS == tl.program_id(0), NORM, RESIDUAL, ACTIVATION,
        )  # fmt: skip
        if NORM:
            squares += plain * plain
        energies += value * value
        if OUTER == 1:
            acc += value[None, :, :]
        else:
            acc += tl.load(matrix + member * OUTER + source, mask=member < OUTER, other=0)[:, None, None] * value[None, :, :]
    first, second = _rotated_pairs(tl.reshape(acc, (SIZE,)), SIZE, STAGES)
    peak = tl.max(_largest(first, second), 0) if PEAK_SCALE else crest * tl.sqrt(tl.sum(tl.reshape(energies, (POWER,)), 0))
    inverse = tl.where(peak > 0, _PEAK / peak, 0.0)
    scale = peak / _PEAK * tl.rsqrt(1.0 * features)
    if NORM:
        scale = scale * tl.rsqrt(tl.sum(tl.reshape(squares, (POWER,)), 0) / features + eps)
    tl.store(scales + row, scale, mask=tl.program_id(0) == 0)
    pair = tl.program_id(0) * (SIZE // 2) + tl.arange(0, SIZE // 2)
    _store_projections(words, first, second, inverse, pair, row, rows, pair < features // 2)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in front of the rotation: `(x + residual) / rms * (weight + offset)`, rms with eps inside the root."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    residual: Tensor | None = None


@dataclass(frozen=True)
class Gate:
    """A gated activation in front of the rotation: `activation(x) * up`, rounded to the dtype of x behind each of the two."""

    up: Tensor
    activation: Activation


Front = Norm | Gate | None
"""What lies in front of the rotation."""


def front_arguments(x: Tensor, front: Front) -> dict[str, Any]:
    """Arguments of both kernels for what lies in front of the rotation of x [batch, features]; `hidden`: the sum with a residual, or x."""
    norm, gate = front if isinstance(front, Norm) else None, front if isinstance(front, Gate) else None
    residual = None if norm is None else norm.residual
    second = residual if gate is None else gate.up
    return {
        "second": second,
        "second_stride": 0 if second is None else second.stride(0),
        "weight": None if norm is None else norm.weight,
        "eps": 0.0 if norm is None else norm.eps,
        "offset": 0.0 if norm is None else norm.offset,
        "hidden": x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device),
        "NORM": norm is not None,
        "RESIDUAL": residual is not None,
        "ACTIVATION": None if gate is None else gate.activation.value,
    }


@dataclass(frozen=True)
class Plan:
    """How a block is cut: `H_outer (kron) H_power`, members of the outer factor in a program."""

    outer: int
    power: int
    members: int
    warps: int
    peak_scale: bool = False

    @property
    def programs(self) -> int:
        """Programs of a row."""
        return -(-self.outer // self.members)


def plan(features: int, block: int) -> Plan | None:
    """How to transform a row in one launch, or None where it takes more than one (`supports_one_launch`)."""
    if supports_one_launch(features, block).implementation is not Implementation.TRITON:
        return None
    inner = min(factors(block)[1], MAX_POWER)
    outer = features // inner
    members = min(triton.next_power_of_2(outer), max(1, MIN_VALUES // inner))
    return Plan(outer, inner, members, max(1, min(8, members * inner // 128)))


MAX_POWER = 1024
MIN_VALUES = 512


PACK_CHUNK = 2048
"""Columns that one program packs."""


def transform(x: Tensor, signs: Tensor, block: int, front: Front = None, cut: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Words and scales of the operand of the rotated rows x [batch, features], and the sum with the residual (else `x` itself)."""
    batch, features = x.shape
    cut = plan(features, block) if cut is None else cut
    assert cut is not None
    words, scales = empty_operand(batch, features, x.device)
    given = front_arguments(x, front)
    _transform_kernel[(cut.programs, batch)](
        x, signs=signs, matrix=outer_matrix(cut.outer, block, x.device), words=words, scales=scales, features=features,
        rows=words.shape[1], x_stride=x.stride(0), crest=min(CREST, block**0.5), **given,
        OUTER=cut.outer, POWER=cut.power, STAGES=cut.power.bit_length() - 1, MEMBERS=cut.members, PEAK_SCALE=cut.peak_scale, PDL=False,
        num_warps=cut.warps,
    )  # fmt: skip
    return words, scales, given["hidden"]


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Words and scales of the operand of rows x [batch, features] as they are, by the scale of the peak."""
    batch, features = x.shape
    words, scales = empty_operand(batch, features, x.device)
    chunk = max(32, min(PACK_CHUNK, triton.next_power_of_2(features)))
    grid = (batch, triton.cdiv(features, chunk))
    _pack_kernel[grid](x, words, scales, features, words.shape[1], x.stride(0), CHUNK=chunk, num_warps=max(1, chunk // 256))
    return words, scales


@cache
def outer_matrix(outer: int, block: int, device: torch.device, transpose: bool = False) -> Tensor:
    """The outer factor of a block, float32 [outer, outer]: the base times the highest part of the power of two."""
    base, _ = factors(block)
    with torch.inference_mode(False):
        matrix = torch.kron(hadamard_matrix(base), hadamard_matrix(outer // base)).float()
        return (matrix.T.contiguous() if transpose else matrix).to(device)  # last, so that no kernel that still runs writes to it
