"""The computed code against Python's integers, and what is asked of its points."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from qpc.quant.codebook import DIRECTIONS, MULTIPLIERS, SCALE, START, code_deviation, codebook, decode_windows, hash_words
from qpc.quant.trellis import MAX_STEP_BITS, MAX_WINDOW_BITS, MIN_STEP_BITS

CASES = [(2, 8), (3, 16), (4, 18), (4, 19), (5, 18), (6, 19), (8, 23), (8, 24), (9, 15), (12, 24)]


def pair(window: int, words: int) -> list[int]:
    """The code values of one window, straight from the definition."""
    total = [0, 0]
    for multiplier, directions in list(zip(MULTIPLIERS, DIRECTIONS, strict=True))[:words]:
        word = (window | START) * multiplier % 2**32
        for byte, direction in zip(word.to_bytes(4, "little"), directions, strict=True):
            signed = byte - 256 if byte >= 128 else byte
            total = [value + signed * step for value, step in zip(total, direction, strict=True)]
    return total


@pytest.mark.parametrize(("step_bits", "window_bits"), CASES)
def test_values_are_projections_of_the_bytes_of_the_words(step_bits: int, window_bits: int) -> None:
    windows = [0, (1 << window_bits) - 1, *np.random.default_rng(0).integers(0, 1 << window_bits, 200).tolist()]
    made = decode_windows(torch.tensor(windows), step_bits, window_bits)
    assert made.dtype == torch.float32 and made.shape == (len(windows), 2)
    assert made.tolist() == [pair(window, hash_words(step_bits, window_bits)) for window in windows]


def test_stored_codes_keep_their_meaning() -> None:
    """These values are part of the format of a checkpoint: a change of them is a new format version."""
    for step_bits, window_bits, expected in (
        (4, 17, [[-1403, 1403], [-5886, 4512], [-3339, 4889], [1769, -657]]),
        (6, 19, [[-1433, 1415], [-10962, 7506], [-2535, 7091], [3226, -4274]]),
        (12, 24, [[-1433, 1415], [-10962, 7506], [-2535, 7091], [5275, -5237]]),
    ):
        windows = torch.tensor([0, 1, 12345, (1 << window_bits) - 1])
        assert decode_windows(windows, step_bits, window_bits).tolist() == expected


@pytest.mark.parametrize(("step_bits", "window_bits", "words"), [(2, 8, 1), (4, 18, 1), (4, 19, 2), (2, 17, 2), (5, 11, 2), (12, 24, 2)])
def test_one_word_at_low_rates_and_short_windows(step_bits: int, window_bits: int, words: int) -> None:
    assert hash_words(step_bits, window_bits) == words


def test_multipliers_are_odd_and_no_window_reaches_the_bits_above() -> None:
    """An odd multiplier keeps windows apart: so does the low word of a product."""
    assert all(multiplier % 2 for multiplier in MULTIPLIERS)
    assert START % (1 << MAX_WINDOW_BITS) == 0 and 0 < START < 1 << 32


@pytest.mark.parametrize("words", [1, 2])
def test_directions_are_spread_evenly_over_the_half_circle(words: int) -> None:
    """Each of the stated length but for rounding; so nearly of equal sums of squares along every line, and of a sum near zero."""
    steps = np.array([direction for directions in DIRECTIONS[:words] for direction in directions])
    angles = np.sort(np.degrees(np.arctan2(steps[:, 1], steps[:, 0])) % 180)
    assert np.allclose(angles, np.arange(0, 180, 45 / words), atol=1)
    assert np.allclose(np.hypot(*steps.T), SCALE, atol=0.6)
    assert np.hypot(*steps.sum(axis=0)) < 1.1 * SCALE  # a byte is -1/2 on average


@pytest.mark.parametrize(("step_bits", "suffix_bits"), product(range(MIN_STEP_BITS, MAX_STEP_BITS + 1), (6, 10, 15)))
def test_points_are_integers_of_the_stated_deviation(step_bits: int, suffix_bits: int) -> None:
    window_bits = min(step_bits + suffix_bits, 18 if suffix_bits < 15 else 19)
    points, deviation = codebook(step_bits, window_bits).double(), code_deviation(step_bits, window_bits)
    chance = 1 / math.sqrt(len(points))
    assert torch.equal(points, points.round()) and points.abs().max() <= 20736
    assert torch.allclose(points.std(dim=0), torch.tensor(deviation).double(), rtol=0.01 + chance)
    assert float(points.mean(dim=0).abs().max()) < (0.01 + 2 * chance) * deviation
    assert abs(float(torch.corrcoef(points.T)[0, 1])) < 0.02 + 2 * chance


@pytest.mark.parametrize(("step_bits", "window_bits"), CASES)
def test_every_bit_of_a_window_counts(step_bits: int, window_bits: int) -> None:
    """Windows that differ in one bit are no nearer than half the distance of independent ones.

    The bit moves the bytes of a word from its own on up, by a number that the multiplier fixes; so the highest bits move least.
    """
    windows = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << window_bits, 4096))
    values = decode_windows(windows, step_bits, window_bits)
    independent = 4 * code_deviation(step_bits, window_bits) ** 2  # of both coordinates together
    for bit in range(window_bits):
        change = decode_windows(windows ^ (1 << bit), step_bits, window_bits) - values
        assert float(change.square().sum(dim=-1).mean()) > independent / 4, bit
