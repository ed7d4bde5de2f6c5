"""Nodes of graphs of aten operators: how the rewrites look at them and make them."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

aten, prims = torch.ops.aten, torch.ops.prims
CONSTANTS = ("placeholder", "get_attr")


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node at the insertion point, with the fake value of its result."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda each: each.meta["val"])
    mode = detect_fake_mode([each for each in torch.utils._pytree.tree_leaves(values) if isinstance(each, Tensor)])
    if mode is None:
        node.meta["val"] = target(*values)
    else:
        with mode:
            node.meta["val"] = target(*values)
    return node


def results(graph: fx.Graph, node: fx.Node, count: int) -> list[fx.Node]:
    """The first results of a node that has several, behind it."""
    return [call(graph, operator.getitem, node, index) for index in range(count)]


def is_call(node: object, *targets: object) -> bool:
    """Whether a node calls one of these."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def unconverted(node: Any) -> Any:
    """What a value was before its dtype changed."""
    return node.args[0] if is_call(node, prims.convert_element_type.default, aten._to_copy.default) else node


def is_constant(node: object) -> bool:
    """Whether a node is a tensor that the graph is given, and not one that it computes."""
    return isinstance(node, fx.Node) and node.op in CONSTANTS
