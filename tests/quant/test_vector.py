"""Vector quantizers: the stored codebooks are what the benchmark makes, and the search finds the nearest point."""

import pytest
import torch

from benchmarks.codebooks import lloyd, measured_distortion
from qpc.errors import QuantizerError
from qpc.quant import vector
from qpc.quant.layout import to_blocks
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.vector import BITS, DISTORTION, VectorQuantizer, codebook

ALL = [VectorQuantizer(dimension, bits) for dimension, rates in BITS.items() for bits in rates]


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_distortion_is_as_declared(quantizer: VectorQuantizer) -> None:
    points = codebook(quantizer.dimension, quantizer.bits)
    assert points.shape == (1 << quantizer.bits, quantizer.dimension) and torch.equal(points, points.half().float())
    assert len(points.unique(dim=0)) == len(points)
    rows = 64 * (16 if quantizer.bits <= 8 else 4)
    unit = torch.randn(rows, 512, generator=torch.Generator().manual_seed(quantizer.bits))
    error = float((quantizer.decode(quantizer.encode(unit)) - unit).square().double().mean())
    assert 4.0 ** -float(quantizer.rate) < quantizer.distortion
    assert error == pytest.approx(quantizer.distortion, rel=0.02)


def test_a_codebook_is_made_again() -> None:
    torch.testing.assert_close(torch.from_numpy(lloyd(2, 3)).float(), codebook(2, 3), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("dimension", "bits"), [(2, 6), (4, 5)])
def test_fewer_samples_give_a_codebook_nearly_as_good(dimension: int, bits: int) -> None:
    points = lloyd(dimension, bits, schedule=((60, 1 << 15),))
    assert measured_distortion(points, 1 << 17) == pytest.approx(DISTORTION[dimension, bits], rel=0.02)


@pytest.mark.parametrize("bits", [2, 8, 12])
def test_better_than_scalars_and_worse_than_more_dimensions(bits: int) -> None:
    if bits % 2 == 0:
        assert VectorQuantizer(2, bits).distortion <= ScalarQuantizer(bits // 2).distortion * 1.002
    if bits <= 6:
        assert VectorQuantizer(4, 2 * bits).distortion < VectorQuantizer(2, bits).distortion


@pytest.mark.parametrize("quantizer", [VectorQuantizer(2, 5), VectorQuantizer(4, 7)], ids=str)
def test_the_nearest_point_is_found(quantizer: VectorQuantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = torch.randn(128, 48, generator=torch.Generator().manual_seed(0))
    codes = quantizer.encode(unit)
    points = codebook(quantizer.dimension, quantizer.bits).double()
    vectors, made = (to_blocks(each).reshape(-1, quantizer.dimension).double() for each in (unit, quantizer.decode(codes)))
    nearest = (vectors[:, None] - points).square().sum(dim=2).amin(dim=1)
    torch.testing.assert_close((vectors - made).square().sum(dim=1), nearest)
    monkeypatch.setattr(vector, "SEARCHED", 1000)
    assert torch.equal(quantizer.encode(unit), codes), "the size of a chunk changes nothing"


def test_weights_of_a_vector_follow_each_other_in_the_layout() -> None:
    unit = torch.zeros(64, 16)
    unit[16 * 2 + 5, 2 * 3 : 2 * 3 + 2] = torch.tensor([2.0, -1.0])
    unit[16 * 2 + 5 + 8, 2 * 3 : 2 * 3 + 2] = torch.tensor([0.5, 1.5])
    blocks = to_blocks(unit).reshape(-1, 4)
    assert blocks[(16 * (4 * 5 + 3) + 4 * 2) // 2].tolist() == [2.0, -1.0, 0.5, 1.5]
    made = VectorQuantizer(4, 12).decode(VectorQuantizer(4, 12).encode(unit))
    assert (made - unit).square().sum() < 64 * 16 * 0.03


@pytest.mark.parametrize(("dimension", "bits"), [(3, 6), (2, 1), (2, 13), (4, 3), (4, 13)])
def test_unknown_codebooks_are_refused(dimension: int, bits: int) -> None:
    with pytest.raises(QuantizerError, match=f"{dimension}"):
        VectorQuantizer(dimension, bits)


def test_printed() -> None:
    assert str(VectorQuantizer(2, 7)) == "vector 7/2 D2" and str(VectorQuantizer(4, 8)) == "vector 2 D4"
