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
from qpc.quant.feedback import Feedback, StackFeedback
from qpc.quant.moment import Moment, filled_up
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.stacking import quantize_stacked
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


def test_each_expert_has_the_moment_of_the_rows_that_chose_it() -> None:
    program = program_of(ROUTED)
    first, stack = program.linears()
    _, importance = by_gradient(program, [X])
    assert [list(each) for each in importance] == [[first.name]], "rows of a stack have no importance of their own"
    stream = MomentStream(program, [X[:4], X[4:7]], [X[7:]], importance=importance)
    found = stream.moments_of_experts([stack])
    with torch.no_grad():
        rows = torch.tanh(ROUTED.start(X))
        expert = ROUTED.router(rows).argmax(dim=-1)
    for index, moment in enumerate(found):
        for part, held in ((slice(0, 7), moment), (slice(7, None), moment.held_out)):
            mine = rows[part][expert[part] == index]
            assert held is not None and held.count == len(mine)
            torch.testing.assert_close(held.matrix, mine.T @ mine / max(len(mine), 1))


def test_experts_that_few_rows_chose_get_the_moment_of_all() -> None:
    of_many, of_none = torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2, 2)
    found = filled_up([Moment(of_many, 1000), Moment(of_none, 0), Moment(torch.eye(2), 2)])
    of_all = (1000 * of_many + 2 * torch.eye(2)) / 1002
    torch.testing.assert_close(found[0].matrix, of_many, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[1].matrix, of_all)
    torch.testing.assert_close(found[2].matrix, (torch.eye(2) + of_all) / 2)
    assert [moment.count for moment in found] == [1000, 0, 2]


def test_feedback_of_each_expert_leaves_less_than_one_for_all() -> None:
    """Where experts read inputs of different directions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS * ROWS, WIDTH, generator=generator)
    directions = [torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(EXPERTS)]
    sizes = torch.logspace(0, -2, WIDTH)
    inputs = [torch.randn(500, WIDTH, generator=generator) * sizes @ turn for turn in directions]
    moments = [Moment(x.T @ x / len(x), len(x)) for x in inputs]
    pooled = Feedback.of(Moment(sum((moment.matrix for moment in moments), torch.zeros(WIDTH, WIDTH)) / EXPERTS, 500 * EXPERTS))
    own, quantizer, left = StackFeedback.of(filled_up(moments)), ScalarQuantizer(3), {}
    for name, feedback in {"none": None, "pooled": pooled, "own": own}.items():
        (packed,) = quantize_stacked(quantizer, [weight], feedbacks=[feedback])
        errors = (weight - packed.rotated()).chunk(EXPERTS)
        left[name] = sum(float((x @ error.T).square().sum()) for x, error in zip(inputs, errors, strict=True))
        if name == "own":
            assert 0.5 < own.share_left(weight, packed.rotated(), quantizer.distortion) / own.expected_share < 2
    assert left["own"] < 0.75 * left["pooled"], left
    assert left["pooled"] < left["none"], left


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
