"""Groups of linears: rows of one weight, whatever happens to the modules."""

import copy

import pytest
import torch
from torch import fx, nn

from qpc.kernels.linear import QuantizedLinear, join
from qpc.kernels.packed_module import share_signs
from qpc.quant.rotation import Rotation
from qpc.quant.trellis import TrellisQuantizer

OUT = (64, 128, 30)


class Readers(nn.Module):
    """Three linears of one input as a group, the second with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        rotation = Rotation.random(48, torch.Generator().manual_seed(1))
        for index, rows in enumerate(OUT):
            packed = TrellisQuantizer(4, 12).quantize(rotation.apply(torch.randn(rows, 48)))
            bias = nn.Parameter(torch.randn(rows)) if index == 1 else None
            module = QuantizedLinear(rows, 48, packed.quantizer, rotation.block, bias).take(packed)
            module.signs = rotation.signs.clone()
            self.add_module(f"linear{index}", module)

    @property
    def linears(self) -> list[QuantizedLinear]:
        return [module for module in self.children() if isinstance(module, QuantizedLinear)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def is_joined(model: Readers) -> bool:
    storages = {linear.codes0.untyped_storage().data_ptr() for linear in model.linears}
    (group,) = {linear.group for linear in model.linears}
    return group is not None and group.whole and group.members == tuple(model.linears) and len(storages) == 1


def test_joined_linears_compute_the_same_and_keep_their_state() -> None:
    model, x = Readers(), torch.randn(5, 48)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    assert not any(linear.group for linear in model.linears)
    join(model.linears)
    assert is_joined(model) and torch.equal(model(x), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("by", ["dynamo", "export"])
def test_a_traced_group_multiplies_once(by: str) -> None:
    model, x = Readers(), torch.randn(5, 48)
    before = model(x)
    join(model.linears)
    share_signs(model.linears)
    targets: list[str] = []

    def spy(graph_module: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    if by == "dynamo":
        compiled = torch.compile(model, backend=spy, fullgraph=True)
        found = compiled(x)
        torch.testing.assert_close(compiled(x + 1), model(x + 1))
    else:
        exported = torch.export.export(model, (x,), strict=False).module()
        found = exported(x)
        spy(exported, [])
    torch.testing.assert_close(found, before)
    assert sum("trellis_linear" in target for target in targets) == sum("rotate" in target for target in targets) == 1


def test_a_value_of_its_own_gets_a_product_of_its_own() -> None:
    """Though the group is traced as one."""
    model, x = Readers(), torch.randn(5, 48)
    join(model.linears)
    first, second, third = model.linears

    def apart(x: torch.Tensor) -> list[torch.Tensor]:
        return [first(x), second(x * 2), third(x)]

    for found, expected in zip(torch.compile(apart, backend="eager", fullgraph=True)(x), apart(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.half().float(),
        lambda model: model._apply(torch.clone),
        lambda model: model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True) and model,
    ],
    ids=["copied", "converted", "moved", "assigned"],
)
def test_groups_outlive_what_happens_to_modules(change) -> None:
    model, x = Readers(), torch.randn(5, 48)
    join(model.linears)
    share_signs(model.linears)
    before = model(x)
    changed = change(model)
    assert is_joined(changed) and len({id(linear.signs) for linear in changed.linears}) == 1
    torch.testing.assert_close(changed(x), before, rtol=2e-2, atol=2e-2)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(changed, backend="eager", fullgraph=True)(x), changed(x))


def test_a_group_that_is_torn_apart_runs_member_by_member() -> None:
    model = Readers()
    join(model.linears)
    model.linears[1].to("meta")
    group = model.linears[0].group
    assert group is not None and not group.whole
    assert model.linears[0](torch.randn(2, 48)).shape == (2, OUT[0])


def test_equal_signs_become_one_tensor() -> None:
    model = Readers()
    other = QuantizedLinear(64, 48, TrellisQuantizer(4, 12), model.linears[0].block)
    other.signs = ~model.linears[0].signs
    assert len({id(linear.signs) for linear in model.linears}) == 3
    share_signs([*model.linears, other])
    assert len({id(linear.signs) for linear in model.linears}) == 1 and other.signs is not model.linears[0].signs
