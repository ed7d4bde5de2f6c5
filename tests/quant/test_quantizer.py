"""Every quantizer as the rest of the house sees it: weights of any shape and size come back close, in exactly the bytes promised."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.errors import QuantizerError
from qpc.quant import quantizer as quantizer_module
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.palette import Effort, default_palette
from qpc.quant.quantizer import PackedWeight, Quantizer, UniformQuantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer

pytest.importorskip("numba", reason="the CPU encoder is compiled by numba")

PALETTE = (
    *default_palette(Effort.FAST).quantizers,
    *(VectorQuantizer(2, bits) for bits in (2, 5, 8)),
    *(VectorQuantizer(4, bits) for bits in (4, 7, 10)),
    MixedRateQuantizer(VectorQuantizer(4, 5), VectorQuantizer(4, 6), Fraction(1, 3)),
)
SCALE_ERROR = 2.7e-6
"""Mean squared relative error of a bfloat16 scale: uniform over the spacing 2^-7 / m at a mantissa m, which is distributed as 1 / m."""

RATES = pytest.mark.parametrize("quantizer", PALETTE, ids=str)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, packed: PackedWeight) -> float:
    wide = weight.double()
    return float((packed.restored().double() - wide).square().sum() / wide.square().sum())


@RATES
def test_distortion_is_as_declared(quantizer: Quantizer) -> None:
    weight = gaussian(128, 512)
    error = relative_error(weight, quantizer.quantize(weight))
    assert 4.0 ** -float(quantizer.rate) < error
    assert error == pytest.approx(quantizer.distortion + SCALE_ERROR, rel=0.03)


@pytest.mark.parametrize(("step_bits", "window_bits"), [(4, 14), (7, 16)])
def test_distortion_of_long_windows(step_bits: int, window_bits: int) -> None:
    quantizer = TrellisQuantizer(step_bits, window_bits)
    weight = gaussian(64, 256)
    error = relative_error(weight, quantizer.quantize(weight))
    assert 2.0**-step_bits < error and error == pytest.approx(quantizer.distortion, rel=0.05)


@given(st.sampled_from(PALETTE), st.integers(1, 70), st.integers(1, 150), st.booleans())
@settings(max_examples=40)
def test_shapes_and_bytes(quantizer: Quantizer, rows: int, columns: int, rotate: bool) -> None:
    weight = gaussian(rows, columns, seed=rows * 1000 + columns)
    rotation = Rotation.random(columns, torch.Generator().manual_seed(0))
    if rotate:
        packed = replace(quantizer.quantize(rotation.apply(weight)), rotation=rotation)
        assert packed.nbytes == quantizer.weight_bytes(rows, columns)
    else:
        packed = quantizer.quantize(weight)
        assert packed.nbytes == quantizer.weight_bytes(rows, columns) - rotation.nbytes
    assert packed.restored().shape == weight.shape and packed.restored().dtype == torch.float32
    assert packed.bits_per_weight == 8 * packed.nbytes / (rows * columns)
    assert packed.scales.dtype == torch.bfloat16 and not packed.scales[rows:].any()
    assert all(codes.dtype == torch.int32 and codes.shape[0] == -(-rows // 64) for codes in packed.codes)
    assert relative_error(weight, packed) < 0.6


@given(st.sampled_from(PALETTE), st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]), st.integers(1, 40))
@settings(max_examples=20)
def test_any_magnitude(quantizer: Quantizer, size: float, columns: int) -> None:
    """The size of a row changes nothing but its scale, and rows of zeros stay so."""
    weight = gaussian(20, columns)
    weight[7] = 0
    made, plain = (quantizer.quantize((weight.double() * factor).float()).restored().double() / factor for factor in (size, 1.0))
    assert made.isfinite().all() and not made[7].any()
    errors = [float((each - weight).square().sum()) for each in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1, abs=1e-4)


@RATES
def test_constant_rows(quantizer: Quantizer) -> None:
    weight = torch.full((16, 64), 3.25)
    rotation = Rotation.random(64, torch.Generator().manual_seed(1))
    packed = replace(quantizer.quantize(rotation.apply(weight)), rotation=rotation)
    assert relative_error(weight, packed) < 3 * quantizer.distortion + 1e-4


@RATES
def test_all_zero_weight(quantizer: Quantizer) -> None:
    assert not quantizer.quantize(torch.zeros(17, 33)).restored().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    weight = gaussian(32, 64).to(dtype)
    assert relative_error(weight, ScalarQuantizer(4).quantize(weight)) < 0.02


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(4), torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf]])])
def test_unusable_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(QuantizerError):
        ScalarQuantizer(3).quantize(weight)


def test_scale_out_of_range_is_refused() -> None:
    with pytest.raises(QuantizerError, match="too large"):
        ScalarQuantizer(3).quantize(torch.full((1, 4), 1e200, dtype=torch.float64))


@pytest.mark.parametrize(
    "quantizer", [TrellisQuantizer(6, 12), ScalarQuantizer(3), MixedRateQuantizer(ScalarQuantizer(2), ScalarQuantizer(3), Fraction(1, 4))]
)
def test_block_rows_are_packed_weights(quantizer: Quantizer) -> None:
    packed = quantizer.quantize(gaussian(150, 100))
    part = replace(packed, out_features=22, codes=tuple(codes[2:] for codes in packed.codes), scales=packed.scales[128:])
    assert torch.equal(part.rotated(), packed.rotated()[128:])


@pytest.mark.parametrize(
    "quantizer",
    [TrellisQuantizer(2, 12), TrellisQuantizer(12, 20), *map(ScalarQuantizer, range(1, 9)), VectorQuantizer(2, 9), VectorQuantizer(4, 12)],
    ids=str,
)
def test_encoding_what_was_decoded_gives_the_codes_back(quantizer: UniformQuantizer) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (1, 2, quantizer.block_words), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    decoded = quantizer.decode(words)
    assert decoded.shape == (64, 32)
    again = quantizer.encode(decoded)
    assert torch.equal(quantizer.decode(again), decoded)


def test_slabs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantizer = gaussian(150, 50), TrellisQuantizer(5, 12)
    whole = quantizer.quantize(weight)
    for slab in ("SLAB_WEIGHTS", "DECODED_WEIGHTS"):
        monkeypatch.setattr(quantizer_module, slab, 64 * 50)
    slabs = quantizer.quantize(weight)
    assert torch.equal(whole.codes[0], slabs.codes[0]) and torch.equal(whole.scales, slabs.scales)
    assert torch.equal(whole.rotated(), slabs.rotated())


def test_long_windows_and_steps_out_of_range() -> None:
    for step_bits, window_bits in [(1, 12), (13, 20), (4, 9), (4, 25)]:
        with pytest.raises(QuantizerError):
            TrellisQuantizer(step_bits, window_bits)
