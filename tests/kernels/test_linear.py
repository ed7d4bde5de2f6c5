"""The module of a packed weight: conversions concern activations only, and stacked rows are the rows."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from qpc.kernels.linear import QuantizedLinear, operator, stack_rows
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer

MIXED = MixedRateQuantizer(ScalarQuantizer(3), ScalarQuantizer(5), Fraction(1, 2))


def packed(out_features: int, quantizer: Quantizer = MIXED, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, 48, generator=generator)
    rotation = Rotation.random(48, torch.Generator().manual_seed(1))
    return replace(quantizer.quantize(rotation.apply(weight)), rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_the_product_with_the_restored_weight(dtype: torch.dtype) -> None:
    weight = packed(20)
    bias = nn.Parameter(torch.linspace(-1, 1, 20), requires_grad=False)
    module = QuantizedLinear.from_packed(weight, bias).to(dtype)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.double() @ weight.restored().double().t() + bias.double()
    found = module(x)
    assert found.dtype == dtype and found.shape == (2, 3, 20)
    assert (found.double() - expected).norm() <= (1e-5 if dtype is torch.float32 else 2e-2) * expected.norm()


def test_conversion_leaves_what_is_packed() -> None:
    module = QuantizedLinear.from_packed(packed(20))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = module.half().double().float().state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)


def test_an_empty_module_takes_a_state_dict() -> None:
    weight = packed(20)
    full = QuantizedLinear.from_packed(weight)
    empty = QuantizedLinear(20, 48, weight.quantizer, full.block)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty.packed.restored(), weight.restored())


def test_stacked_rows() -> None:
    first, second = packed(64, seed=1), packed(20, seed=2)
    codes, scales = stack_rows([first, second])
    whole = replace(first, out_features=84, codes=codes, scales=scales)
    assert torch.equal(whole.rotated(), torch.cat([first.rotated(), second.rotated()]))
    with pytest.raises(AssertionError, match="padding"):
        stack_rows([second, first])


def test_operator_of_each_family() -> None:
    assert operator(MIXED, 48) == (torch.ops.qpc.scalar_linear.default, ([5, 3],))
    mixed = MixedRateQuantizer(TrellisQuantizer(3, 15), TrellisQuantizer(4, 17), Fraction(1, 2))
    assert operator(mixed, 48) == (torch.ops.qpc.trellis_linear.default, ([4, 3], [17, 15]))
    assert operator(VectorQuantizer(4, 6), 48) == (torch.ops.qpc.vector_linear.default, ([6], 4))
