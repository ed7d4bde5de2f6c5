"""Vector quantization: one index for two or four consecutive weights of the order of `layout`, into a codebook for a unit Gaussian.

Vector j of a block lies at bit `j * bits` of the block's string (see `bitstring`). Its weights are a pair of the layout or two that follow
each other, which lie in rows 8 apart. The codebooks are stored with the package, in float16; `python -m benchmarks.codebooks` makes them.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.bitstring import pack, ring_windows
from qpc.quant.layout import BLOCK_WEIGHTS, from_blocks, to_blocks
from qpc.quant.quantizer import RingEncoder, UniformQuantizer

BITS = {2: range(2, 13), 4: range(4, 13)}
"""Bits of an index that there are, by dimension."""

CODEBOOKS = Path(__file__).with_name("vector_codebooks.safetensors")

SEARCHED = 1 << 22
"""Distances that are computed at a time."""

DISTORTION = {
    (2, 2): 0.3634,
    (2, 3): 0.2011,
    (2, 4): 0.1086,
    (2, 5): 0.05718,
    (2, 6): 0.02989,
    (2, 7): 0.01532,
    (2, 8): 0.007848,
    (2, 9): 0.003982,
    (2, 10): 0.002016,
    (2, 11): 0.001015,
    (2, 12): 0.0005109,
    (4, 4): 0.3416,
    (4, 5): 0.2525,
    (4, 6): 0.1846,
    (4, 7): 0.1341,
    (4, 8): 0.09688,
    (4, 9): 0.06994,
    (4, 10): 0.05028,
    (4, 11): 0.03604,
    (4, 12): 0.02583,
}
"""Mean squared error of a unit Gaussian by dimension and bits, measured on 2^20 vectors; `python -m benchmarks.codebooks` prints it."""


@dataclass(frozen=True)
class VectorQuantizer(UniformQuantizer):
    """One index of `bits` bits for every `dimension` weights.

    dimension: 2 or 4. bits: 2 to 12 in dimension 2 (1 to 6 bits per weight), 4 to 12 in dimension 4 (1 to 3 bits per weight).
    """

    family: ClassVar[str] = "vector"
    dimension: int
    bits: int

    def __post_init__(self) -> None:
        if self.dimension not in BITS:
            raise QuantizerError(f"dimension={self.dimension} must be one of {', '.join(map(str, BITS))}")
        known = BITS[self.dimension]
        if self.bits not in known:
            raise QuantizerError(f"bits={self.bits} must be from {known[0]} to {known[-1]} in dimension {self.dimension}")

    def __str__(self) -> str:
        return f"{self.family} {self.rate} D{self.dimension}"

    @property
    def rate(self) -> Fraction:
        return Fraction(self.bits, self.dimension)

    @property
    def distortion(self) -> float:
        return DISTORTION[self.dimension, self.bits]

    @property
    def block_words(self) -> int:
        return BLOCK_WEIGHTS // self.dimension * self.bits // 32

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        blocks = to_blocks(unit)
        vectors = blocks.reshape(-1, self.dimension)
        points = codebook(self.dimension, self.bits).to(unit.device)
        nearest = torch.empty(len(vectors), dtype=torch.int64, device=unit.device)
        size = SEARCHED // len(points)
        for start in range(0, len(vectors), size):
            # differences, not products: exact enough whatever the precision of a product is set to
            distances = torch.cdist(vectors[start : start + size], points, compute_mode="donot_use_mm_for_euclid_dist")
            nearest[start : start + size] = distances.argmin(dim=1)
        return pack(nearest.reshape(*blocks.shape[:2], BLOCK_WEIGHTS // self.dimension), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        points = codebook(self.dimension, self.bits).to(codes.device)
        return from_blocks(points[ring_windows(codes, self.bits, self.bits)].flatten(-2))


@cache
def codebook(dimension: int, bits: int) -> Tensor:
    """The points that an index may stand for, in the order of the indices: float32 [2^bits, dimension], each exactly a float16."""
    with torch.inference_mode(False), safe_open(CODEBOOKS, framework="pt") as stored:
        points: Tensor = stored.get_tensor(codebook_name(dimension, bits))
        return points.float()


def codebook_name(dimension: int, bits: int) -> str:
    """What a codebook is called in the file."""
    return f"{dimension}d_{bits}bit"
