"""Stacks of experts: every form in which a graph has one becomes `qpc::expert_linear` and a site, or stays with a reason."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.annotation import LinearShape, LinearSite, annotation, site_of
from qpc.ir.program import Program
from qpc.passes.canonicalize import ROUTER, Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.quant.quantizer import PackedWeight
from qpc.quant.scalar import ScalarQuantizer
from tests.families import copied

EXPERTS, ROWS, WIDTH = 4, 64, 32
X = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`form(x [rows, in], stack, expert [rows])`."""


def ends_of(expert: Tensor) -> Tensor:
    counts = torch.nn.functional.one_hot(expert, EXPERTS).sum(dim=0)
    return counts.cumsum(dim=0).to(torch.int32)


def grouped(x: Tensor, stack: Tensor, expert: Tensor) -> Tensor:
    order = torch.argsort(expert)
    return torch._grouped_mm(x[order], stack.mT, offs=ends_of(expert))[torch.argsort(order)]


FORMS: dict[str, tuple[bool, Form]] = {
    "left": (False, lambda x, stack, expert: torch.bmm(stack[expert], x.unsqueeze(-1)).squeeze(-1)),
    "right": (True, lambda x, stack, expert: torch.bmm(x.unsqueeze(1), stack[expert]).squeeze(1)),
    "left of turned matrices": (True, lambda x, stack, expert: torch.bmm(stack[expert].transpose(1, 2), x.unsqueeze(2)).squeeze(2)),
    "right of a turned stack": (False, lambda x, stack, expert: torch.bmm(x[:, None], stack.transpose(-2, -1)[expert])[:, 0]),
}


class Routed(nn.Module):
    """A router, and experts whose results have a bias of their own; stored [out, in], or [in, out] where they are turned."""

    def __init__(self, form: Form, turned: bool = False, rows: int = ROWS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.router, self.form = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS), form
        shape = (EXPERTS, WIDTH, rows) if turned else (EXPERTS, rows, WIDTH)
        self.stack, self.bias = nn.Parameter(torch.randn(shape) / 4), nn.Parameter(torch.randn(EXPERTS, rows))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.start(x))
        chances, expert = self.router(x).softmax(dim=-1).max(dim=-1)
        return (self.form(x, self.stack, expert) + self.bias[expert]) * chances[:, None]


def canonical(module: nn.Module, exclude: tuple[str, ...] = ()) -> Program:
    program = capture(module, example_inputs=(X,), exclude=exclude)
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def reasons(program: Program) -> dict[str, str]:
    return {remark.subject: remark.reason for remark in program.remarks}


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_is_one_site_and_its_router_is_none(form: str) -> None:
    turned, body = FORMS[form]
    module = Routed(body, turned)
    program = canonical(module)
    sites = [site_of(node) for node in program.linears()]
    assert [site.name for site in sites] == ["start", "stack"]
    assert sites[1] == LinearSite("stack", "stack", LinearShape(EXPERTS * ROWS, WIDTH), transposed=turned, experts=EXPERTS)
    assert reasons(program) == {"router": ROUTER}
    torch.testing.assert_close(program.run((X,))[0], module(X))


@pytest.mark.parametrize("form", FORMS)
def test_lowered_it_multiplies_by_the_restored_experts(form: str) -> None:
    turned, body = FORMS[form]
    module, quantizer = Routed(body, turned), ScalarQuantizer(4)
    program = canonical(module)
    for node in program.linears():
        node.meta["qpc"] = annotation(node).but(quantizer=quantizer)
    Quantize().run(program)
    Lower().run(program)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "expert_linear" in target] == ["qpc.scalar_expert_linear.default"]
    with torch.no_grad():
        module.start.weight.copy_(program.packed["start"].restored())
        restored = restored_stack(program.packed["stack"])
        module.stack.copy_(restored.mT if turned else restored)
    torch.testing.assert_close(program.run((X,))[0], module(X), rtol=1e-4, atol=1e-5)


def restored_stack(packed: PackedWeight) -> Tensor:
    return packed.restored().unflatten(0, (EXPERTS, ROWS))


def test_rows_sorted_by_expert_are_found_by_where_each_ends() -> None:
    module, x = Routed(grouped).bfloat16(), X.bfloat16()
    program = capture(module, example_inputs=(x,))
    Pipeline((Canonicalize(),)).run(program)
    assert [site_of(node).experts for node in program.linears()] == [None, EXPERTS]
    torch.testing.assert_close(program.run((x,))[0], module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Routed(FORMS["left"][1], rows=40), "out_features=40 of each expert must be divisible by 64"),
        (Routed(lambda x, stack, expert: FORMS["left"][1](x, stack, expert) + stack.sum()), "also read by aten.sum"),
        (Routed(lambda x, stack, expert: (stack[expert] * x[:, None]).sum(dim=-1)), "read by aten.index.Tensor, which is no linear"),
    ],
)
def test_a_stack_that_stays_has_a_reason(module: nn.Module, reason: str) -> None:
    program = canonical(module)
    assert not [node for node in program.linears() if site_of(node).experts]
    assert reason in reasons(program)["stack"]
    torch.testing.assert_close(program.run((X,))[0], module(X))


def test_a_stack_can_be_excluded() -> None:
    program = canonical(Routed(FORMS["left"][1]), exclude=("sta*",))
    assert "excluded by the pattern" in reasons(program)["stack"]
    assert not [node for node in program.linears() if site_of(node).experts]


def test_two_stacks_that_read_one_value_are_no_group() -> None:
    class Two(Routed):
        def __init__(self) -> None:
            super().__init__(FORMS["left"][1])
            self.other = nn.Parameter(torch.randn(EXPERTS, ROWS, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            expert = self.router(x).argmax(dim=-1)
            return self.form(x, self.stack, expert) * self.form(x, self.other, expert)

    program = copied(canonical(Two()))
    assert [annotation(node).group.members for node in program.linears()] == [("stack",), ("other",)]  # type: ignore[union-attr]
    assert reasons(program)["other"] == "a stack of experts runs by itself"
