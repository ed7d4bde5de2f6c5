"""Segments: every linear in one of them, nothing but one value between two, and the same outputs one after the other."""

import pytest
import torch
from torch import fx

from qpc.capture import capture
from qpc.errors import ModelError
from qpc.ir.annotation import site_of
from qpc.ir.segments import segments
from qpc.ir.walk import Walk, evaluated
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from tests.families import grouped, tokens
from tests.ir.test_walk import InPlace


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_needs_one_value_of_the_one_before(family: str) -> None:
    program = grouped(family)
    found, linears = segments(program), list(program.linears())
    places = [[site_of(node).name for node in segment.nodes if node in set(linears)] for segment in found]
    assert [name for names in places for name in names] == [site_of(node).name for node in linears]
    assert [sorted({name.split(".")[-2] for name in names}) for names in places] == [
        [kind] for _ in range(2) for kind in (("attn", "mlp") if family == "gpt2" else ("self_attn", "mlp"))
    ]
    text, left = tokens(), None
    for segment in found:
        values = {
            node: value for node, value in zip(program.graph.find_nodes(op="placeholder"), program.bind((text,)).values(), strict=True)
        }
        values = {node: value for node, value in values.items() if node.name in (*segment.tensors, *program.inputs)}
        if segment.start is not None:
            values[segment.start] = left
        with torch.no_grad():
            for node in segment.nodes:
                values[node] = evaluated(program.graph_module, node, values)
        left = values[segment.result]
        (user, *_) = segment.result.users
        assert torch.equal(left, read_at(program, segment.result, user, text))
    assert [segment.start for segment in found[1:]] == [segment.result for segment in found[:-1]]


def read_at(program: object, value: fx.Node, user: fx.Node, text: torch.Tensor) -> torch.Tensor:
    """A value as a walk through the whole graph has it."""
    with torch.no_grad():
        found: torch.Tensor = Walk(program, (text,)).input_of(user, argument=list(user.args).index(value))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", ["twice", "shared"])
def test_the_applications_of_one_weight_are_not_cut_apart(name: str) -> None:
    with pytest.raises(ModelError, match="no place that only one value passes"):
        segments(grouped(name))


def test_a_graph_that_writes_into_values_is_refused() -> None:
    program = capture(InPlace(), example_inputs=(torch.randn(5, 32),))
    Pipeline((Canonicalize(), Fusion())).run(program)
    with pytest.raises(ModelError, match="writes into values"):
        segments(program)
