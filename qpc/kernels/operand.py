"""The operand of the integer multiplication: projections of a rotated activation in 16-bit fixed point, two signed bytes ("limbs") each.

A weight is a sum of bytes along the directions of `qpc.quant.codebook`, so each byte of a word meets the projection of two neighbouring
columns x and x' on its direction (c, d), which is (c x + d x') / 32. A projection is `scale * (256 * high + low)` with a float32 `scale` of
the row and signed limbs. The four limbs for the bytes of a word fill one int32 of the B operand of `mma.m16n8k32`. These words are
int32 [column_blocks, rows, 2 (limb: high, low), 4 (t), 2 (word), 2 (half)], those of columns c and c + 1 at
c = 16 * column block + 8 * half + 2 * t: what a lane needs of a column block is four in a row.
"""

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.quant.codebook import DIRECTIONS, SCALE
from qpc.quant.layout import BLOCK_COLUMNS, column_blocks

PEAK = 32512
"""Largest magnitude of a fixed-point value: 127 * 256, so that both limbs are signed bytes after rounding."""

PROJECTIONS = tuple((c / SCALE, d / SCALE) for word in DIRECTIONS for c, d in word)
"""What columns c and c + 1 count in each of the eight projections; four for each word of the code. The first two are the columns."""


def operand_rows(batch: int) -> int:
    """Rows of an operand: the power of two at or above the batch, so that few kernels serve all batches."""
    return 1 << (batch - 1).bit_length()


def projections(x: Tensor) -> Tensor:
    """All projections of rows of activations [batch, in_features], zeros behind the last column: float64 [batch, column_blocks * 8, 8]."""
    missing = column_blocks(x.shape[1]) * BLOCK_COLUMNS - x.shape[1]
    pairs = torch.nn.functional.pad(x.double(), (0, missing)).reshape(len(x), -1, 2)
    return torch.matmul(pairs, torch.tensor(PROJECTIONS, dtype=torch.float64, device=x.device).T)


def peak_scales(x: Tensor) -> Tensor:
    """The finest scales that hold every projection: its largest size over 32512, float32 [batch], 0 for zero rows."""
    return (projections(x).abs().amax((1, 2)) / PEAK).float()


def pack_operand(x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rotated activations to the operand.

    x: [batch, in_features], a float dtype, in_features at least 1. scales: float32 [batch], by default `peak_scales(x)`; what is beyond
    32512 scales saturates. Returns words int32 [column_blocks, rows, 2, 4, 2, 2] and the scales; rows beyond the batch are zero.
    Raises `KernelError` for another shape.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise KernelError(f"operand: x is {tuple(x.shape)}, required (batch, in_features)")
    scales = peak_scales(x) if scales is None else scales
    step = scales.double()[:, None, None]
    digits = torch.where(step > 0, (projections(x) / step).round().clamp(-PEAK, PEAK), 0).to(torch.int32)
    digits = torch.nn.functional.pad(digits, (0, 0, 0, 0, 0, operand_rows(len(x)) - len(x)))
    high = (digits + 128) >> 8
    limbs = torch.stack((high, digits - 256 * high), 1) & 0xFF
    bytes_ = limbs.reshape(len(limbs), 2, -1, 2, 4, 2, 4)  # row, limb, column block, half, t, word, byte
    words = sum(bytes_[..., index] << 8 * index for index in range(4))
    assert isinstance(words, Tensor)
    return words.permute(2, 0, 1, 4, 5, 3).contiguous(), scales


def empty_operand(batch: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words and scales to be written, uninitialized: int32 [column_blocks, rows, 2, 4, 2, 2], float32 [batch]."""
    words = torch.empty((column_blocks(in_features), operand_rows(batch), 2, 4, 2, 2), dtype=torch.int32, device=device)
    return words, torch.empty(batch, dtype=torch.float32, device=device)


def unpack_operand(words: Tensor, scales: Tensor) -> Tensor:
    """The projections of an operand: float64 [batch, column_blocks * 8, 8]. Arguments as `pack_operand` returns them."""
    limbs = torch.stack([words << (24 - bit) >> 24 for bit in (0, 8, 16, 24)], -1)  # column block, row, limb, t, word, half, byte
    digits = 256 * limbs[:, :, 0] + limbs[:, :, 1]
    by_row = digits.permute(1, 0, 4, 2, 3, 5).flatten(4).flatten(1, 3)
    return by_row[: len(scales)].double() * scales.double()[:, None, None]


def unpack_rows(words: Tensor, scales: Tensor) -> Tensor:
    """The rows of an operand, by the two projections that are coordinates: float64 [batch, 16 * column_blocks]."""
    return unpack_operand(words, scales)[..., :2].flatten(1)
