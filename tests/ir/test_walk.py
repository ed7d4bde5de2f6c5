"""The walk: from any point it ends where the program ends, and it keeps only what is needed."""

import pytest
import torch
from torch import Tensor, fx, nn

from qpc.capture import capture
from qpc.ir.annotation import annotation
from qpc.ir.program import Program
from qpc.ir.values import mutated
from qpc.ir.walk import Walk
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.pipeline import Pipeline
from tests.families import PLAIN, plain_inputs


class InPlace(nn.Module):
    """Writes into a view of the result of one linear before the next reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes [..., 32] to [..., 32]."""
        y = self.first(x)
        z = self.second(y)
        y[..., 1:].add_(z[..., 1:])
        result: Tensor = self.second(y)
        return result


def program_of(name: str) -> Program:
    """A plain module in canonical form."""
    program = capture(InPlace() if name == "in place" else PLAIN[name](), example_inputs=plain_inputs())
    Pipeline((Canonicalize(),)).run(program)
    return program


@pytest.mark.parametrize("name", [*PLAIN, "in place"])
def test_from_any_point_the_walk_ends_where_the_program_ends(name: str) -> None:
    program = program_of(name)
    expected = program.run(plain_inputs())
    walk = Walk(program, plain_inputs())
    with torch.no_grad():
        for node in program.linears():
            walk.advance(node)
            for _ in range(2):
                torch.testing.assert_close(walk.finish({}), list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*PLAIN, "in place"])
def test_another_weight_acts_as_if_the_model_had_it(name: str) -> None:
    program = program_of(name)
    walk = Walk(program, plain_inputs())
    users: dict[str, list[fx.Node]] = {}
    for node in program.linears():
        site = annotation(node).site
        assert site is not None
        users.setdefault(site.weight, []).append(node)
    with torch.no_grad():
        for name_of_weight, nodes in users.items():
            weight = program.tensor(name_of_weight)
            kept, other = weight.clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
            walk.advance(nodes[0])
            found = walk.finish(dict.fromkeys(nodes, other))
            weight.copy_(other)
            expected = program.run(plain_inputs())
            weight.copy_(kept)
            torch.testing.assert_close(found, list(expected), rtol=0, atol=0)


def test_the_module_that_writes_in_place_is_captured_so() -> None:
    assert mutated(program_of("in place").graph)


def test_values_that_nothing_needs_are_dropped() -> None:
    depth = 40
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)))
    program = capture(model, example_inputs=plain_inputs())
    Pipeline((Canonicalize(),)).run(program)
    walk = Walk(program, plain_inputs())
    constant = len(walk._values)
    with torch.no_grad():
        for node in program.linears():
            walk.advance(node)
            assert len(walk._values) - constant <= 2
