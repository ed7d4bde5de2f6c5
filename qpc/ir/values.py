"""Which nodes of a graph hold the same value: value numbering, with regard to mutation."""

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import fake_value

aten = torch.ops.aten

# Operators that return their first argument unchanged whenever shape, dtype and device stay the same.
_PRESERVING = {
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.expand.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.view.default,
    torch.reshape,
}
_PRESERVING_METHODS = {"clone", "contiguous", "detach", "expand", "reshape", "to", "view"}
_PURE_METHODS = _PRESERVING_METHODS | {"double", "flatten", "float", "permute", "squeeze", "t", "transpose", "unsqueeze"}
_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior}


def representatives(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node, the first node that is known to hold the same value (often itself).

    Two nodes hold the same value if one passes it on unchanged (a view to the same shape, a cast to the same dtype, dropout outside of
    training), or if both apply the same deterministic operator to the same values. Values that anything writes to in place are only
    the same as themselves.
    """
    written = mutated(graph)
    first: dict[Hashable, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in written or any(argument in written for argument in node.all_input_nodes):
            same[node] = node
        elif _preserves(node):
            same[node] = same[node.all_input_nodes[0]]
        elif _deterministic(node):
            same[node] = first.setdefault((node.op, node.target, _key(node.args, same), _key(node.kwargs, same)), node)
        else:
            same[node] = node
    return same


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value may change after they are computed, because something writes to them or to what they are a view of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _writes(node) and node.all_input_nodes:
            root = node.all_input_nodes[0]
            while _may_alias(root):
                root = root.all_input_nodes[0]
            pending = [root]
            while pending:
                current = pending.pop()
                if current not in found:
                    found.add(current)
                    pending += [user for user in current.users if _may_alias(user) and user.all_input_nodes[0] is current]
    return found


def _writes(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _may_alias(node: fx.Node) -> bool:
    if not node.all_input_nodes or node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in node.target._schema.returns)
    return True


def _preserves(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    known = node.target in (_PRESERVING_METHODS if node.op == "call_method" else _PRESERVING)
    before, after = fake_value(node.args[0]), fake_value(node)
    return known and isinstance(before, Tensor) and isinstance(after, Tensor) and _form(before) == _form(after)


def _form(value: Tensor) -> tuple[list[str], torch.dtype, torch.device]:
    return [str(size) for size in value.shape], value.dtype, value.device


def _deterministic(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    return node.op == "get_attr" or (node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator")


def _key(argument: Any, same: dict[fx.Node, fx.Node]) -> Hashable:
    """A hashable copy of an argument, in which nodes are represented and 1, 1.0 and True differ."""
    if isinstance(argument, fx.Node):
        return same[argument]
    if isinstance(argument, list | tuple):
        return tuple(_key(item, same) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _key(argument[name], same)) for name in sorted(argument))
    if isinstance(argument, slice):
        return ("slice", *(_key(item, same) for item in (argument.start, argument.stop, argument.step)))
    return type(argument), argument


def remove_dead_code(graph: fx.Graph) -> None:
    """Erase nodes whose values nothing needs, but none that writes to a tensor in place, or opens or closes a level of `vmap`.

    torch.fx takes a method that writes for one without effect; a graph of Dynamo writes to a cache of keys and values by methods. Some
    versions of transformers build attention masks by `vmap`, which a captured graph holds as calls that return nothing.
    """
    graph.eliminate_dead_code(_has_effect)


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or _writes(node) or getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
