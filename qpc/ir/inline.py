"""Regions of a captured graph that change nothing by being inlined: switched-off autocast and gradient modes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Replace every `no_grad` or disabled-autocast region by its body, innermost first.

    The program runs without gradients and autocast, where such a region is the identity. A region that switches autocast on
    stays.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        position = _body_position(node)
        if position is None:
            continue
        holder = node.args[position]
        body = getattr(graph_module, holder.target)
        inline_regions(body)
        _splice(graph_module, node, body, node.args[position + 1 :])
        if not holder.users:
            graph.erase_node(holder)
            delattr(graph_module, holder.target)


def _body_position(node: fx.Node) -> int | None:
    """Index of the body among the arguments of a region that may be inlined."""
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        return 1
    if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
        return 4
    return None


def _splice(graph_module: fx.GraphModule, call: fx.Node, body: fx.GraphModule, arguments: Sequence[Any]) -> None:
    graph = graph_module.graph
    values = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(call):
        for node in body.graph.find_nodes(op="get_attr"):
            name = f"{call.name}_{node.target}"
            setattr(graph_module, name, getattr(body, node.target))
            values[node] = graph.get_attr(name)
            values[node].meta = dict(node.meta)
        results = graph.graph_copy(body.graph, values)
    if isinstance(results, fx.Node):
        call.replace_all_uses_with(results)
    else:
        outputs: Any = results
        for item in list(call.users):
            item.replace_all_uses_with(outputs[item.args[1]])
            graph.erase_node(item)
    graph.erase_node(call)
