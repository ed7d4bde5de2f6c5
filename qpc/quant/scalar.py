"""Scalar quantization with the levels that are best for a Gaussian (S. Lloyd 1957, J. Max 1960).

The weights of a block are coded one by one in the order of `layout`: weight j lies at bit `j * bits` of the block's string (see
`bitstring`), as the index of its level in ascending order. The levels are computed, not stored.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_banded  # type: ignore[import-untyped]
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.bitstring import pack, ring_windows
from qpc.quant.layout import BLOCK_WEIGHTS, from_blocks, to_blocks
from qpc.quant.quantizer import RingEncoder, UniformQuantizer

MAX_BITS = 8


@dataclass(frozen=True)
class ScalarQuantizer(UniformQuantizer):
    """One index of `bits` bits, 1 to 8, for every weight."""

    family: ClassVar[str] = "scalar"
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise QuantizerError(f"bits={self.bits} must be from 1 to {MAX_BITS}")

    def __str__(self) -> str:
        return f"{self.family} {self.bits}"

    @property
    def rate(self) -> Fraction:
        return Fraction(self.bits)

    @property
    def distortion(self) -> float:
        return _distortion(self.bits)

    @property
    def block_words(self) -> int:
        return BLOCK_WEIGHTS * self.bits // 32

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        table = levels(self.bits).to(unit.device)
        nearest = torch.bucketize(unit.contiguous(), (table[1:] + table[:-1]) / 2)
        return pack(to_blocks(nearest), self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return from_blocks(levels(self.bits).to(codes.device)[ring_windows(codes, self.bits, self.bits)])


@cache
def levels(bits: int) -> Tensor:
    """The 2^bits reproduction levels of a unit Gaussian, ascending: float32, each exactly a float16."""
    upper = _upper_levels(bits)
    with torch.inference_mode(False):
        return torch.from_numpy(np.concatenate([-upper[::-1], upper]).astype(np.float32))


@cache
def _upper_levels(bits: int) -> NDArray[np.float64]:
    """The positive levels, rounded to float16. Every level is the mean of its cell, and the cells meet halfway between levels.

    Newton's method on these equations, whose Jacobian is tridiagonal, from the levels of the best compander. It ends at machine precision,
    so that the rounded levels are the same everywhere.
    """
    count = 1 << (bits - 1)
    level = np.sqrt(3) * ndtri(0.5 + (np.arange(count) + 0.5) / (2 * count))
    for _ in range(50):
        lower, upper = _cells(level)
        mass, moment = _moments(lower, upper)
        mean = moment / mass
        slope_up = np.where(np.isinf(upper), 0, _density(upper) * (np.where(np.isinf(upper), 0, upper) - mean) / mass) / 2
        slope_down = _density(lower) * (mean - lower) / mass / 2
        slope_down[0] = 0  # the first cell begins at zero, whatever the levels are
        jacobian = np.stack([np.roll(-slope_up, 1), 1 - slope_up - slope_down, np.roll(-slope_down, -1)])
        change = solve_banded((1, 1), jacobian, level - mean) if count > 1 else level - mean
        level = level - change
        if np.abs(change).max() < 1e-14:
            break
    rounded: NDArray[np.float64] = level.astype(np.float16).astype(np.float64)
    return rounded


@cache
def _distortion(bits: int) -> float:
    level = _upper_levels(bits)
    mass, moment = _moments(*_cells(level))
    return float(1 + 2 * (level * level * mass - 2 * level * moment).sum())


def _cells(level: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of the cells of ascending positive levels."""
    between = (level[1:] + level[:-1]) / 2
    return np.append(0, between), np.append(between, np.inf)


def _moments(lower: NDArray[np.float64], upper: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability and first moment of a unit Gaussian in each cell."""
    return ndtr(-lower) - ndtr(-upper), _density(lower) - _density(upper)


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    density: NDArray[np.float64] = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return density
