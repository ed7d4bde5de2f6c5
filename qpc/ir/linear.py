"""How `aten.linear` reads a stored matrix: directly, or through one transpose."""

from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import fake_value
from qpc.ir.program import Program

aten = torch.ops.aten

LINEAR = aten.linear.default
"""The one form of a linear from CANONICAL on: `linear(x, weight, bias?)`."""

_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t}
_AXIS_TRANSPOSES = {aten.transpose.int, torch.transpose}


def stored_weight(program: Program, node: Any) -> tuple[fx.Node | None, bool]:
    """The placeholder of the matrix behind the weight argument of a linear, and whether the graph transposes it."""
    if not isinstance(node, fx.Node):
        return None, False
    transposed = is_transpose(node)
    source = node.args[0] if transposed else node
    if isinstance(source, fx.Node) and source.name in program.tensors and rank(source) == 2:
        return source, transposed
    return None, False


def is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    if node.target in _TRANSPOSES or (node.op == "call_method" and node.target == "t"):
        return True
    if node.target in _AXIS_TRANSPOSES or (node.op == "call_method" and node.target == "transpose"):
        return sorted(axis % 2 for axis in node.args[1:3]) == [0, 1]  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [axis % 2 for axis in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator]
    return node.target is getattr and node.args[1] in ("T", "mT")


def readers(matrix: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Every node that reads a matrix, directly or transposed, and the node under which it reads it."""
    direct = [(user, matrix) for user in matrix.users if not is_transpose(user)]
    return direct + [(user, view) for view in matrix.users if is_transpose(view) for user in view.users]


def rank(node: Any) -> int:
    """Number of axes of the tensor that a node makes; 0 if it is not known to make a tensor."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0
