"""Single rows of a packed weight, decoded without their neighbours: what an embedding looks up."""

from functools import cache

import torch
from torch import Tensor

from qpc.quant.codebook import decode_windows
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, BLOCK_WEIGHTS, to_blocks
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.scalar import ScalarQuantizer, levels
from qpc.quant.trellis import TrellisQuantizer


def decode_rows(part: UniformQuantizer, codes: Tensor, rows: Tensor) -> Tensor:
    """These rows of `part.decode(codes)`, bit for bit: float32 [count, column_blocks * 16].

    codes: int32 [row_blocks, column_blocks, words]. rows: int64 [count], from 0 to row_blocks * 64 - 1; in any order, repeated or not.
    """
    blocks, within = rows // BLOCK_ROWS, rows % BLOCK_ROWS
    match part:
        case TrellisQuantizer(step_bits=step_bits, window_bits=window_bits):
            steps = _places(rows.device)[within, ::2] // 2  # a step holds a column and the next
            windows = _windows(codes, blocks, steps * step_bits, window_bits)
            return (decode_windows(windows, step_bits, window_bits) * part.unit).flatten(1)
        case ScalarQuantizer(bits=bits):
            indices = _windows(codes, blocks, _places(rows.device)[within] * bits, bits)
            return levels(bits).to(codes.device)[indices].flatten(1)
    touched, position = torch.unique(blocks, return_inverse=True)
    return part.decode(codes[touched])[position * BLOCK_ROWS + within]


def _windows(codes: Tensor, blocks: Tensor, bits: Tensor, window_bits: int) -> Tensor:
    """Windows of the circular strings of some block rows: int64 [count, column_blocks, windows].

    blocks: of each row, int64 [count]. bits: where in the string each window starts, int64 [count, windows].
    """
    length = codes.shape[-1]
    word, offset = bits[:, None] // 32, bits[:, None] % 32
    column = torch.arange(codes.shape[1], device=codes.device)[None, :, None]
    low, high = (codes[blocks[:, None, None], column, index % length].long() & 0xFFFFFFFF for index in (word, word + 1))
    return ((low | (high << 32)) >> offset) & ((1 << window_bits) - 1)


@cache
def _places(device: torch.device) -> Tensor:
    """The position of each weight of a block in the order of the layout: int64 [64, 16]."""
    with torch.inference_mode(False):
        order = to_blocks(torch.arange(BLOCK_WEIGHTS).reshape(BLOCK_ROWS, BLOCK_COLUMNS)).flatten()
        places = torch.empty_like(order)
        places[order] = torch.arange(BLOCK_WEIGHTS)
        return places.reshape(BLOCK_ROWS, BLOCK_COLUMNS).to(device)
