import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from qpc.errors import QuantizerError
from qpc.quant.scalar import ScalarQuantizer, levels

# J. Max, "Quantizing for minimum distortion", 1960, table I.
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_means_of_their_cells(bits: int) -> None:
    table = levels(bits)
    assert table.dtype == torch.float32 and len(table) == 1 << bits
    assert torch.equal(table, table.half().float()) and torch.equal(table, -table.flip(0)) and bool((table.diff() > 0).all())
    level = table.double().numpy()
    ends = np.concatenate([[-np.inf], (level[1:] + level[:-1]) / 2, [np.inf]])
    means = (norm.pdf(ends[:-1]) - norm.pdf(ends[1:])) / (norm.cdf(ends[1:]) - norm.cdf(ends[:-1]))
    rounding = np.spacing(np.abs(level).astype(np.float16)).astype(np.float64)
    assert np.all(np.abs(level - means) <= rounding)


@pytest.mark.parametrize("bits", range(1, 9))
def test_distortion_is_exact(bits: int) -> None:
    quantizer = ScalarQuantizer(bits)
    assert 4.0**-bits < quantizer.distortion < 3 * 4.0**-bits
    if bits in MAX_1960:
        assert quantizer.distortion == pytest.approx(MAX_1960[bits], rel=3e-3)
    sample = torch.from_numpy(norm.ppf((np.arange(1 << 20) + 0.5) / (1 << 20)).astype(np.float32)).reshape(1024, 1024)
    error = (quantizer.decode(quantizer.encode(sample)) - sample).square().double().mean()
    assert float(error) == pytest.approx(quantizer.distortion, rel=5e-3)  # the sample has no tail beyond 5


def test_weights_lie_in_the_order_of_the_layout() -> None:
    unit = torch.zeros(64, 32)
    unit[16 * 3 + 2 + 8, 16 + 8 + 2 * 1 + 1] = 10.0  # lane 4 * 2 + 1, tile 3, lower and right of it
    codes = ScalarQuantizer(3).encode(unit)
    assert codes.shape == (1, 2, 96)
    pair = 16 * (4 * 2 + 1) + 4 * 3 + 3
    bit = (2 * pair + 1) * 3
    assert all(int(codes[0, 1, i // 32]) >> (i % 32) & 1 for i in range(bit, bit + 3))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(QuantizerError, match=str(bits)):
        ScalarQuantizer(bits)


def test_printed() -> None:
    assert str(ScalarQuantizer(7)) == "scalar 7" and math.isclose(ScalarQuantizer(7).rate, 7)
