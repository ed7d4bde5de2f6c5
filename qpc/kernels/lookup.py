"""The operators that look rows up in a packed table: one per quantizer family, each with its fake.

They decode only the rows that are asked for, in PyTorch on any device, and undo the rotation; what a whole decoded table would give at
these rows is their oracle.
"""

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels.ops import check_weight, scalar_parts
from qpc.quant.quantizer import PackedWeight, Quantizer, UniformQuantizer
from qpc.quant.rotation import Rotation
from qpc.quant.rows import decode_rows
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer

CHUNK_WEIGHTS = 1 << 22
"""Weights that are decoded at a time, which bounds the memory of the temporaries."""


def lookup_operator(quantizer: Quantizer, features: int) -> tuple[torch._ops.OpOverload, tuple[object, ...]]:
    """The operator that looks up rows of a quantizer's family, and its arguments that describe the code."""
    parts = [part for part, _ in quantizer.parts(features)]
    trellis = [part for part in parts if isinstance(part, TrellisQuantizer)]
    if len(trellis) == len(parts):
        return torch.ops.qpc.trellis_lookup.default, ([part.step_bits for part in trellis], [part.window_bits for part in trellis])
    scalar = [part for part in parts if isinstance(part, ScalarQuantizer)]
    assert len(scalar) == len(parts), f"the parts of {quantizer} are of several families"
    return torch.ops.qpc.scalar_lookup.default, ([part.bits for part in scalar],)


def reference_lookup(indices: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The oracle: rows of the whole restored table. indices: int64 [...]; returns [..., in_features] of `dtype`."""
    return packed.restored()[indices.long()].to(dtype)


@torch.library.custom_op("qpc::trellis_lookup", mutates_args=())
def trellis_lookup(
    indices: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    signs: Tensor,
    block: int,
    step_bits: list[int],
    window_bits: list[int],
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a trellis-coded table, in the original basis.

    indices: int32 or int64 [...], from 0 to rows - 1 (checked on a CPU only). codes, scales: those of a weight [rows, features], as in
    `trellis_linear`. signs, block: of its rotation; block 0 means none. Returns [..., features] of `dtype`. Raises `KernelError`.
    """
    return _lookup(indices, codes, scales, signs, block, _trellis_parts(step_bits, window_bits), rows, features, dtype)


@trellis_lookup.register_fake
def _(
    indices: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    signs: Tensor,
    block: int,
    step_bits: list[int],
    window_bits: list[int],
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, codes, scales, signs, block, _trellis_parts(step_bits, window_bits), rows, features)
    return scales.new_empty((*indices.shape, features), dtype=dtype)


@torch.library.custom_op("qpc::scalar_lookup", mutates_args=())
def scalar_lookup(
    indices: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    signs: Tensor,
    block: int,
    bits: list[int],
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a scalar-quantized table: as `trellis_lookup`, with codes as in `scalar_linear`."""
    return _lookup(indices, codes, scales, signs, block, scalar_parts(bits), rows, features, dtype)


@scalar_lookup.register_fake
def _(
    indices: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    signs: Tensor,
    block: int,
    bits: list[int],
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, codes, scales, signs, block, scalar_parts(bits), rows, features)
    return scales.new_empty((*indices.shape, features), dtype=dtype)


def _trellis_parts(step_bits: list[int], window_bits: list[int]) -> list[UniformQuantizer]:
    return [TrellisQuantizer(step, window) for step, window in zip(step_bits, window_bits, strict=True)]


def _lookup(
    indices: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    signs: Tensor,
    block: int,
    parts: list[UniformQuantizer],
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, codes, scales, signs, block, parts, rows, features)
    flat = indices.reshape(-1).long()
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise KernelError(f"lookup: indices reach from {int(flat.min())} to {int(flat.max())}; the table has {rows} rows")
    rotation = Rotation(features, block, signs) if block else None
    out = torch.empty(len(flat), features, dtype=dtype, device=scales.device)
    count = max(1, CHUNK_WEIGHTS // features)
    for start in range(0, len(flat), count):
        chosen = flat[start : start + count]
        unit = torch.cat([decode_rows(part, code, chosen) for part, code in zip(parts, codes, strict=True)], dim=1)[:, :features]
        turned = unit * scales[chosen, None].float()
        out[start : start + count] = turned if rotation is None else rotation.invert(turned)
    return out.reshape(*indices.shape, features)


def _check(
    indices: Tensor, codes: list[Tensor], scales: Tensor, signs: Tensor, block: int, parts: list[UniformQuantizer], rows: int, features: int
) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    check_weight(codes, scales, parts, rows, features)
    if indices.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"lookup: indices are {indices.dtype}, required int32 or int64")
    if block and features % block:
        raise KernelError(f"lookup: {features=} must be divisible by {block=}")
    required = Rotation.bytes_for(features) if block else 0
    if signs.dtype != torch.uint8 or signs.ndim != 1 or signs.shape[0] != required:
        raise KernelError(f"lookup: signs are {signs.dtype} {tuple(signs.shape)}, required uint8 ({required},)")
    for name, tensor in (("indices", indices), ("signs", signs)):
        if tensor.device != scales.device:
            raise KernelError(f"lookup: {name} are on {tensor.device}, the table is on {scales.device}; move them to one device")
