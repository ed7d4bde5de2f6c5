"""One node for all that compute the same: rotations of one value, for linears that are not of one group."""

import operator
from typing import Any

from torch import fx
from torch._ops import OpOverload


def merge_equal(graph: fx.Graph) -> int:
    """Let one operator of qpc serve where several have the same arguments; they have no side effects. Returns how many went."""
    kept: dict[tuple[object, ...], fx.Node] = {}
    gone = 0
    for node in list(graph.nodes):
        if not _is_ours(node):
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


def _frozen(value: Any) -> object:
    """Arguments as something that can be a key; a number and a bool that equal each other stay apart."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    return value if isinstance(value, fx.Node) else (type(value), value)
