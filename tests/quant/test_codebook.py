"""The computed code against integers and fractions, and what is asked of its points."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from qpc.quant.codebook import FACTOR, INCREMENTS, MULTIPLIERS, START, addend, code_deviation, codebook, decode_windows, hash_words
from qpc.quant.trellis import MAX_STEP_BITS, MAX_WINDOW_BITS, MIN_STEP_BITS

CASES = [(2, 8), (3, 16), (6, 19), (8, 23), (8, 24), (9, 15), (12, 24)]


def rounded(exact: Fraction) -> np.float32:
    """To the nearest float32, ties to the even one. Raises if the way through float64 is not exact."""
    wide = float(exact)
    assert Fraction(wide) == exact
    return np.float32(wide)


def pair(window: int, window_bits: int, words: int) -> list[int]:
    """The code values of one window, straight from the definition."""
    f = np.uint32(window | START).view(np.float32)
    product = Fraction(float(f)) * Fraction(FACTOR) + Fraction(addend(window_bits))
    g = int(rounded(product).view(np.uint32))
    hashed = [(g * multiplier + increment) % 2**32 for multiplier, increment in zip(MULTIPLIERS, INCREMENTS, strict=True)][:words]
    signed = np.array([list(word.to_bytes(4, "little")) for word in hashed], dtype=np.uint8).view(np.int8).astype(int)
    return [int(signed[:, 0::2].sum()), int(signed[:, 1::2].sum())]


@pytest.mark.parametrize(("step_bits", "window_bits"), CASES)
def test_values_are_sums_of_the_bytes_of_the_hash(step_bits: int, window_bits: int) -> None:
    windows = [0, (1 << window_bits) - 1, *np.random.default_rng(0).integers(0, 1 << window_bits, 200).tolist()]
    made = decode_windows(torch.tensor(windows), step_bits, window_bits)
    assert made.dtype == torch.float32 and made.shape == (len(windows), 2)
    assert made.tolist() == [pair(window, window_bits, hash_words(step_bits)) for window in windows]


def test_stored_codes_keep_their_meaning() -> None:
    """These values are part of the format of a checkpoint: a change of them is a new format version."""
    for step_bits, window_bits, expected in (
        (6, 19, [[-145, -262], [112, -245], [-9, 169], [-177, -54]]),
        (12, 24, [[-37, -172], [364, 196], [180, -58], [-20, -101]]),
    ):
        windows = torch.tensor([0, 1, 12345, (1 << window_bits) - 1])
        assert decode_windows(windows, step_bits, window_bits).tolist() == expected


def test_constants_are_float32() -> None:
    for value in (FACTOR, *(addend(window_bits) for window_bits in range(8, MAX_WINDOW_BITS + 1))):
        assert float(np.float32(value)) == value


def test_addend_centers_the_products() -> None:
    """The sum of the least and the greatest g is no more than their last digits."""
    for window_bits in range(8, MAX_WINDOW_BITS):
        ends = [float(np.uint32(window | START).view(np.float32)) * FACTOR + addend(window_bits) for window in (0, (1 << window_bits) - 1)]
        assert ends[0] < 0 < ends[1] and abs(sum(ends)) <= 2.0**-22


@pytest.mark.parametrize("step_bits", range(MIN_STEP_BITS, MAX_STEP_BITS + 1))
def test_points_are_integers_of_the_stated_deviation(step_bits: int) -> None:
    points, words = codebook(step_bits, 16).double(), hash_words(step_bits)
    assert torch.equal(points, points.round()) and points.abs().max() <= 256 * words
    assert float(points.std()) == pytest.approx(code_deviation(step_bits), rel=0.01)
    assert abs(float(points.mean()) + words) < 0.01 * code_deviation(step_bits)  # a signed byte is -1/2 on average
    assert abs(float(torch.corrcoef(points.T)[0, 1])) < 0.02


@pytest.mark.parametrize(("step_bits", "window_bits"), CASES)
def test_every_bit_of_a_window_counts(step_bits: int, window_bits: int) -> None:
    """Windows that differ in one bit have values as far apart as any two: a variance of twice that of the code."""
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << window_bits, 4096))
    values = decode_windows(windows, step_bits, window_bits)
    for bit in range(window_bits):
        change = decode_windows(windows ^ (1 << bit), step_bits, window_bits) - values
        assert float(change.square().mean()) == pytest.approx(2 * code_deviation(step_bits) ** 2, rel=0.5), bit
