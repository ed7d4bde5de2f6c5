"""Rows decoded alone are the rows of the whole."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.quantizer import RingEncoder, UniformQuantizer
from qpc.quant.rows import decode_rows
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer


@dataclass(frozen=True)
class Bytes(UniformQuantizer):
    """A family of its own, that `decode_rows` knows nothing of: the bytes of the words, in rows."""

    family: ClassVar[str] = "bytes"

    @property
    def rate(self) -> Fraction:
        return Fraction(8)

    @property
    def distortion(self) -> float:
        return 1.0

    @property
    def block_words(self) -> int:
        return 256

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        rows, columns, _ = codes.shape
        return codes.view(torch.uint8).reshape(rows, columns, 64, 16).transpose(1, 2).reshape(rows * 64, columns * 16).float()


PARTS = [
    TrellisQuantizer(bits, window)
    for bits, windows in {3: (12, 18), 4: (16,), 5: (20,), 7: (13, 16), 12: (18, 20)}.items()
    for window in windows
]
PARTS += [ScalarQuantizer(bits) for bits in range(1, 9)]


@pytest.mark.parametrize("part", [*PARTS, Bytes()], ids=str)
def test_rows_are_those_of_the_whole(part: UniformQuantizer) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (3, 2, part.block_words), generator=generator, dtype=torch.int32)
    whole = part.decode(codes)
    every = torch.arange(3 * BLOCK_ROWS)
    some = torch.tensor([191, 0, 7, 7, 64, 130])
    for rows in (every, some, every[:0]):
        assert torch.equal(decode_rows(part, codes, rows), whole[rows])
