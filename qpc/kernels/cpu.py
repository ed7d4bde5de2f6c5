"""The CPU path: decode a weight once, keep it, and let the BLAS multiply.

Decoding on a CPU costs far more than the product, so a dequantized copy in the dtype of the activation stays in memory from the first use:
2 to 4 bytes per weight on top of the codes. It belongs to the storage of the codes and is freed with it, whichever tensor held it last;
`drop_cache` frees all copies sooner, `cache_bytes` counts them. A row range of a larger weight has a copy of its own.

A copy is found by the place, shape and version of the codes and scales, and holds weak references to their storages, so that neither a new
tensor at an old address nor an in-place change is ever answered with stale weights. PyTorch does not track the versions of tensors made
in inference mode, nor changes made through `.data`: call `drop_cache` after such a change.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from qpc.kernels import reference
from qpc.quant.experts import multiply_by_expert
from qpc.quant.hadamard import hadamard_transform
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.rotation import unpack_signs

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Copy:
    """A decoded weight, the versions of its sources, and their storages, whose addresses are not reused while a weak reference lives."""

    weight: Tensor
    versions: list[int]
    storages: list[StorageWeakRef]

    def stale(self, versions: list[int]) -> bool:
        return versions != self.versions or any(storage.expired() for storage in self.storages)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _Copies:
    """The decoded weights of all views of one storage; lives as an attribute of that storage."""

    by_place: dict[Key, _Copy] = field(default_factory=dict)


_ATTRIBUTE = "_qpc_decoded"
_everywhere: "weakref.WeakSet[_Copies]" = weakref.WeakSet()


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """`H (s * x) / sqrt(block)` in each block of the last axis; computes in float32, or float64 for float64."""
    work = torch.promote_types(x.dtype, torch.float32)
    return hadamard_transform(x.to(work) * unpack_signs(signs, x.shape[-1], work), block).to(x.dtype).contiguous()


def dequantize(
    codes: list[Tensor],
    scales: Tensor,
    quantizers: list[UniformQuantizer],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The decoded weight in the rotated basis: a new [out_features, in_features] of `dtype`."""
    return reference.dequantize(codes, scales, quantizers, out_features, in_features, dtype).contiguous()


def linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, bias: Tensor | None, quantizers: list[UniformQuantizer], out_features: int
) -> Tensor:
    """`x @ w.T + bias` with the kept copy of the decoded weight. x: [..., in_features]; returns [..., out_features]."""
    weight = _decoded(codes, scales, quantizers, out_features, x.shape[-1], x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


def expert_linear(
    x: Tensor, codes: list[Tensor], scales: Tensor, expert: Tensor, quantizers: list[UniformQuantizer], out_features: int, experts: int
) -> Tensor:
    """Each row of `x` by the matrix of its expert, with the kept copy of the whole decoded stack. Returns [rows, out_features]."""
    weight = _decoded(codes, scales, quantizers, experts * out_features, x.shape[-1], x.dtype)
    return multiply_by_expert(x, weight.view(experts, out_features, -1), expert)


def cache_bytes() -> int:
    """Bytes of all decoded weights in memory."""
    return sum(copy.weight.nbytes for copies in _everywhere for copy in copies.by_place.values())


def drop_cache() -> None:
    """Free all decoded weights; the next use decodes again."""
    for copies in list(_everywhere):
        copies.by_place.clear()


def _decoded(
    codes: list[Tensor],
    scales: Tensor,
    quantizers: list[UniformQuantizer],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    storage = codes[0].untyped_storage()
    copies = getattr(storage, _ATTRIBUTE, None)
    if copies is None:
        copies = _Copies()
        setattr(storage, _ATTRIBUTE, copies)
        _everywhere.add(copies)
    sources = [*codes, scales]
    place: Key = (out_features, in_features, dtype, *quantizers, *(_place(source) for source in sources))
    versions = [0 if source.is_inference() else source._version for source in sources]
    found = copies.by_place.get(place)
    if found is None or found.stale(versions):
        weight = dequantize(codes, scales, quantizers, out_features, in_features, dtype)
        storages = [StorageWeakRef(source.untyped_storage()) for source in sources]  # type: ignore[no-untyped-call]
        found = _Copy(weight, versions, storages)
        copies.by_place[place] = found
    return found.weight


def _place(tensor: Tensor) -> Key:
    return (tensor.untyped_storage()._cdata, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
