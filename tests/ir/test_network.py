import networkx as nx
import pytest

from qpc.ir.annotation import annotation
from qpc.ir.network import view
from tests.families import grouped


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "siblings"])
def test_the_view_is_the_graph(name: str) -> None:
    program = grouped(name)
    network = view(program)
    assert list(network) == [node.name for node in program.graph.nodes]
    for position, node in enumerate(program.graph.nodes):
        assert set(network.predecessors(node.name)) == {source.name for source in node.all_input_nodes}
        assert network.nodes[node.name]["position"] == position
        site = annotation(node).site
        assert network.nodes[node.name].get("site") == (site.name if site else None)
    assert nx.is_directed_acyclic_graph(network)


def test_the_view_is_read_only() -> None:
    with pytest.raises(nx.NetworkXError):
        view(grouped("siblings")).add_node("another")
