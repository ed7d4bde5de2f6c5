"""Measure every candidate code: `python -m benchmarks.codes --json FILE [--plot FILE]`. One line per code, then the files."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.codes.byte_sums import FusedByteSums, LinearByteSums, PermutedByteSums, WideByteSums
from benchmarks.codes.candidates import (
    Code,
    FoldedFused,
    FoldedHalf,
    FoldedHalves,
    MaskedByteDifferences,
    MaskedHalves,
    OneHalf,
    Points,
)
from benchmarks.codes.measure import best_gap_db, gaussian_rings
from benchmarks.codes.pareto import draw
from benchmarks.codes.sass import decode_cost
from benchmarks.codes.search import DIRECTIONS, FAMILIES, search

MULTIPLIERS, INCREMENTS = (0x52A69AC1, 0x25C8E409), (0xEAD5C02B, 0xE345C183)
"""Of the byte differences, the first code."""

LOW_RATES = FoldedHalves(0xA4C525DD, 0x5E4E60E7, 0x20A394E3, 0xAB4C9999)
HIGH_RATES = FoldedFused(*dataclasses.astuple(LOW_RATES))
"""The best codes of halves: the same hash and the same two halves, put together differently."""

FACTORS, ADDENDS = (0xAB8F3EFB, 0x65DA3213, 0xBD5351A3), (0x3AD5F537, 0x0E2F3119, 0x8468433F)
"""Of the words of the byte sums, but for the linear ones."""

LINEAR_FACTORS = (0x3CD91A83, 0x8EEE4941)
"""Of the linear words."""

SQRT_2 = float(np.float32(np.sqrt(2)))

ONE_WORD = LinearByteSums(LINEAR_FACTORS[:1], DIRECTIONS)
TWO_WORDS = LinearByteSums(LINEAR_FACTORS, DIRECTIONS)
"""The winners: linear byte projections, with one word more at high rates."""

FUSED_TWO_WORDS = FusedByteSums(FACTORS[:2], ADDENDS[:2], SQRT_2)
FUSED_THREE_WORDS = FusedByteSums(FACTORS, ADDENDS, SQRT_2)
"""The best sums of bytes whose steps are axes."""

CANDIDATES: tuple[Code, ...] = (
    ONE_WORD,
    TWO_WORDS,
    LinearByteSums(LINEAR_FACTORS[:1]),
    LinearByteSums(LINEAR_FACTORS),
    FusedByteSums(FACTORS[:2], ADDENDS[:2], SQRT_2, DIRECTIONS),
    FUSED_TWO_WORDS,
    FUSED_THREE_WORDS,
    PermutedByteSums(FACTORS[:2], ADDENDS[:2], 0x4260FBF3),
    PermutedByteSums(FACTORS, ADDENDS, 0x4260FBF3),
    WideByteSums(0xE4CD2FEB, 0xF34270C3),
    FoldedHalf(LOW_RATES.spread, LOW_RATES.fold),
    LOW_RATES,
    HIGH_RATES,
    MaskedByteDifferences(MULTIPLIERS[:1], INCREMENTS[:1]),
    MaskedByteDifferences(MULTIPLIERS, INCREMENTS),
    MaskedHalves((0x45EE6D25, 0xD3E45133), (0x68C1464D, 0x41CA3ACB)),
    OneHalf(),
)

EXTRA_BITS = 12
"""Window bits beyond those of a step."""

RINGS = {3: 96, 4: 96, 6: 96, 7: 64, 8: 32, 10: 32}
"""Rings of 1024 weights by bits per pair; the search takes 32 at a time."""

COSTS = ("instructions_per_weight", "logic_clocks_per_weight", "multiply_clocks_per_weight", "clocks_per_weight", "products_per_8_weights")
"""Keys of a row: what a pair takes to decode and to multiply, by weights, and the products of the tensor core that it fills."""


def gaussian_table(window_bits: int) -> Points:
    """Independent Gaussian points: what a computed code imitates."""
    return np.random.default_rng(1).standard_normal((1 << window_bits, 2))


def measured(name: str, points: Points, dimension: int, pair_bits: int, rings: int, cost: dict[str, Any]) -> dict[str, Any]:
    """One row of the result."""
    gap, spread = best_gap_db(points, dimension, pair_bits * dimension // 2, gaussian_rings(rings, seed=0))
    window_bits = len(points).bit_length() - 1
    row = {"code": name, "dimension": dimension, "rate": pair_bits / 2, "window_bits": window_bits}
    return {**row, "rings": rings, "gap_db": round(gap, 3), "spread": spread, **cost}


def rows(scale: float) -> Iterator[dict[str, Any]]:
    """All codes at all rates, the Gaussian table first."""
    none = dict.fromkeys(COSTS)
    for pair_bits, rings in RINGS.items():
        count = max(1, round(rings * scale))
        yield measured("Gaussian table", gaussian_table(pair_bits + EXTRA_BITS), 2, pair_bits, count, none)
        for code in CANDIDATES:
            step_bits = pair_bits * code.dimension // 2
            if 2 * step_bits != pair_bits * code.dimension:
                continue
            window_bits = step_bits + EXTRA_BITS
            found = decode_cost(code, window_bits)
            clocks = (found.instructions, found.logic_clocks, found.multiply_clocks, found.clocks)
            cost = dict(zip(COSTS, (*(round(each / 2, 3) for each in clocks), code.registers), strict=True))
            yield measured(code.name, code.decode(window_bits), code.dimension, pair_bits, count, cost)


def searched(count: int, rings: int) -> Iterator[dict[str, Any]]:
    """Rows of the search for constants: the best five and the median of each family."""
    for family in FAMILIES:
        found = search(family, count, seed=3, rings=rings)
        yield {
            "family": family.make.__name__,
            "tried": count,
            "median_gaps_db": [round(gap, 3) for gap in found[count // 2].gaps_db],
            "best": [{"code": dataclasses.asdict(each.code), "gaps_db": [round(gap, 3) for gap in each.gaps_db]} for each in found[:5]],
        }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rings: less is faster and noisier")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="also try N random sets of constants for each family")
    options = parser.parse_args()
    result: list[dict[str, Any]] = []
    for row in rows(options.scale):
        print(json.dumps(row), flush=True)
        result.append(row)
    constants = list(searched(options.search, 32)) if options.search else []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"format": 1, "rows": result, "search": constants}, indent=1) + "\n")
    if options.plot:
        draw(result, (2, 3, 4), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
