"""Random packed weights on a GPU, and what they should give: every string of bits is the code of some weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpc.kernels import reference
from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import Quantizer, UniformQuantizer

Shape = tuple[int, int]
"""out_features, in_features."""

GROUPS: tuple[tuple[Shape, ...], ...] = (
    ((4096, 4096), (1024, 4096), (1024, 4096)), ((4096, 4096),), ((14336, 4096), (14336, 4096)), ((4096, 14336),)
)  # fmt: skip
"""The linears of a decoder layer of Llama 3.1 8B that read the same value: query, key and value; output; gate and up; down."""


def stacked(members: Sequence[Shape]) -> Shape:
    """Linears of one input as one."""
    return sum(out_features for out_features, _ in members), members[0][1]


LAYER: tuple[Shape, ...] = tuple(stacked(group) for group in GROUPS)
"""The same, each group fused into one."""

SHAPES: tuple[Shape, ...] = (*LAYER, (1024, 4096))
"""Those, and its key or value alone."""

ORACLE_WEIGHTS = 1 << 24
"""Weights that the oracle decodes at a time, in float64."""


@dataclass(frozen=True)
class RandomWeight:
    """A packed weight of random bits. codes, scales: as `PackedWeight` has them; parts: the quantizer of each of the codes."""

    out_features: int
    in_features: int
    parts: tuple[UniformQuantizer, ...]
    codes: tuple[Tensor, ...]
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication must read of it."""
        return sum(code.nbytes for code in self.codes) + self.scales.nbytes

    def decoded(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight, [out_features, in_features], by the oracle."""
        return torch.cat([slab.to(dtype) for slab in self._slabs()])

    def product(self, x: Tensor) -> Tensor:
        """`x @ w.T` by the oracle, float64 [batch, out_features]. x: [batch, in_features]."""
        return torch.cat([x.double() @ slab.T for slab in self._slabs()], dim=1)

    def _slabs(self) -> Iterator[Tensor]:
        """The weight in float64, some block rows at a time."""
        height = max(1, ORACLE_WEIGHTS // (BLOCK_ROWS * self.in_features))
        for first in range(0, row_blocks(self.out_features), height):
            codes = [code[first : first + height] for code in self.codes]
            scales = self.scales[first * BLOCK_ROWS : (first + height) * BLOCK_ROWS]
            rows = min(height * BLOCK_ROWS, self.out_features - first * BLOCK_ROWS)
            yield reference.dequantize(codes, scales, list(self.parts), rows, self.in_features)


def random_weights(quantizer: Quantizer, shape: Shape, copies: int, device: torch.device | str, seed: int = 0) -> list[RandomWeight]:
    """So many different weights of one shape, with rows of a deviation between 0.5 and 1.5."""
    generator = torch.Generator(device).manual_seed(seed)
    out_features, in_features = shape
    rows = row_blocks(out_features)
    parts = quantizer.parts(in_features)

    def draw(columns: int, words: int) -> Tensor:
        size = (copies, rows, columns, words)
        return torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int32, device=device)

    codes = [draw(columns, part.block_words) for part, columns in parts]
    scales = (0.5 + torch.rand(copies, rows * BLOCK_ROWS, generator=generator, device=device)).bfloat16()
    kinds = tuple(part for part, _ in parts)
    return [RandomWeight(out_features, in_features, kinds, tuple(code[i] for code in codes), scales[i]) for i in range(copies)]


def activations(rows: int, features: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Gaussian activations as a rotation leaves them: bfloat16 [rows, features]."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, features, generator=generator, device=device).bfloat16()


def label(shape: Sequence[int]) -> str:
    """Out by in, as tables print it."""
    return "x".join(map(str, shape))


def weight_bytes(quantizer: Quantizer, shape: Shape) -> int:
    """Codes and scales of one weight, before it is made."""
    rows = row_blocks(shape[0])
    return rows * (sum(columns * part.block_words * 4 for part, columns in quantizer.parts(shape[1])) + BLOCK_ROWS * 2)
