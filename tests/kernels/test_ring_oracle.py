"""The CPU encoder against a search of all windows."""

import pytest
import torch

from qpc.quant.bitstring import pack, ring_windows
from qpc.quant.codebook import code_deviation
from qpc.quant.viterbi import encode_rings
from tests.kernels import ring_oracle


def targets(rings: int, steps: int, step_bits: int, window_bits: int) -> torch.Tensor:
    """As narrow beside the code as the quantizer makes its targets at 3 and 4 bits a weight."""
    return 0.94 * code_deviation(step_bits, window_bits) * torch.randn(rings, steps, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("steps", "step_bits", "window_bits"), [(32, 3, 10), (64, 2, 6), (32, 3, 4), (96, 1, 9)])
def test_few_branches_are_all_tried(steps: int, step_bits: int, window_bits: int) -> None:
    values = targets(5, steps, step_bits, window_bits)
    words = encode_rings(values, step_bits, window_bits)
    symbols = ring_oracle.search(values, step_bits, window_bits)
    assert torch.equal(symbols, ring_windows(words, step_bits, window_bits) & ((1 << step_bits) - 1))


@pytest.mark.parametrize(("steps", "step_bits", "window_bits"), [(512, 4, 13), (512, 6, 14), (512, 8, 16), (128, 6, 10)])
def test_nothing_is_lost_by_trying_few_of_many(steps: int, step_bits: int, window_bits: int) -> None:
    values = targets(4, steps, step_bits, window_bits)
    words = encode_rings(values, step_bits, window_bits)
    best = pack(ring_oracle.search(values, step_bits, window_bits), step_bits)
    found, least = (ring_oracle.squared_error(values, each, step_bits, window_bits).sum() for each in (words, best))
    assert found <= 1.005 * least  # 0.02 dB
