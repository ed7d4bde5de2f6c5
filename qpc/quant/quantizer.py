"""What a quantizer is: the interface, and the value that it makes.

A quantizer works on a *rotated* weight, whose rows are close to Gaussian. Weights are cut into the blocks of `layout`; each block is coded
on its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.feedback import row_deviations
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.rotation import Rotation
from qpc.quant.rounding import RowFeedback

SLAB_WEIGHTS = 1 << 23
"""Weights that are quantized at a time on a CPU."""

DECODED_WEIGHTS = 1 << 21
"""Weights that are decoded at a time there, each of which takes some tens of bytes meanwhile."""

GPU_SLAB_WEIGHTS = 1 << 25
"""The same on a GPU, both; it wants more rings at once."""

RingEncoder = Callable[[Tensor, int, int], Tensor]
"""`encoder(values [rings, steps, 2] float32, step_bits, window_bits) -> words [rings, steps * step_bits / 32] int32`."""


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight: everything that is stored of it.

    codes: one tensor per part of the quantizer, int32 [row_blocks, column_blocks, words]; the parts follow each other along the input axis.
    scales: bfloat16 [row_blocks * 64], one per output row, zero on padding rows. (Eight bits of mantissa cost 3e-6 of distortion; the
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
    """Name of the operator family that runs it: 'trellis', 'vector', 'scalar'."""

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
        """The uniform quantizers along the input axis, each with the number of block columns that it covers (all positive)."""

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Exactly the `nbytes` of a weight of this shape, quantized with a rotation."""
        rows = row_blocks(out_features)
        codes = sum(rows * columns * part.block_words * 4 for part, columns in self.parts(in_features))
        return codes + rows * BLOCK_ROWS * 2 + Rotation.bytes_for(in_features)

    def quantize(self, weight: Tensor, encoder: RingEncoder | None = None, feedback: RowFeedback | None = None) -> PackedWeight:
        """Quantize a rotated weight.

        weight: [out_features, in_features], any float dtype; finite. Rows of zeros are allowed.
        encoder: searches the trellis; by default the compiled CPU encoder.
        feedback: carries the error of each block into those that are still to be rounded; None rounds all on their own.

        Raises `QuantizerError` for a weight that is empty, not finite, or too large for a bfloat16 scale.
        """
        if weight.ndim != 2 or weight.numel() == 0:
            raise QuantizerError(f"a weight must be a non-empty matrix, got shape {tuple(weight.shape)}")
        if not bool(weight.isfinite().all()):
            raise QuantizerError("a weight must be finite, got NaN or infinity")
        out_features, in_features = weight.shape
        made = []
        for rows in _slabs(out_features, in_features, weight.device, SLAB_WEIGHTS, feedback):
            made.append(self._quantize_rows(weight[rows], encoder, None if feedback is None else feedback.of_rows(rows)))
        codes = tuple(torch.cat(part) for part in zip(*(codes for codes, _ in made), strict=True))
        return PackedWeight(out_features, in_features, self, codes, torch.cat([scales for _, scales in made]))

    def dequantize(self, packed: PackedWeight) -> Tensor:
        """Decode: float32 [out_features, in_features], in the rotated basis."""
        parts = self.parts(packed.in_features)
        out = torch.empty(packed.out_features, packed.in_features, device=packed.scales.device)
        for rows in _slabs(packed.out_features, packed.in_features, out.device, DECODED_WEIGHTS):
            blocks = slice(rows.start // BLOCK_ROWS, row_blocks(rows.stop))
            unit = torch.cat([part.decode(codes[blocks]) for (part, _), codes in zip(parts, packed.codes, strict=True)], dim=1)
            height = rows.stop - rows.start
            out[rows] = unit[:height, : packed.in_features] * packed.scales[rows, None].float()
        return out

    def _quantize_rows(self, weight: Tensor, encoder: RingEncoder | None, feedback: RowFeedback | None) -> tuple[list[Tensor], Tensor]:
        """Codes of each part and scales of some rows."""
        height, in_features = weight.shape
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        deviation = row_deviations(wide)
        unit = torch.zeros(row_blocks(height) * BLOCK_ROWS, column_blocks(in_features) * BLOCK_COLUMNS, device=weight.device)
        divisor = deviation.to(wide.dtype)
        unit[:height, :in_features] = wide / torch.where(divisor > 0, divisor, 1)[:, None]
        codes, made = self._round(unit, encoder) if feedback is None else self._round_with_feedback(unit, encoder, feedback)
        fit = _best_scales if feedback is None else feedback.best_scales
        scales = fit(unit[:, :in_features], made[:, :in_features])
        scales[:height] *= deviation
        scales[height:] = 0
        short = scales.bfloat16()
        if not bool((made.abs().amax(dim=1) * short.float()).isfinite().all()):
            raise QuantizerError(f"a row of deviation {deviation.max().item():.3g} is too large for a bfloat16 scale; rescale the weight")
        return codes, short

    def _round(self, unit: Tensor, encoder: RingEncoder | None) -> tuple[list[Tensor], Tensor]:
        """Codes of each part, and what they decode to."""
        codes, made, start = [], [], 0
        for part, width in self.parts(unit.shape[1]):
            codes.append(part.encode(unit[:, start * BLOCK_COLUMNS : (start + width) * BLOCK_COLUMNS], encoder))
            made.append(part.decode(codes[-1]))
            start += width
        return codes, torch.cat(made, dim=1)

    def _round_with_feedback(self, unit: Tensor, encoder: RingEncoder | None, feedback: RowFeedback) -> tuple[list[Tensor], Tensor]:
        """The same, wave by wave."""
        parts, codes, ends = self.parts(unit.shape[1]), [], [0]
        for part, width in parts:
            codes.append(torch.empty(len(unit) // BLOCK_ROWS, width, part.block_words, dtype=torch.int32, device=unit.device))
            ends.append(ends[-1] + width)

        def round_blocks(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
            made = torch.empty_like(targets)
            for (part, _), words, begin, end in zip(parts, codes, ends, ends[1:], strict=False):
                chosen = ((begin <= columns) & (columns < end)).nonzero().flatten()
                if len(chosen):
                    found = part.encode(targets[chosen].flatten(0, 1), encoder)
                    words[rows[chosen], columns[chosen] - begin] = found[:, 0]
                    made[chosen] = part.decode(found).view(-1, BLOCK_ROWS, BLOCK_COLUMNS)
            return made

        return codes, feedback.round(unit, round_blocks)


def _best_scales(unit: Tensor, made: Tensor) -> Tensor:
    """The scale of each row that fits `made` to `unit` best: float64 [rows]."""
    energy = made.square().sum(dim=1, dtype=torch.float64)
    product = (unit * made).sum(dim=1, dtype=torch.float64)
    return torch.where(energy > 0, product / energy.clamp_min(1e-30), 0)


def _slabs(out_features: int, in_features: int, device: torch.device, most: int, feedback: RowFeedback | None = None) -> Iterator[slice]:
    """Whole block rows of about so many weights on a CPU, which bounds the memory of the temporaries; coupled rows stay together."""
    most = most if device.type == "cpu" else GPU_SLAB_WEIGHTS
    height = max(1, most // (BLOCK_ROWS * in_features)) * BLOCK_ROWS
    if feedback is not None:
        yield from feedback.slabs(height)
        return
    for start in range(0, out_features, height):
        yield slice(start, min(start + height, out_features))


class UniformQuantizer(Quantizer):
    """A quantizer of one part: every block is coded in the same number of words."""

    @property
    @abstractmethod
    def block_words(self) -> int:
        """32-bit words of one block."""

    @abstractmethod
    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        """Code a unit-variance float32 [row_blocks * 64, column_blocks * 16] as int32 [row_blocks, column_blocks, block_words]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Inverse of `encode` up to the distortion: float32 [row_blocks * 64, column_blocks * 16], bit-exact on every device."""

    def parts(self, in_features: int) -> tuple[tuple["UniformQuantizer", int], ...]:
        return ((self, column_blocks(in_features)),)
