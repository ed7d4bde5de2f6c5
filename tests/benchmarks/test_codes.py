"""The search for codes: its definitions are exact, its counter counts, its front is the front."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton compiles and interprets the codes")

from benchmarks.codes.__main__ import CANDIDATES, HIGH_RATES, LOW_RATES, gaussian_table
from benchmarks.codes.measure import gap_db, gaussian_rings
from benchmarks.codes.pareto import pareto_front
from benchmarks.codes.sass import decode_cost, opcodes


def test_interpreter_decodes_as_numpy_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.interpreted_code"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("window_bits", [12, 16])
def test_winners_are_integers_and_one_rounding(window_bits: int) -> None:
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


def test_front_keeps_what_nothing_dominates() -> None:
    assert pareto_front([(3, 1.0), (1, 4.0), (2, 2.0), (2, 3.0), (3, 1.5), (4, 1.0)]) == [1, 2, 0]


def test_no_code_beats_the_bound() -> None:
    weights = gaussian_rings(2, seed=1)
    for points, dimension in [(gaussian_table(10), 2), *((code.decode(10), code.dimension) for code in CANDIDATES)]:
        assert 0 < gap_db(points, dimension, 2 * dimension, weights, 0.95) < 3
