"""One node for all that compute the same: rotations of one value, products of the members of a group, and their biases together."""

import operator
from typing import Any

from torch import fx
from torch._ops import OpOverload

from qpc.inductor.nodes import aten, is_call


def merge_equal(graph: fx.Graph) -> int:
    """Let one node serve where several of these have the same arguments; they have no side effects. Returns how many went."""
    kept: dict[tuple[object, ...], fx.Node] = {}
    gone = 0
    for node in list(graph.nodes):
        if not _is_ours(node) and not _is_bias(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = kept.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            gone += 1
    return gone


def _is_ours(node: fx.Node) -> bool:
    """Whether a node is an operator of qpc without side effects, or takes a result of one."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_ours(source)
    return isinstance(node.target, OpOverload) and node.target.namespace == "qpc" and not node.target._schema.is_mutable


def _is_bias(node: fx.Node) -> bool:
    """Whether a node puts vectors together that the graph is given, or is the zeros for a member that has none."""
    if is_call(node, aten.full.default):
        return all(is_call(user, aten.cat.default) for user in node.users)
    given = node.all_input_nodes
    return is_call(node, aten.cat.default) and all(each.op != "call_function" or is_call(each, aten.full.default) for each in given)


def _frozen(value: Any) -> object:
    """Arguments as something that can be a key; a number and a bool that equal each other stay apart."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    return value if isinstance(value, fx.Node) else (type(value), value)
