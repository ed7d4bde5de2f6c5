"""The functions of the exported graph, in stock ONNX Runtime, against the definitions in `qpc.quant`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import ml_dtypes
from onnx import numpy_helper

from qpc.integrations.onnx import functions
from qpc.integrations.onnx.translation import bits_of, hadamard_pair
from qpc.kernels import reference
from qpc.kernels.lookup import scalar_lookup, trellis_lookup
from qpc.quant import vector
from qpc.quant.codebook import codebook, hash_words
from qpc.quant.hadamard import block_size
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer, levels
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer
from tests.integrations.onnx.runtime import call
from tests.kernels.packed import FAMILIES, Packed, packed

Array = np.ndarray


def table(part: UniformQuantizer) -> Array:
    match part:
        case TrellisQuantizer(step_bits, window_bits):
            return (codebook(step_bits, window_bits) * part.unit).numpy()
        case ScalarQuantizer(bits):
            return levels(bits)[:, None].numpy()
        case VectorQuantizer(dimension, bits):
            return vector.codebook(dimension, bits).numpy()
    raise AssertionError(part)


def short(scales: torch.Tensor) -> Array:
    return scales.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@settings(max_examples=12)
@given(st.integers(2, 12), st.integers(6, 13))
def test_codebook_of_a_trellis_is_bit_exact(step_bits: int, suffix_bits: int) -> None:
    part = TrellisQuantizer(step_bits, min(step_bits + suffix_bits, 18))
    words = hash_words(part.step_bits, part.window_bits)
    made = call(functions.trellis_codebook, 2, words=words, window_bits=part.window_bits, unit=part.unit)
    assert np.array_equal(made, table(part))


BITS = {"trellis": (2, 12), "scalar": (1, 8), "pairs": (2, 12), "quadruples": (4, 12)}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_bit_exact_at_every_rate(family: str) -> None:
    for bits in range(BITS[family][0], BITS[family][1] + 1):
        weight = packed(family, 70, 40, [bits], suffix_bits=6 + bits % 3, seed=bits)
        part = weight.quantizers[0]
        step, window = bits_of(part)
        made = call(functions.decode, 2, weight.codes[0].numpy(), table(part), step_bits=step, window_bits=window)
        assert np.array_equal(made.T, part.decode(weight.codes[0]).numpy()), f"{bits=}"


def product(weight: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> Array:
    """By the function for one rate or for two."""
    added = np.zeros(1, dtype=np.float32) if bias is None else bias.numpy()
    pairs = [each for code, part in zip(weight.codes, weight.quantizers, strict=True) for each in (code.numpy(), table(part))]
    bits = [bits_of(part) for part in weight.quantizers]
    if len(bits) == 1:
        options = {"step_bits": bits[0][0], "window_bits": bits[0][1]}
    else:
        options = {
            f"{name}{i}": value for i, each in enumerate(bits) for name, value in zip(("step_bits", "window_bits"), each, strict=True)
        }
    function = functions.packed_linear if len(bits) == 1 else functions.mixed_linear
    return call(function, x.ndim, x.numpy(), *pairs, short(weight.scales), added, **options, out_features=weight.out_features)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [[6], [4, 5]], ids=["uniform", "mixed"])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 32), (70, 50), (1, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(family: str, bits: list[int], out_features: int, in_features: int, with_bias: bool) -> None:
    weight = packed(family, out_features, in_features, bits)
    x = torch.randn(2, 3, in_features)
    bias = torch.randn(out_features) if with_bias else None
    exact = reference.linear(x.double(), weight.codes, weight.scales, bias, weight.quantizers, out_features)
    assert np.abs(product(weight, x, bias) - exact.numpy()).max() <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("family", ["trellis", "scalar"])
def test_lookup_decodes_rows_bit_for_bit(family: str) -> None:
    weight = packed(family, 200, 50, [5])
    part = weight.quantizers[0]
    indices = torch.tensor([[0, 199, 64], [63, 0, 130]])
    operator = trellis_lookup if family == "trellis" else scalar_lookup
    signs = torch.empty(0, dtype=torch.uint8)
    expected = operator(indices, weight.codes, weight.scales, signs, 0, *weight.format, 200, 50, torch.float32)
    step, window = bits_of(part)
    inputs = (indices.numpy(), weight.codes[0].numpy(), table(part), short(weight.scales))
    made = call(functions.packed_lookup, 3, *inputs, step_bits=step, window_bits=window)
    assert made.shape == (2, 3, 64)
    assert np.array_equal(made[..., :50], expected.numpy())


@settings(max_examples=15)
@given(st.sampled_from([1, 2, 7, 12, 24, 60, 64, 100, 576, 1536, 4096]), st.booleans())
def test_rotations_and_their_inverses(features: int, doubled: bool) -> None:
    rotation = Rotation.random(features * (2 if doubled else 1), torch.Generator().manual_seed(features), block_size(features))
    x = torch.randn(3, 2, rotation.features)
    matrices = [numpy_helper.to_array(each) for each in hadamard_pair(rotation.block)]
    inputs = (x.numpy(), rotation.signs.numpy(), *matrices)
    unit = 1 / math.sqrt(rotation.block)
    assert np.abs(call(functions.rotate, 3, *inputs, unit=unit) - rotation.apply(x.double()).numpy()).max() < 1e-5
    assert np.abs(call(functions.unrotate, 3, *inputs, unit=unit) - rotation.invert(x.double()).numpy()).max() < 1e-5
