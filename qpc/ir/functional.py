"""Writes into values that nothing else sees, as operators without side effects.

A graph that writes into tensors can only be run from its start (see `Walk`), and what is written to is never known to equal another value.
Models do it to save memory, mostly with values that they have just computed.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import fake_value


def make_functional(graph: fx.Graph) -> None:
    """Put `add(x, ...)` in the place of `add_(x, ...)`, and so on, wherever `x` is a fresh value without views."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = _without_effect(node)
        if target is not None:
            base = node.args[0]
            node.target = target
            for user in [user for user in base.users if order[user] > order[node]]:
                user.replace_input_with(base, node)


def _without_effect(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that computes what this one writes; None if it writes nothing, or if something else could see it."""
    target = node.target
    if (
        not isinstance(target, torch._ops.OpOverload)
        or not target._schema.is_mutable
        or not node.args
        or node.kwargs.get("out") is not None
    ):
        return None
    base, name = node.args[0], target.overloadpacket.__name__
    if not isinstance(base, fx.Node) or not _fresh(base) or any(_aliases(user) for user in base.users if user is not node):
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") and target.namespace == "aten" else None
    found = getattr(packet, target._overloadname, None)
    return found if found is not None and _computes(found, node, fake_value(base)) else None


def _fresh(node: fx.Node) -> bool:
    """Whether a node makes a tensor of its own."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and node.args[0].target is not operator.getitem and _fresh(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and not _aliases(node)


def _aliases(node: fx.Node) -> bool:
    """Whether the value of a node may share memory with what it reads."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target._schema.is_mutable or any(result.alias_info is not None for result in node.target._schema.returns)


def _computes(target: torch._ops.OpOverload, node: fx.Node, like: object) -> bool:
    """Whether an operator, applied to the arguments of a node, makes a tensor of this shape and dtype."""
    args: tuple[Any, ...] = fx.node.map_arg(node.args, fake_value)
    kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, fake_value)
    try:
        with torch.no_grad():
            made = target(*args, **kwargs)
    except (RuntimeError, TypeError):
        return False
    same = isinstance(made, Tensor) and isinstance(like, Tensor) and made.dtype == like.dtype
    return same and [str(size) for size in made.shape] == [str(size) for size in like.shape]  # type: ignore[attr-defined]
