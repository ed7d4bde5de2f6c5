"""Weights of random codes: every string of bits is the code of some weight, and none must be searched for."""

import torch

from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation


def coded(quantizer: Quantizer, rows: int, columns: int, block: int = 0, seed: int = 0) -> PackedWeight:
    """A packed weight [rows, columns], rotated in blocks unless `block` is 0. The signs depend on the columns alone."""
    generator = torch.Generator().manual_seed(seed)
    blocks = row_blocks(rows)
    codes = tuple(
        torch.randint(-(1 << 31), 1 << 31, (blocks, width, part.block_words), generator=generator).int()
        for part, width in quantizer.parts(columns)
    )
    scales = torch.rand(blocks * BLOCK_ROWS, generator=generator).add(0.5).bfloat16()
    scales[rows:] = 0
    rotation = Rotation.random(columns, torch.Generator().manual_seed(columns), block) if block else None
    return PackedWeight(rows, columns, quantizer, codes, scales, rotation)
