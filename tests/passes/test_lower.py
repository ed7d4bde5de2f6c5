"""Lower and adopt: the lowered graph computes what the restored weights compute, whatever the groups."""

import pytest
import torch
from torch import Tensor, nn

from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.stage import Stage
from qpc.ir.verifier import verify
from qpc.passes.adopt import Adopt
from qpc.passes.lower import Lower
from qpc.passes.quantize import Quantize
from qpc.quant.scalar import ScalarQuantizer
from tests.families import grouped
from tests.passes.test_quantize import Branches, allocated


def lowered_output(program, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    return program.run((x,))[0]


def restored(model: nn.Module, program) -> nn.Module:  # type: ignore[no-untyped-def]
    for name, packed in program.packed.items():
        model.get_submodule(name).weight.data.copy_(packed.restored())
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_lowered_graph_equals_restored_weights(fused: bool) -> None:
    torch.manual_seed(0)
    model = Branches()
    program = allocated(model)
    if fused:  # a has a bias, b has another: the group adds both at once
        nodes = {site_of(node).name: node for node in program.linears()}
        group = grouped_pair(program, nodes)
        for name in ("a", "b"):
            annotate(nodes[name], annotation(nodes[name]).but(group=group))
    Quantize().run(program)
    Lower().run(program)
    program.stage = Stage.LOWERED
    verify(program)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("scalar_linear" in target for target in targets) == (3 if fused else 4)
    assert sum("rotate" in target for target in targets) == 3, "a and b share one rotation, fused or not"
    x = torch.randn(5, 64)
    found = lowered_output(program, x)
    expected = restored(model, program)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def grouped_pair(program, nodes):  # type: ignore[no-untyped-def]
    """The group of a and b, stacked."""
    first, second = annotation(nodes["a"]).group, annotation(nodes["b"]).group
    return type(first)(("a", "b"), first.input, first.shapes + second.shapes)


def test_a_linear_applied_twice_is_lowered_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    torch.manual_seed(0)
    model = Twice()
    program = allocated(model)
    Quantize().run(program)
    Lower().run(program)
    program.stage = Stage.LOWERED
    verify(program)
    x = torch.randn(5, 64)
    found = lowered_output(program, x)
    torch.testing.assert_close(found, restored(model, program)(x), rtol=1e-4, atol=1e-5)


def test_adopting_gives_the_same_graph_without_packing_again() -> None:
    source, target = grouped("llama"), grouped("llama")
    for node in source.linears():
        annotate(node, annotation(node).but(quantizer=ScalarQuantizer(4)))
    Quantize().run(source)
    result = Adopt(source).run(target)
    target.stage = Stage.QUANTIZED
    verify(target)
    assert not result.remarks
    assert all(target.packed[name] is packed for name, packed in source.packed.items())
    assert {n: a.group.members for n, a in target.decisions.items()} == {n: a.group.members for n, a in source.decisions.items()}


def test_what_the_source_did_not_decide_stays() -> None:
    source, target = grouped("llama"), grouped("llama")
    for node in source.linears():
        annotate(node, annotation(node).but(quantizer=ScalarQuantizer(4)))
    Quantize().run(source)
    lost = next(iter(source.decisions))
    members = source.decisions[lost].group.members
    del source.decisions[lost], source.packed[lost]
    result = Adopt(source).run(target)
    target.stage = Stage.QUANTIZED
    verify(target)
    assert lost not in target.packed
    assert {remark.subject for remark in result.remarks} >= {lost}
    assert all(target.decisions[name].group.members == (name,) for name in members)
