"""What a quantizer is: the interface, and the value that it makes.

A quantizer works on a *rotated* weight, whose rows are close to Gaussian. Weights are cut into tiles of 16 x 16; each tile is coded on
its own, so that any range of tile rows or tile columns of a packed weight is a packed weight too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.rotation import Rotation

TILE = 16
"""Rows and columns of one tile."""

RingEncoder = Callable[[Tensor, int, int], Tensor]
"""`encoder(values [rings, steps, 2] float32, step_bits, window_bits) -> words [rings, steps * step_bits / 32] int32`."""


def tiles(features: int) -> int:
    """Number of tiles that cover `features` rows or columns."""
    return -(-features // TILE)


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight: everything that is stored of it.

    codes: one tensor per part of the quantizer, int32 [tile_rows, tile_columns, words]; the parts follow each other along the input axis.
    scales: bfloat16 [tile_rows * 16], one per output row, zero on padding rows. (Eight bits of mantissa cost 1e-6 of distortion; the
        exponent of float32 takes weights of any size.)
    rotation: the transform of the input axis, or None if the weight was quantized as it is.
    """

    out_features: int
    in_features: int
    quantizer: "Quantizer"
    codes: tuple[Tensor, ...]
    scales: Tensor
    rotation: Rotation | None = None

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, signs and all padding."""
        signs = self.rotation.nbytes if self.rotation is not None else 0
        return sum(c.numel() * 4 for c in self.codes) + self.scales.numel() * 2 + signs

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights of the original matrix."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def rotated(self) -> Tensor:
        """The weight in the rotated basis, float32 [out_features, in_features]."""
        return self.quantizer.dequantize(self)

    def restored(self) -> Tensor:
        """The weight in the original basis, float32 [out_features, in_features]."""
        w = self.rotated()
        return w if self.rotation is None else self.rotation.invert(w)

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on another device."""
        rotation = None if self.rotation is None else self.rotation.to(device)
        return replace(self, codes=tuple(c.to(device) for c in self.codes), scales=self.scales.to(device), rotation=rotation)


class Quantizer(ABC):
    """A way of storing a rotated weight in few bits. Implementations are frozen dataclasses: plain, hashable values.

    A quantizer has one or more *parts* along the input axis, each of one `UniformQuantizer`.
    """

    family: ClassVar[str]
    """Name of the operator family that runs it: 'trellis', 'scalar'."""

    @property
    @abstractmethod
    def rate(self) -> Fraction:
        """Nominal code bits per weight, without scales and padding."""

    @property
    @abstractmethod
    def distortion(self) -> float:
        """Expected mean squared error of a unit Gaussian. Never under 2^(-2 rate)."""

    @abstractmethod
    def parts(self, in_features: int) -> tuple[tuple["UniformQuantizer", int], ...]:
        """The uniform quantizers along the input axis, each with the number of tile columns that it covers (all positive)."""

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Exactly the `nbytes` of a weight of this shape, quantized with a rotation."""
        rows = tiles(out_features)
        codes = sum(rows * columns * part.tile_words * 4 for part, columns in self.parts(in_features))
        return codes + rows * TILE * 2 + Rotation.bytes_for(in_features)

    def quantize(self, weight: Tensor, encoder: RingEncoder | None = None) -> PackedWeight:
        """Quantize a rotated weight.

        weight: [out_features, in_features], any float dtype; finite. Rows of zeros are allowed.
        encoder: searches the trellis; by default the compiled CPU encoder.
        """
        if weight.ndim != 2 or weight.numel() == 0:
            raise QuantizerError(f"a weight must be a non-empty matrix, got shape {tuple(weight.shape)}")
        out_features, in_features = weight.shape
        rows, columns = tiles(out_features), tiles(in_features)
        deviation = weight.double().square().mean(dim=1).sqrt()
        unit = torch.zeros(rows * TILE, columns * TILE, dtype=torch.float32, device=weight.device)
        safe = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        unit[:out_features, :in_features] = (weight.double() / safe[:, None]).float()
        codes, decoded, start = [], torch.empty_like(unit), 0
        for part, width in self.parts(in_features):
            span = slice(start * TILE, (start + width) * TILE)
            codes.append(part.encode(unit[:, span], encoder))
            decoded[:, span] = part.decode(codes[-1])
            start += width
        # The best scale of each row, given its codes, is a least-squares fit.
        target, made = unit[:, :in_features].double(), decoded[:, :in_features].double()
        energy = made.square().sum(dim=1)
        fit = torch.where(energy > 0, (target * made).sum(dim=1) / energy.clamp_min(1e-30), torch.zeros_like(energy))
        scales = torch.zeros(rows * TILE, dtype=torch.float64, device=weight.device)
        scales[:out_features] = fit[:out_features] * deviation
        return PackedWeight(out_features, in_features, self, tuple(codes), scales.bfloat16())

    def dequantize(self, packed: PackedWeight) -> Tensor:
        """Decode: float32 [out_features, in_features], in the rotated basis."""
        parts = self.parts(packed.in_features)
        unit = torch.cat([part.decode(codes) for (part, _), codes in zip(parts, packed.codes, strict=True)], dim=1)
        return (unit * packed.scales.float()[:, None])[: packed.out_features, : packed.in_features]


class UniformQuantizer(Quantizer):
    """A quantizer of one part: every tile is coded in the same number of words."""

    @property
    @abstractmethod
    def tile_words(self) -> int:
        """32-bit words of one tile."""

    @abstractmethod
    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        """Code a unit-variance float32 [tile_rows * 16, tile_columns * 16] as int32 [tile_rows, tile_columns, tile_words]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Inverse of `encode` up to the distortion: float32 [tile_rows * 16, tile_columns * 16], bit-exact on every device."""

    def parts(self, in_features: int) -> tuple[tuple["UniformQuantizer", int], ...]:
        return ((self, tiles(in_features)),)
