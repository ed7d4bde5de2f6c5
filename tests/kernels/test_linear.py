"""The module of a packed weight: conversions concern activations only, and stacked rows are the rows."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qpc.kernels import fused
from qpc.kernels.linear import QuantizedLinear, operator
from qpc.kernels.row_group import stack_rows
from qpc.kernels.select import Implementation, Support
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


TRELLIS = MixedRateQuantizer(TrellisQuantizer(3, 15), TrellisQuantizer(4, 17), Fraction(1, 2))


class Operators(TorchDispatchMode):
    """Records the names of the operators of qpc that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "qpc":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **kwargs or {})


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine multiplies operands, as far as the module knows; the operators run by their definition."""
    torch.compiler.reset()
    monkeypatch.setattr(fused, "supports", lambda *_: Support(Implementation.CPU, "by definition"))


def with_bias(weight: PackedWeight) -> QuantizedLinear:
    return QuantizedLinear.from_packed(weight, nn.Parameter(torch.linspace(-1, 1, weight.out_features), requires_grad=False))


def names_of(module: nn.Module, x: Tensor) -> list[str]:
    with Operators() as seen:
        module(x)
    return seen.names


def test_takes_the_way_that_the_device_has(operands: None) -> None:
    module, rotated = with_bias(packed(20, TRELLIS)), ["rotate", "trellis_linear"]
    assert names_of(module, torch.randn(2, 8, 48)) == ["rotate_operand", "operand_linear"]
    assert names_of(module, torch.randn(17, 48)) == rotated
    assert names_of(with_bias(packed(20)), torch.randn(2, 48)) == ["rotate", "scalar_linear"]
    assert names_of(with_bias(replace(packed(20, TRELLIS), rotation=None)), torch.randn(2, 48)) == ["pack_operand", "operand_linear"]


def test_this_machine_multiplies_no_operands() -> None:
    assert names_of(with_bias(packed(20, TRELLIS)), torch.randn(2, 48)) == ["rotate", "trellis_linear"]


@pytest.mark.parametrize("shape", [(), (1,), (16,), (2, 3)], ids=str)
def test_both_ways_give_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = with_bias(packed(20, TRELLIS)), torch.randn(*shape, 48)
    expected = module(x)
    monkeypatch.setattr(fused, "supports", lambda *_: Support(Implementation.CPU, "by definition"))
    found = module(x)
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("dynamic", "expected"), [(False, "operand_linear"), (True, "trellis_linear")])
def test_a_traced_graph_takes_an_operand_if_it_is_of_a_fixed_batch(operands: None, dynamic: bool, expected: str) -> None:
    """Whole, without a break; a symbolic batch stays symbolic."""
    graphs: list[str] = []

    def backend(graph_module: fx.GraphModule, _: list[Tensor]) -> fx.GraphModule:
        graphs.append(" ".join(str(node.target) for node in graph_module.graph.nodes))
        return graph_module

    module = with_bias(packed(20, TRELLIS))
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in (3, 5, 20):
        x = torch.randn(batch, 2, 48)
        assert torch.allclose(compiled(x), module(x), atol=1e-3)
    assert expected in graphs[0] and len(graphs) == (1 if dynamic else 3)
    assert "trellis_linear" in graphs[-1]


def test_an_exported_graph_keeps_its_symbolic_batch(operands: None) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(with_bias(packed(20, TRELLIS)), (torch.randn(4, 48),), dynamic_shapes=({0: batch},))
    assert exported.module()(torch.randn(17, 48)).shape == (17, 20)
