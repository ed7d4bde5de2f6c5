import torch
from torch import Tensor, fx, nn

from qpc.capture import capture
from qpc.ir.values import mutated, remove_dead_code, representatives
from tests.families import FAMILIES, captured, plain_inputs


class Readings(nn.Module):
    """Values that are, and that only look, the same."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            (x.float()[:, :].view(x.shape) + 1).sin(),
            (x.contiguous() + 1).cos(),
            (x + 1.0).tan(),
            (x + True).tan(),
            nn.functional.dropout(x, 0.5, training=True).exp(),
            nn.functional.dropout(x, 0.5, training=True).exp(),
            x[:, 1:].abs(),
            x[:, :-1].abs(),
            x.double().tanh(),
        )


def readers(graph: fx.Graph, *names: str) -> list[fx.Node]:
    targets = [getattr(torch.ops.aten, name).default for name in names]
    same = representatives(graph)
    return [same[node.args[0]] for node in graph.nodes if node.target in targets]


def test_same_values_are_recognised() -> None:
    graph = capture(Readings(), example_inputs=plain_inputs()).graph
    sin, cos, tan, other_tan = readers(graph, "sin", "cos", "tan")
    assert sin is cos
    assert len({sin, tan, other_tan}) == 3, "1, 1.0 and True promote differently"
    for name in ("exp", "abs"):
        first, second = readers(graph, name)
        assert first is not second
    assert readers(graph, "tanh")[0] is not graph.find_nodes(op="placeholder")[0]


def test_representatives_hold_the_same_value_when_run() -> None:
    for name in ("gemma3", "gpt2"):
        program = captured(name)
        values: dict[fx.Node, object] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                values[n] = super().run_node(n)  # noqa: B023
                return values[n]  # noqa: B023

        with torch.no_grad():
            Recorder(program.graph_module, garbage_collect_values=False).run(*program.bind([torch.arange(14).view(2, 7)]).values())
        same = representatives(program.graph)
        merged = [node for node in program.graph.nodes if same[node] is not node]
        assert len(merged) > 10
        for node in merged:
            torch.testing.assert_close(values[node], values[same[node]], rtol=0, atol=0)
    assert set(FAMILIES) > {"gemma3", "gpt2"}


class Overwritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        part = y[:, :2]
        before = y.exp()
        part.mul_(2)
        return before + y.exp() + (x + 1).exp()


def test_a_written_value_is_only_the_same_as_itself() -> None:
    graph = capture(Overwritten(), example_inputs=plain_inputs()).graph
    one, two = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)[:2]
    assert one in mutated(graph)
    exps = graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    same = representatives(graph)
    assert len({same[node] for node in exps}) == 3 and same[two] is not one


def test_nothing_of_a_language_model_is_written_to() -> None:
    assert not mutated(captured("llama").graph)


def test_what_writes_is_not_dead_code() -> None:
    """As Dynamo records an update of a cache: by a method whose result nobody reads."""
    graph = fx.Graph()
    cache, new = graph.placeholder("cache"), graph.placeholder("new")
    graph.call_method("index_copy_", (cache, 0, torch.tensor([1]), new))
    graph.call_method("add", (new, 1))
    graph.output(new)
    remove_dead_code(graph)
    assert [node.target for node in graph.nodes if node.op == "call_method"] == ["index_copy_"]
