"""What gradients, moments and tuning make of a stack of experts: the same as of its experts one by one."""

import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.annotation import annotation, site_of
from qpc.ir.program import Program
from qpc.moments import MomentStream
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.passes.student import Student
from qpc.quant.scalar import ScalarQuantizer
from qpc.sensitivity.gradient import by_gradient
from tests.passes.test_expert_forms import EXPERTS, FORMS, ROWS, WIDTH, Routed, X

ROUTED = Routed(FORMS["right"][1], turned=True)


class OneByOne(nn.Module):
    """The same function as `ROUTED`, with a linear for each expert, all of which are computed for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.router, self.bias = ROUTED.start, ROUTED.router, ROUTED.bias
        self.experts = nn.ModuleList(nn.Linear(WIDTH, ROWS, bias=False) for _ in range(EXPERTS))
        with torch.no_grad():
            for expert, matrix in zip(self.experts, ROUTED.stack, strict=True):
                expert.weight.copy_(matrix.mT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.start(x))
        chances, chosen = self.router(x).softmax(dim=-1).max(dim=-1)
        made = torch.stack([expert(x) for expert in self.experts], dim=1)
        picked = (made * nn.functional.one_hot(chosen, EXPERTS)[..., None]).sum(dim=1)
        return (picked + self.bias[chosen]) * chances[:, None]


def program_of(module: nn.Module) -> Program:
    program = capture(module, example_inputs=(X,), exclude=("router",))
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def test_the_sensitivity_of_a_stack_is_the_sum_over_its_experts() -> None:
    found, _ = by_gradient(program_of(ROUTED), [X])
    apart, _ = by_gradient(program_of(OneByOne()), [X])
    assert found.values["start"] > 0
    torch.testing.assert_close(found.values["start"], apart.values["start"], rtol=1e-4, atol=0)
    experts = sum(value for name, value in apart.values.items() if name.startswith("experts"))
    torch.testing.assert_close(found.values["stack"], experts, rtol=1e-4, atol=0)


def test_the_moment_of_a_stack_is_that_of_all_rows_alike() -> None:
    program = program_of(ROUTED)
    first, stack = program.linears()
    _, importance = by_gradient(program, [X])
    assert [list(each) for each in importance] == [[first.name]], "rows of a stack have no importance of their own"
    stream = MomentStream(program, [X], importance=importance)
    with torch.no_grad():
        rows = torch.tanh(ROUTED.start(X))
    torch.testing.assert_close(stream.moment([stack]).matrix, rows.T @ rows / len(rows))


def test_tuned_scales_are_those_of_the_rows_of_each_expert() -> None:
    program = program_of(ROUTED)
    for node in program.linears():
        node.meta["qpc"] = annotation(node).but(quantizer=ScalarQuantizer(4))
    Quantize().run(program)
    student = Student(program)
    unchanged = student.outputs((X,))[0]
    with torch.no_grad():
        for scales in student.scales.values():
            scales.change.copy_(torch.rand(scales.change.shape, generator=torch.Generator().manual_seed(0)) / 2)
    expected = student.outputs((X,))[0]
    expected.sum().backward()
    gradient = student.scales["stack"].change.grad
    assert gradient is not None and gradient.any()
    assert set(student.write()) == {site_of(node).name for node in program.linears()}
    Lower().run(program)
    found = program.run((X,))[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, unchanged, rtol=1e-2)
