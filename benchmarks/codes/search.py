"""Search for a candidate's constants: random odd ones from a seed, ranked by the gaps at 2 and 3 bits on common weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.codes.byte_sums import Directions, FusedByteSums, LinearByteSums, PermutedByteSums
from benchmarks.codes.candidates import Code, FoldedHalves
from benchmarks.codes.measure import gap_db, gaussian_rings

DIRECTIONS: tuple[Directions, ...] = (
    ((32, 0), (0, 32), (-23, -23), (-23, 23)),
    ((12, 30), (-30, -12), (12, -30), (30, -12)),
)
"""Steps of the byte projections: 22.5 degrees apart, those of the first word 45."""

SCREEN = ((4, 0.98), (6, 0.935))
"""Step bits and spread of the screening; windows have 12 bits more than a step."""


@dataclass(frozen=True)
class Found:
    """A code and its gaps in dB at the step bits of `SCREEN`."""

    code: Code
    gaps_db: tuple[float, ...]


def folded_halves(constants: Sequence[int]) -> FoldedHalves:
    """Odd constants to a code; the fold lies in [2^30, 2^31), so that the signed product fills the exponents evenly."""
    spread, fold, mix, shift = constants
    return FoldedHalves(spread, fold >> 1 | 0x40000001, mix, shift)


def permuted_byte_sums(constants: Sequence[int]) -> PermutedByteSums:
    """Odd constants to a code of two words."""
    spread, *others = constants
    return PermutedByteSums((others[0], others[1]), (others[2], others[3]), spread)


def fused_byte_sums(constants: Sequence[int]) -> FusedByteSums:
    """Odd constants to a code of two words; the first gives the mantissa of the scale, which lies in [1, 2)."""
    scale, *others = constants
    return FusedByteSums((others[0], others[1]), (others[2], others[3]), 1 + (scale & 0x7FFFFF) / 2**23)


def linear_byte_projections(constants: Sequence[int]) -> LinearByteSums:
    """Odd constants to a code of two words."""
    return LinearByteSums(tuple(constants), DIRECTIONS)


@dataclass(frozen=True)
class Family:
    """Codes that differ in their constants only."""

    make: Callable[[Sequence[int]], Code]
    constants: int


FAMILIES = (Family(folded_halves, 4), Family(permuted_byte_sums, 5), Family(fused_byte_sums, 5), Family(linear_byte_projections, 2))


def search(family: Family, count: int, seed: int, rings: int) -> list[Found]:
    """`count` random sets of odd constants, best sum of gaps first."""
    generator, weights = np.random.default_rng(seed), gaussian_rings(rings, seed)
    found = []
    for _ in range(count):
        code = family.make([int(value) | 1 for value in generator.integers(0, 1 << 32, family.constants)])
        gaps = tuple(gap_db(code.decode(bits + 12), code.dimension, bits, weights, spread) for bits, spread in SCREEN)
        found.append(Found(code, gaps))
    return sorted(found, key=lambda each: sum(each.gaps_db))
