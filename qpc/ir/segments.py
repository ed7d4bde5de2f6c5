"""Segments: a graph in parts that run one after the other, each of which needs a single value of the one before.

What depends on inputs and parameters flows from part to part. A graph can be cut wherever only one tensor of that kind is still needed: in
a decoder between attention and feed-forward network, and between layers, where nothing but the residual stream goes on. What depends on
inputs alone (positions, masks) or on parameters alone (a transposed weight) is made again in each part that needs it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from qpc.errors import ModelError
from qpc.ir.annotation import annotation, fake_value, site_of
from qpc.ir.program import Program
from qpc.ir.values import mutated


@dataclass(frozen=True)
class Segment:
    """A part of a graph.

    start: the value that comes from the part before; None for the first, which begins with the inputs. nodes: what it computes, in order.
    result: the value that it leaves, the only one that is needed after it. tensors: names of the placeholders of the parameters and buffers
    that it reads.
    """

    start: fx.Node | None
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    tensors: tuple[str, ...]

    def until(self, last: Iterable[fx.Node]) -> "Segment":
        """What is computed up to the last of some nodes."""
        wanted = set(last)
        stop = max(position for position, node in enumerate(self.nodes, start=1) if node in wanted)
        return replace(self, nodes=self.nodes[:stop])


def segments(program: Program) -> list[Segment]:
    """Cut a program at CANONICAL or later into as many segments as have a linear each; what follows the last of them belongs to none.

    Raises `ModelError` if there is no place to cut it, or it writes into values.
    """
    name = type(program.module).__name__
    if mutated(program.graph):
        raise ModelError(f"the graph of {name} writes into values, so it cannot be run in parts")
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    flowing = _flowing(program, nodes)
    narrow = _narrow(nodes, flowing)
    end = max(position for position, node in enumerate(nodes) if annotation(node).site is not None)
    cuts = _cuts(nodes[: end + 1], narrow)
    if not cuts:
        raise ModelError(f"the graph of {name} has no place that only one value passes, so it cannot be run in parts")
    last = next((position for position in range(end, len(nodes)) if position in narrow), end)
    found: list[Segment] = []
    start, first = None, 0
    for stop in [*cuts, last]:
        inside = [node for node in nodes[first : stop + 1] if node in flowing]
        result = narrow.get(stop, nodes[stop])
        found.append(_segment(program, nodes, flowing, start, inside, result))
        start, first = result, stop + 1
    return found


def _flowing(program: Program, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that depend both on an input and on a parameter."""
    names = {name for name, _ in program.module.named_parameters()}
    by_input = {node for node in nodes if node.op == "placeholder" and node.name in program.inputs}
    by_parameter = {node for node in nodes if node.op == "placeholder" and program.tensors.get(node.name) in names}
    for node in nodes:
        for found in (by_input, by_parameter):
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
    return by_input & by_parameter


def _narrow(nodes: Sequence[fx.Node], flowing: set[fx.Node]) -> dict[int, fx.Node]:
    """Positions behind which nothing that flows is needed but one tensor, and that tensor."""
    order = {node: position for position, node in enumerate(nodes)}
    last = {node: max((order.get(user, len(nodes)) for user in node.users), default=-1) for node in flowing}
    found: dict[int, fx.Node] = {}
    live: set[fx.Node] = set()
    for position, node in enumerate(nodes):
        if node in flowing:
            live.add(node)
        live = {other for other in live if last[other] > position}
        if len(live) == 1:
            (value,) = live
            if isinstance(fake_value(value), Tensor):
                found[position] = value
    return found


def _cuts(nodes: Sequence[fx.Node], narrow: Mapping[int, fx.Node]) -> list[int]:
    """Positions behind which a graph is cut: the first that can be, after at least one linear.

    nodes: up to the last linear, before which the last cut must be. Between two linears of one weight nothing is cut.
    """
    spans: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        if annotation(node).site is not None:
            spans.setdefault(site_of(node).weight, []).append(position)
    found, has_site = [], False
    for position, node in enumerate(nodes[:-1]):
        has_site = has_site or annotation(node).site is not None
        if has_site and position in narrow and not any(places[0] <= position < places[-1] for places in spans.values()):
            found.append(position)
            has_site = False
    return found


def _segment(
    program: Program, nodes: Sequence[fx.Node], flowing: set[fx.Node], start: fx.Node | None, inside: list[fx.Node], result: fx.Node
) -> Segment:
    """The nodes inside, and whatever else they need, in the order of the graph."""
    needed, pending = set(inside), list(inside)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in needed and source not in flowing:
                needed.add(source)
                pending.append(source)
    ordered = tuple(node for node in nodes if node in needed and node.op != "placeholder")
    return Segment(start, ordered, result, tuple(node.name for node in nodes if node in needed and node.name in program.tensors))
