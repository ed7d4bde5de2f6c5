"""The operand of the integer multiplication: a rotated activation in 16-bit fixed point, two signed bytes ("limbs") per value.

A row x is `scale * (256 * high + low)` with float32 `scale` and signed bytes. The bytes of two neighbouring columns fill one 32-bit word of
the B operand of `mma.m16n8k32.s8`, each twice, since a decoded weight is a sum of bytes that lie there as separate columns. Words are int32
[column_blocks, batch, 2 (limb: high, low), 4 (t), 2 (half)]; the word of (column block, t, half) has columns c and c + 1, where
c = 16 * column block + 8 * half + 2 * t. This file alone knows the order of the bytes in a word.
"""

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.quant.layout import BLOCK_COLUMNS, column_blocks

PEAK = 32512
"""Largest magnitude of a fixed-point value: 127 * 256, so that both limbs are signed bytes after rounding."""

LIMB_REPEAT = 0x00010001
"""The bytes (c, c + 1) of a limb, lowest first, times this are the bytes of a word: (c, c + 1, c, c + 1)."""

SELECT_LOW = 0x4040
SELECT_HIGH = 0x5151
"""What `prmt` takes from two words, columns c and c + 1, to make a word: their lowest bytes, or their second."""

_FIRST_BITS = (0, 8)
"""Where a word shows the limb of column c and of column c + 1."""


def operand_rows(batch: int) -> int:
    """Rows of an operand: the power of two at or above the batch, so that few kernels serve all batches."""
    return 1 << (batch - 1).bit_length()


def peak_scales(x: Tensor) -> Tensor:
    """The finest scales that hold every value: `amax |x| / 32512` of each row of [batch, in_features]; float32 [batch], 0 for zero rows."""
    return (x.abs().amax(1).double() / PEAK).float()


def pack_operand(x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rotated activations to the operand.

    x: [batch, in_features], a float dtype, in_features at least 1. scales: float32 [batch], by default `peak_scales(x)`; values beyond
    32512 scales saturate. Returns words int32 [column_blocks, 2, rows, 2, 4] and the scales; rows beyond the batch
    are zero. Raises `KernelError` for another shape.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise KernelError(f"operand: x is {tuple(x.shape)}, required (batch, in_features)")
    scales = peak_scales(x) if scales is None else scales
    step = scales.double()[:, None]
    digits = torch.where(step > 0, (x.double() / step).round().clamp(-PEAK, PEAK), 0).to(torch.int32)
    missing = column_blocks(x.shape[1]) * BLOCK_COLUMNS - x.shape[1], operand_rows(len(x)) - len(x)
    padded = torch.nn.functional.pad(digits, (0, missing[0], 0, missing[1]))
    high = (padded + 128) >> 8
    limbs = torch.stack((high, padded - 256 * high), 1) & 0xFF
    pairs = limbs.reshape(len(padded), 2, -1, 2, 4, 2)  # row, limb, column block, half, t, column of the pair
    words = (pairs[..., 0] | pairs[..., 1] << 8) * LIMB_REPEAT
    return words.permute(2, 3, 0, 1, 4).contiguous(), scales


def empty_operand(batch: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words and scales to be written, uninitialized: int32 [column_blocks, 2, rows, 2, 4], float32 [batch]."""
    words = torch.empty((column_blocks(in_features), 2, operand_rows(batch), 2, 4), dtype=torch.int32, device=device)
    return words, torch.empty(batch, dtype=torch.float32, device=device)


def unpack_operand(words: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The values of an operand: float64 [batch, in_features]. Arguments as `pack_operand` returns them."""
    limbs = torch.stack([(words << (24 - bit)) >> 24 for bit in _FIRST_BITS], -1)  # column block, half, row, limb, t, column
    digits = 256 * limbs[:, :, :, 0] + limbs[:, :, :, 1]
    by_row = digits.permute(2, 0, 1, 3, 4).reshape(words.shape[2], -1)
    return by_row[: len(scales), :in_features].double() * scales.double()[:, None]
