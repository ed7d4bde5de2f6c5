"""The oracle of the GPU encoder is the search of the CPU encoder."""

import pytest
import torch

from qpc.quant.bitstring import ring_windows
from qpc.quant.viterbi import encode_rings
from tests.kernels import ring_oracle


@pytest.mark.parametrize(("steps", "step_bits", "window_bits"), [(128, 6, 10), (32, 9, 10), (32, 12, 12), (32, 3, 10), (64, 2, 6)])
def test_oracle_equals_the_cpu_encoder(steps: int, step_bits: int, window_bits: int) -> None:
    values = 148 * torch.randn(5, steps, 2, generator=torch.Generator().manual_seed(0))
    words = encode_rings(values, step_bits, window_bits)
    symbols = ring_oracle.search(values, step_bits, window_bits)
    assert torch.equal(symbols, ring_windows(words, step_bits, window_bits) & ((1 << step_bits) - 1))
