"""The search for codes: its definitions are exact, its counter counts, its front is the front."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton compiles and interprets the codes")

from benchmarks.codes.__main__ import (
    CANDIDATES,
    FUSED_THREE_WORDS,
    FUSED_TWO_WORDS,
    HIGH_RATES,
    LOW_RATES,
    ONE_WORD,
    TWO_WORDS,
    gaussian_table,
)
from benchmarks.codes.byte_sums import START, ByteSums, FusedByteSums, LinearByteSums, project
from benchmarks.codes.candidates import Code
from benchmarks.codes.hashes import byte, halves
from benchmarks.codes.measure import gap_db, gaussian_rings
from benchmarks.codes.pareto import pareto_front
from benchmarks.codes.sass import decode_cost, opcodes
from qpc.quant.codebook import SCALE, codebook
from tests.benchmarks.interpreted_code import run


@pytest.mark.parametrize("window_bits", [12, 16, 20])
@pytest.mark.parametrize("code", CANDIDATES, ids=lambda code: code.name)
def test_ptx_decodes_as_numpy_does(code: Code, window_bits: int) -> None:
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, 1 << window_bits, 4096)
    words = chosen | generator.integers(0, 1 << (32 - window_bits), 4096) << window_bits
    made = run(code.ptx(window_bits), words, code.registers)
    pairs = project(made, code.steps) if isinstance(code, ByteSums) else halves(made[0]).astype(np.float64)
    points = code.decode(window_bits)
    if code.dimension == 1:  # The second window of the pair is the top of the word.
        assert np.array_equal(pairs, np.stack([points[chosen, 0], points[words >> (32 - window_bits), 0]], axis=-1))
    else:
        assert np.array_equal(pairs, points[chosen])


@pytest.mark.parametrize(
    ("step_bits", "window_bits", "winner"),
    [(2, 12, ONE_WORD), (4, 17, ONE_WORD), (2, 17, TWO_WORDS), (4, 19, TWO_WORDS), (5, 12, TWO_WORDS), (12, 18, TWO_WORDS)],
)
def test_winners_are_the_codes_of_the_quantizer(step_bits: int, window_bits: int, winner: LinearByteSums) -> None:
    assert np.array_equal(winner.decode(window_bits).astype(np.float32), codebook(step_bits, window_bits).numpy())


def some_points(code: ByteSums, window_bits: int) -> Iterator[tuple[int, list[int]]]:
    """A hundred windows and what they decode to: of long ones, all sums would take long."""
    chosen = np.arange(0, 1 << window_bits, max(1, (1 << window_bits) // 101))
    points = project([words[chosen] for words in code.hashed(window_bits)], code.steps)
    if window_bits <= 16:
        assert np.array_equal(points, code.decode(window_bits)[chosen])
    yield from zip(chosen.tolist(), points.tolist(), strict=True)


@pytest.mark.parametrize("window_bits", [8, 16, 24])
@pytest.mark.parametrize("code", [ONE_WORD, TWO_WORDS, LinearByteSums(TWO_WORDS.factors)], ids=lambda code: code.name)
def test_linear_sums_are_these_integers(code: LinearByteSums, window_bits: int) -> None:
    for window, point in some_points(code, window_bits):
        words = [(START + window) * factor % 2**32 for factor in code.factors]
        signed = np.array([list(word.to_bytes(4, "little")) for word in words], dtype=np.uint8).view(np.int8).astype(int)
        assert point == np.einsum("wb,wbc->c", signed, np.array(code.steps)).tolist()


@pytest.mark.parametrize("window_bits", [8, 16, 24])
@pytest.mark.parametrize("code", [FUSED_TWO_WORDS, FUSED_THREE_WORDS], ids=lambda code: code.name)
def test_fused_sums_are_these_integers(code: FusedByteSums, window_bits: int) -> None:
    for window, point in some_points(code, window_bits):
        doubled, mantissa = divmod(window, 2**23)
        f = (Fraction(1, 2) + Fraction(mantissa, 2**24)) * 2**doubled
        g = _single(f * Fraction(code.scale) + Fraction(code.offset(window_bits)))
        words = [(g * factor + addend) % 2**32 for factor, addend in zip(code.factors, code.addends, strict=True)]
        signed = np.array([list(word.to_bytes(4, "little")) for word in words], dtype=np.uint8).view(np.int8).astype(int)
        assert point == [signed[:, 0::2].sum(), signed[:, 1::2].sum()]


def _single(value: Fraction) -> int:
    """Bits of the float32 nearest to a number of normal size, the even one of two."""
    magnitude, exponent = abs(value), 0
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while 0 < magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    exponent_bits = exponent + 126 << 23 if magnitude else 0  # The leading bit of the mantissa adds one more.
    return (value < 0) << 31 | exponent_bits + round(magnitude * 2**23)


@pytest.mark.parametrize("window_bits", range(8, 21))
@pytest.mark.parametrize("code", [ONE_WORD, TWO_WORDS], ids=lambda code: code.name)
def test_winners_are_as_wide_as_independent_bytes(code: LinearByteSums, window_bits: int) -> None:
    points = code.decode(window_bits)
    wide = SCALE * np.sqrt(2 * code.registers * (2**16 - 1) / 12)
    assert np.allclose(points.std(axis=0), wide, rtol=1.2 / np.sqrt(len(points)) + 0.01)
    assert abs(np.corrcoef(points.T)[0, 1]) < 4 / np.sqrt(len(points)) + 0.001


@pytest.mark.parametrize("code", [TWO_WORDS, FUSED_THREE_WORDS], ids=lambda code: code.name)
def test_bytes_of_the_words_are_even(code: ByteSums) -> None:
    """As even as random ones are: every value of every byte comes up in 1/256 of the windows, to five standard deviations."""
    for word in code.hashed(16):
        for index in range(4):
            counts = np.bincount(byte(word, index), minlength=256)
            assert np.abs(counts - 256).max() <= 80, index


@pytest.mark.parametrize("window_bits", [12, 16])
def test_half_codes_are_integers_and_one_rounding(window_bits: int) -> None:
    low, high = LOW_RATES.decode(window_bits), HIGH_RATES.decode(window_bits)
    for window in range(0, 1 << window_bits, 37):
        h1 = (window * LOW_RATES.spread << (32 - window_bits)) % 2**32
        h2 = ((h1 - (h1 >> 31 << 32)) * LOW_RATES.fold >> 32) % 2**32
        h3 = (h2 * LOW_RATES.mix + LOW_RATES.shift) % 2**32
        for column in range(2):
            p, q = _half(h2 >> 16 * column & 0x8FFF), _half(h3 >> 16 * column & 0x8FFF)
            r = _half(h3 >> 16 * column & HIGH_RATES.stretch ^ 0x3C00)
            assert low[window, column] == np.float16(float(p + q))
            assert high[window, column] == np.float16(float(p * r + q))


def _half(bits: int) -> Fraction:
    """The exact value of an IEEE half."""
    sign, exponent, mantissa = bits >> 15, bits >> 10 & 31, bits & 1023
    magnitude = Fraction(mantissa, 1 << 24) if exponent == 0 else Fraction(1024 + mantissa) * Fraction(2) ** (exponent - 25)
    return -magnitude if sign else magnitude


def test_counter_finds_known_instructions() -> None:
    counts = opcodes("mul.hi.s32 $0,$1,$1;", 1)
    assert counts["IMAD.HI"] == 1 and counts["STG"] == 1
    low, high = decode_cost(LOW_RATES, 16), decode_cost(HIGH_RATES, 16)
    assert (low.instructions, low.logic_clocks) == (7, 6)
    assert (high.instructions, high.logic_clocks) == (8, 8)
    one, two, three = (decode_cost(code, 16) for code in (ONE_WORD, TWO_WORDS, FUSED_THREE_WORDS))
    assert (one.instructions, one.logic_clocks, one.multiply_clocks) == (3, 4, 2)
    assert (two.instructions, two.logic_clocks, two.multiply_clocks) == (4, 4, 4)
    assert (three.instructions, three.logic_clocks, three.multiply_clocks) == (6, 4, 6)


def test_front_keeps_what_nothing_dominates() -> None:
    assert pareto_front([(3, 1.0), (1, 4.0), (2, 2.0), (2, 3.0), (3, 1.5), (4, 1.0)]) == [1, 2, 0]


def test_no_code_beats_the_bound() -> None:
    weights = gaussian_rings(2, seed=1)
    for points, dimension in [(gaussian_table(10), 2), *((code.decode(10), code.dimension) for code in CANDIDATES)]:
        assert 0 < gap_db(points, dimension, 2 * dimension, weights, 0.95) < 3
