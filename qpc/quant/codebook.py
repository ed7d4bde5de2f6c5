"""The computed code: two weights from one window of the bit string, as projections of the bytes of a product.

The window times an odd constant, modulo 2^32, is a word; one word at low rates, two at others. A word is taken as four signed bytes, and
each byte as a step along a direction of the plane of the two weights: directions are spread evenly over the half circle, so that the sum of
even bytes is nearly a round Gaussian. Of one word the directions lie 45 degrees apart and reach to 2.9 deviations, of two 22.5 degrees, 4.3
deviations. Coordinates of the directions are integers, and so are the weights. (That a code may be computed, and sums of bytes, are ideas
of QTIP, arXiv 2406.11235, section 3.1.)

What a tensor core needs is the words themselves. Its product of bytes adds them up, and the directions are given to the activation instead:
a byte b along (c, d) adds b c to one weight and b d to the next, so that it meets b c x + b d x' = b (c x + d x'). Nothing but a shift, a
mask and the multiplications belongs to decoding.
`benchmarks/codes/README.md` tells how this code was chosen.
"""

import torch
from torch import Tensor

START = 0x3F000000
"""Bits that are set above the window, so that no window is zero: they shift the highest byte of each word."""

MULTIPLIERS = (0x3CD91A83, 0x8EEE4941)
"""What a window is multiplied by, for each word; modulo 2^32."""

DIRECTIONS = (((32, 0), (0, 32), (-23, -23), (-23, 23)), ((12, 30), (-30, -12), (12, -30), (30, -12)))
"""Steps in the plane of the two weights for each byte of each word, the lowest byte first. Their sum is small, for a byte has mean -1/2.
Their signs matter as well: the third one negated loses 0.03 to 0.05 dB with one word."""

SCALE = 32
"""Length of a step, but for rounding."""

DEVIATION = {1: 3372.0, 2: 4772.0}
"""Standard deviation of a code value, by the number of words; that of independent uniform bytes."""

ONE_WORD_STEP_BITS, ONE_WORD_SUFFIX_BITS = 4, 14
"""Largest step and suffix (window less step) of one word. It decodes a third faster and costs 0.01 dB at 1.5 bits a weight and 0.06 at 2,
but 0.13 at 3, where the tails count. Longer windows are for those who want the least distortion."""


def hash_words(step_bits: int, window_bits: int) -> int:
    """How many words the bytes are taken from: 1 or 2."""
    return 1 if step_bits <= ONE_WORD_STEP_BITS and window_bits - step_bits <= ONE_WORD_SUFFIX_BITS else 2


def code_deviation(step_bits: int, window_bits: int) -> float:
    """Standard deviation of a code value."""
    return DEVIATION[hash_words(step_bits, window_bits)]


def decode_windows(windows: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """The code values of each window: int64 [...] with values in [0, 2^window_bits) -> float32 [..., 2], integers of at most 20736."""
    values = torch.zeros((*windows.shape, 2), dtype=torch.int64, device=windows.device)
    for multiplier, directions in list(zip(MULTIPLIERS, DIRECTIONS, strict=True))[: hash_words(step_bits, window_bits)]:
        word = (windows | START) * multiplier & 0xFFFFFFFF  # below 2^62
        for index, direction in enumerate(directions):
            values += _signed_byte(word, index)[..., None] * torch.tensor(direction, device=windows.device)
    return values.float()


def codebook(step_bits: int, window_bits: int) -> Tensor:
    """All code points of windows of this length: float32 [2^window_bits, 2]."""
    return decode_windows(torch.arange(1 << window_bits, dtype=torch.int64), step_bits, window_bits)


def _signed_byte(words: Tensor, index: int) -> Tensor:
    """A byte of 32-bit words, counted from the lowest, as a number from -128 to 127."""
    return ((words >> 8 * index & 0xFF) ^ 0x80) - 0x80
