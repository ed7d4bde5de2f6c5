"""Packing weights as a pure function, so that it may be evaluated anywhere: what it takes, and what is known of a weight then."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qpc.ir.linear import as_matrix
from qpc.kernels.encoder import encoder_for
from qpc.passes.shelf import Facts
from qpc.quant.feedback import Feedback, StackFeedback
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation
from qpc.quant.stacking import quantize_stacked
from qpc.quant.unfactored import Unfactored
from qpc.safetensors_source import OnDisk

MEASURED_WEIGHTS = 1 << 22
"""Weights whose errors are measured at a time, in float64."""


@dataclass(frozen=True)
class Parcel:
    """One weight to pack.

    values: of the parameter, or where they are. transposed: as `LinearSite` has it. rotation: of its inputs; None: it is rotated already.
    feedback: for it, or what that is made of; None: it is rounded on its own.
    """

    values: Tensor | OnDisk
    transposed: bool
    rotation: Rotation | None
    feedback: Feedback | StackFeedback | Unfactored | None = None

    def matrix(self) -> Tensor:
        """The weight as [out_features, in_features], in its own dtype."""
        return as_matrix(self.values if isinstance(self.values, Tensor) else self.values.read(), self.transposed)


@dataclass(frozen=True)
class Order:
    """Weights of one width that one quantizer packs together."""

    quantizer: Quantizer
    parcels: tuple[Parcel, ...]


def pack(order: Order) -> list[tuple[PackedWeight, Facts]]:
    """Rotate and quantize weights, and measure what came of it: for each the packed weight without its rotation, and the facts.

    The result for a weight does not depend on what is packed with it. Raises `QuantizerError` for a weight that cannot be quantized.
    """
    given = [parcel.feedback for parcel in order.parcels]  # made before weights are read, since it takes the most memory
    feedbacks = [each.feedback if isinstance(each, Unfactored) else each for each in given]
    rotated, kurtosis = [], []
    for parcel in order.parcels:
        weight = parcel.matrix()
        kurtosis.append(excess_kurtosis(weight))
        rotated.append(in_basis(parcel.rotation, weight))
        del weight
    found = quantize_stacked(order.quantizer, rotated, encoder_for(rotated[0].device), feedbacks)
    results = []
    for parcel, original, before, feedback, packed in zip(order.parcels, kurtosis, rotated, feedbacks, found, strict=True):
        made = packed.rotated()
        signs = 0 if parcel.rotation is None else parcel.rotation.nbytes
        facts = Facts(
            distortion=relative_error(before, made),
            weight_bytes=packed.nbytes + signs,
            kurtosis=(original, excess_kurtosis(before)),
            remaining=None if feedback is None else feedback.share_left(before, made, order.quantizer.distortion),
        )
        results.append((packed, facts))
        del made
    return results


def in_basis(rotation: Rotation | None, weight: Tensor) -> Tensor:
    """A weight in the basis that it is rounded in, float32; rotated some rows at a time, whose temporaries are small beside it."""
    if rotation is None:
        return weight.float()
    made = torch.empty(weight.shape, device=weight.device)
    for rows, into in zip(_row_slabs(weight), _row_slabs(made), strict=True):
        into.copy_(rotation.apply(rows.float()))
    return made


def excess_kurtosis(weight: Tensor) -> float:
    """Mean excess kurtosis of the rows; 0 for a Gaussian. Rows of zeros are left out."""
    found = []
    for rows in _row_slabs(weight):
        square = rows.double().square()
        variance = square.mean(dim=1)
        there = variance > 0
        found.append(square[there].square().mean(dim=1) / variance[there].square())
    each = torch.cat(found)
    return float(each.mean() - 3) if len(each) else 0.0


def relative_error(weight: Tensor, made: Tensor) -> float:
    """Squared error over squared norm; 0 for a weight of zeros."""
    norm, error = [], []
    for rows, ours in zip(_row_slabs(weight), _row_slabs(made), strict=True):
        wide = rows.double()
        norm.append(wide.square().sum(dim=1))
        error.append((wide - ours.double()).square().sum(dim=1))
    total = float(torch.cat(norm).sum())
    return float(torch.cat(error).sum()) / total if total > 0 else 0.0


def _row_slabs(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows that are measured together, so that what is computed in float64 needs little memory."""
    return torch.split(matrix, max(1, MEASURED_WEIGHTS // max(1, matrix.shape[1])))
