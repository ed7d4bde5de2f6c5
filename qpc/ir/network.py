"""A program as a directed graph of networkx, for analysis. It is a read-only copy: torch.fx stays the only graph that is changed."""

import networkx as nx  # type: ignore[import-untyped]
from torch import Tensor

from qpc.ir.annotation import annotation, fake_value
from qpc.ir.program import Program


def view(program: Program) -> "nx.DiGraph[str]":
    """Nodes are the names of the fx nodes, edges run from a value to its readers.

    Node attributes: `position` in graph order; `op` and `target` of the fx node; `shape`, a tuple of sizes as text, if the value is a
    tensor; `site`, the name of the linear, if it is one.
    """
    graph = nx.DiGraph()
    for position, node in enumerate(program.graph.nodes):
        value, site = fake_value(node), annotation(node).site
        attributes = {"position": position, "op": node.op, "target": str(node.target)}
        if isinstance(value, Tensor):
            attributes["shape"] = tuple(str(size) for size in value.shape)
        if site is not None:
            attributes["site"] = site.name
        graph.add_node(node.name, **attributes)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return nx.freeze(graph)
