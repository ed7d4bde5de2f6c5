"""Outline: one block of a program with few enough boxes to look at.

Operators of one module that hang together become one box; linears and the operators of qpc keep boxes of their own.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from qpc.ir.annotation import annotation, fake_value
from qpc.ir.program import Program
from qpc.ir.sketch import Box, Role, Sketch
from qpc.ir.values import representatives

PLUMBING = {"_to_copy", "alias", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "getitem", "permute", "reshape", "select"}
PLUMBING |= {"slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unsqueeze", "view"}
"""Operators that only look at a value in another way."""

MOST_NODES = 1000
"""Of a block that one could look at."""

_INPUT, _OUTPUT = "input", "output"


def outline(program: Program, block: str) -> Sketch | None:
    """The part of a program that the module `block` ("model.layers.15") computes.

    None if the capture does not tell modules apart, or the block has more than `MOST_NODES` nodes.
    An arrow from the input stands for what the linears of earlier blocks computed (for the first block: for all that it reads). What all
    blocks share, such as masks and positions, is left out.
    """
    owners = _owners(program.graph)
    same = representatives(program.graph)
    inside = {node for node in program.graph.nodes if _within(owners.get(node, ""), block)}
    if not 0 < len(inside) <= MOST_NODES:
        return None
    flow: nx.DiGraph[object] = nx.DiGraph()
    moving = _downstream(program.graph, lambda node: node.name in program.inputs)
    shown = [
        node
        for node in program.graph.nodes
        if node in inside and same[node] is node and node in moving and not _is_stack(node) and _is_value(node)
    ]
    flow.add_nodes_from(shown)
    arriving: list[tuple[fx.Node, fx.Node]] = []
    for node in shown:
        for source in _sources(node, same):
            if source in flow:
                flow.add_edge(source, node)
            elif source in moving:
                arriving.append((source, node))
    learned = _downstream(program.graph, lambda node: annotation(node).site is not None)
    earlier = [node for source, node in arriving if source in learned]
    flow.add_edges_from((_INPUT, node) for node in earlier or [node for _, node in arriving])
    for node in program.graph.nodes:
        if node not in inside:
            flow.add_edges_from((source, _OUTPUT) for source in _sources(node, same) if source in flow)
    return _sketch(flow, _clusters(flow, owners), owners)


def _owners(graph: fx.Graph) -> dict[fx.Node, str]:
    """Qualified name of the module that computes each node. What lowering has put in belongs to the module that reads it."""
    owners: dict[fx.Node, str] = {}
    for node in reversed(graph.nodes):
        recorded = list(node.meta.get("nn_module_stack", {}).values())
        if recorded and not _is_ours(node):
            owners[node] = str(recorded[-1][0])
        elif node.op in ("call_function", "call_method"):
            site = annotation(node).site
            owners[node] = site.name if site is not None else next((owners[user] for user in node.users if user in owners), "")
    return owners


def _downstream(graph: fx.Graph, starts: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes that some condition holds for, and all that depend on them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if starts(node) or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _within(owner: str, module: str) -> bool:
    return owner == module or owner.startswith(f"{module}.")


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "qpc"


def _is_stack(node: fx.Node) -> bool:
    """Whether this is the one operator of several linears, whose results are rows of its own."""
    rows = [user for user in node.users if annotation(user).site is not None and not _is_ours(user)]
    return _is_ours(node) and annotation(node).site is None and bool(rows)


def _is_value(node: fx.Node) -> bool:
    """Whether the node computes tensors: sizes are no values."""
    return node.op in ("call_function", "call_method") and (_is_ours(node) or isinstance(fake_value(node), Tensor | list | tuple))


def _sources(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Iterable[fx.Node]:
    """The distinct values that a node reads, looking through the operator of several linears."""
    found: dict[fx.Node, None] = {}
    for argument in node.all_input_nodes:
        value = same[argument]
        found |= dict.fromkeys(map(same.__getitem__, value.all_input_nodes) if _is_stack(value) else (value,))
    return found


def _clusters(flow: "nx.DiGraph[object]", owners: dict[fx.Node, str]) -> list[set[object]]:
    """Sets of nodes of one module each, merged along edges as long as no other path joins their ends, so that the result has no cycle."""
    clusters = flow.copy()
    members: dict[object, set[object]] = {node: {node} for node in flow}
    pending = [edge for edge in flow.edges if _owner_to_merge(edge[0], owners) and len({_owner_to_merge(end, owners) for end in edge}) == 1]
    while pending:
        kept = []
        for source, target in pending:
            head, tail = (next(key for key, nodes in members.items() if end in nodes) for end in (source, target))
            if head == tail:
                continue
            clusters.remove_edge(head, tail)
            if nx.has_path(clusters, head, tail):
                clusters.add_edge(head, tail)
                kept.append((source, target))
            else:
                members[head] |= members.pop(tail)
                nx.contracted_nodes(clusters, head, tail, self_loops=False, copy=False)
        if len(kept) == len(pending):
            break
        pending = kept
    return list(members.values())


def _owner_to_merge(node: object, owners: dict[fx.Node, str]) -> str:
    """The module whose operators a node may be merged with; empty for linears, transforms, input and output."""
    mergeable = isinstance(node, fx.Node) and annotation(node).site is None and not _is_ours(node)
    return owners[node] if mergeable and isinstance(node, fx.Node) else ""


def _sketch(flow: "nx.DiGraph[object]", clusters: list[set[object]], owners: dict[fx.Node, str]) -> Sketch:
    order = {node: position for position, node in enumerate((_INPUT, *(node for node in flow if isinstance(node, fx.Node)), _OUTPUT))}
    quotient = nx.DiGraph(nx.quotient_graph(flow, clusters, relabel=False))
    for cluster in [cluster for cluster in quotient if all(map(_is_plumbing, cluster))]:
        quotient.add_edges_from(product(list(quotient.predecessors(cluster)), list(quotient.successors(cluster))))
        quotient.remove_node(cluster)
    sorted_clusters = list(nx.lexicographical_topological_sort(quotient, key=lambda cluster: min(order[node] for node in cluster)))
    number = {cluster: index for index, cluster in enumerate(sorted_clusters)}
    boxes = tuple(_box(sorted(cluster, key=order.__getitem__), owners) for cluster in sorted_clusters)
    return Sketch(boxes, tuple(sorted((number[source], number[target]) for source, target in quotient.edges)))


def _is_plumbing(node: object) -> bool:
    return isinstance(node, fx.Node) and annotation(node).site is None and _operator(node) in PLUMBING


def _box(nodes: list[object], owners: dict[fx.Node, str]) -> Box:
    if nodes == [_INPUT] or nodes == [_OUTPUT]:
        return Box(Role.INPUT if nodes == [_INPUT] else Role.OUTPUT, str(nodes[0]))
    operators = [node for node in nodes if isinstance(node, fx.Node)]
    first, owner = operators[0], owners[operators[0]]
    names = [_operator(node) for node in operators]
    found = annotation(first)
    if found.site is not None:
        group = (found.site.name,) if found.group is None else found.group.members
        return Box(Role.LINEAR, found.site.name.rpartition(".")[2], found.site.name, group)
    if _is_ours(first):
        return Box(Role.TRANSFORM, names[0].replace("_", " "), owner, operators=(names[0],))
    telling = [name for name in names if name not in PLUMBING]
    kinds = Counter(telling)
    label = next(iter(kinds)) if len(kinds) == 1 else owner.rpartition(".")[2]
    return Box(Role.OTHER, label or names[0], owner, operators=tuple(telling))


def _operator(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target)).partition(".")[0]
