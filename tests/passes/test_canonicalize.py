import pytest
import torch
from torch import Tensor, fx, nn

from qpc.capture import capture
from qpc.ir.annotation import LinearShape, annotation
from qpc.ir.linear import LINEAR
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.pipeline import Pipeline
from tests.families import FAMILIES, PLAIN, captured, grouped, inputs, model, plain_inputs, seeded


def canonical(module: nn.Module, *, exclude: tuple[str, ...] = (), example_inputs: tuple[Tensor, ...] | None = None) -> Program:
    program = capture(module, example_inputs=example_inputs or plain_inputs(), exclude=exclude)
    Pipeline((Canonicalize(),)).run(program)
    return program


def reasons(program: Program) -> dict[str, str]:
    return {remark.subject: remark.reason for remark in program.remarks}


def names(program: Program) -> list[str]:
    return [site.name for node in program.linears() if (site := annotation(node).site) is not None]


@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
def test_program_still_computes_what_the_model_computes(name: str) -> None:
    given = inputs(name, 3, 5)
    torch.testing.assert_close(grouped(name).run(given)[0], captured(name).run(given)[0])


@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
def test_every_linear_module_but_the_head_is_a_site(name: str) -> None:
    program = grouped(name)
    kinds = ("Linear", "Conv1D")
    modules = [path for path, module in model(name).named_modules() if type(module).__name__ in kinds and path not in program.excluded]
    assert sorted(set(names(program))) == sorted(modules)
    for node in program.linears():
        site = annotation(node).site
        assert site is not None
        weight = program.tensor(site.weight)
        assert LinearShape(*(reversed(weight.shape) if site.transposed else weight.shape)) == site.shape
        assert node.meta["val"].shape[-1] == site.shape.out_features
        assert node.meta["nn_module_stack"]


def test_conv1d_becomes_a_linear_on_the_unflattened_input() -> None:
    targets = [str(node.target) for node in grouped("gpt2").graph.nodes]
    assert not any("mm" in target for target in targets)
    for node in grouped("gpt2").linears():
        site = annotation(node).site
        assert site is not None and site.transposed and site.bias == f"{site.name}.bias"
        assert node.all_input_nodes[0].meta["val"].ndim == 3


class Forms(nn.Module):
    """One linear in every form that a graph may have; `m` is stored [in, out], `w` [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("matmul", "operator", "mm", "addmm", "scaled"):
            self.register_parameter(f"m_{name}", nn.Parameter(torch.randn(32, 32) / 6))
        for name in ("matmul", "t", "permute", "functional"):
            self.register_parameter(f"w_{name}", nn.Parameter(torch.randn(32, 32) / 6))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x, self.m_matmul) + 1
        x = x @ self.m_operator - 1
        x = torch.mm(x.view(-1, 32), self.m_mm).view(x.shape)
        x = torch.addmm(self.bias, x.view(-1, 32), self.m_addmm).view(x.shape).tanh()
        x = torch.matmul(x, self.w_matmul.transpose(-1, 0))
        x = torch.mm(x.flatten(0, 1), self.w_t.T).unflatten(0, x.shape[:2])
        x = x @ self.w_permute.permute(1, 0)
        x = nn.functional.linear(bias=self.bias, weight=self.w_functional, input=x)
        return torch.addmm(self.bias, x.view(-1, 32), self.m_scaled, alpha=2.0)


def test_all_forms_become_sites() -> None:
    forms = seeded(Forms)
    program = canonical(forms)
    sites = {site.name: site for node in program.linears() if (site := annotation(node).site) is not None}
    assert list(sites) == ["m_matmul", "m_operator", "m_mm", "m_addmm", "w_matmul", "w_t", "w_permute", "w_functional"]
    assert all(site.transposed == name.startswith("m_") for name, site in sites.items())
    assert [name for name, site in sites.items() if site.bias] == ["m_addmm", "w_functional"]
    assert reasons(program) == {"m_scaled": "read by aten.addmm.default, which is no linear"}
    given = plain_inputs(4)
    torch.testing.assert_close(program.run(given)[0], forms(*given).detach())


class Partial(nn.Module):
    """The flat result of `addmm` is read as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, 32), self.weight)
        return flat.view(*x.shape[:2], 16) + flat.mean(dim=0)


def test_a_flat_product_that_is_read_flat_stays_flat() -> None:
    partial = seeded(Partial)
    program = canonical(partial)
    (node,) = program.linears()
    assert node.meta["val"].ndim == 2
    torch.testing.assert_close(program.run(plain_inputs(4))[0], partial(*plain_inputs(4)).detach())


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.doubled, self.both, self.kept = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.register_buffer("fixed", torch.randn(32, 32))
        self.stack = nn.Parameter(torch.randn(3, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fine(x) + nn.functional.linear(x, self.doubled.weight * 2)
        x = self.both(x) + x @ self.both.weight
        x = nn.functional.linear(x, self.fixed) + torch.bmm(x, self.stack)
        return self.kept(x) + self.kept.weight.sum()


def test_what_is_no_site_says_why() -> None:
    program = canonical(seeded(Refused))
    assert names(program) == ["fine"]
    computed = [node.name for node in program.graph.nodes if node.target is LINEAR and "mul" in node.args[1].name]
    assert reasons(program) == {
        computed[0]: "its weight is computed, not a parameter",
        "doubled.weight": "read by aten.mul.Tensor, which is no linear",
        "both": "its weight is also used transposed",
        "fixed": "its weight is a buffer, not a parameter",
        "stack": "read by aten.bmm.default, which is no linear",
        "kept": "its weight is also read by aten.sum.default",
    }


def test_excluded_linears_are_left_alone() -> None:
    program = canonical(model("mlp"), exclude=("0",))
    assert names(program) == ["2"]
    assert reasons(program) == {"0": "excluded by the pattern '0'"}


def test_shared_and_repeated_weights_are_seen_as_such() -> None:
    a, b = (annotation(node).site for node in grouped("shared").linears())
    assert a is not None and b is not None
    assert (a.name, b.name) == ("a", "b") and a.weight == b.weight and a.bias != b.bias
    first, second = (annotation(node).site for node in grouped("twice").linears())
    assert first == second


def traced(module: nn.Module) -> Program:
    """A program as symbolic tracing makes it: modules are called, and nothing is known of values."""
    graph_module = fx.symbolic_trace(module)
    placeholders = tuple(node.name for node in graph_module.graph.find_nodes(op="placeholder"))
    return Program(graph_module, {}, placeholders, module)


def test_calls_of_linear_modules() -> None:
    program = traced(model("mlp"))
    assert program.graph.find_nodes(op="call_module", target="0")
    Pipeline((Canonicalize(),)).run(program)
    assert names(program) == ["0", "2"] and program.stage is Stage.CANONICAL
    torch.testing.assert_close(program.run(plain_inputs())[0], model("mlp")(*plain_inputs()).detach())


def test_a_dynamo_graph() -> None:
    taken: list[Program] = []
    live = {id(value): name for name, value in model("gpt2").named_parameters()}

    def backend(graph_module: fx.GraphModule, given: list[object]) -> object:
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        tensors = {node.name: live[id(value)] for node, value in zip(placeholders, given, strict=True) if id(value) in live}
        program = Program(graph_module, tensors, tuple(node.name for node in placeholders if node.name not in tensors), model("gpt2"))
        Pipeline((Canonicalize(),)).run(program)
        taken.append(program)
        return graph_module

    given = inputs("gpt2", 2, 7)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model("gpt2"), backend=backend)(*given, use_cache=False).logits
    torch.testing.assert_close(result, captured("gpt2").run(given)[0])
    (program,) = taken
    head = "lm_head" if "lm_head" in names(program) else "transformer.wte"
    assert [name for name in names(program) if name != head] == names(grouped("gpt2"))
    assert all(node.target is LINEAR for node in program.linears())
