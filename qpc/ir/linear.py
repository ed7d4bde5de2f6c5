"""How linears read a stored matrix, or a stack of them: directly, or through one transpose."""

from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import LinearSite, fake_value
from qpc.ir.program import Program
from qpc.quant.experts import EXPERT_LINEAR

aten = torch.ops.aten

LINEAR = aten.linear.default
"""The one form of a linear from CANONICAL on: `linear(x, weight, bias?)`."""

WEIGHT_RANKS = {LINEAR: 2, EXPERT_LINEAR: 3}
"""What a `LinearSite` can be, and the axes of its parameter; the second argument is the weight."""

_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t}
_AXIS_TRANSPOSES = {aten.transpose.int, torch.transpose}


def stored_weight(program: Program, node: Any, axes: int = 2) -> tuple[fx.Node | None, bool]:
    """The placeholder behind the weight argument of a linear, and whether the graph transposes it. axes: 3 for a stack of matrices."""
    if not isinstance(node, fx.Node):
        return None, False
    transposed = is_transpose(node)
    source = node.args[0] if transposed else node
    if isinstance(source, fx.Node) and source.name in program.tensors and rank(source) == axes:
        return source, transposed
    return None, False


def stored_matrix(program: Program, site: LinearSite) -> Tensor:
    """The live weight of a site as [out_features, in_features], in its own dtype, without gradient."""
    return as_matrix(program.values(site.weight), site.transposed)


def as_matrix(stored: Tensor, transposed: bool) -> Tensor:
    """A stored matrix, or a stack of them below each other, as [out_features, in_features]."""
    return (stored.mT if transposed else stored).flatten(0, -2)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the axes of a matrix, or of each matrix of a stack."""
    if node.target in _TRANSPOSES or (node.op == "call_method" and node.target == "t"):
        return True
    axes = (rank(node.args[0]) if node.args else 0) or 2
    if node.target in _AXIS_TRANSPOSES or (node.op == "call_method" and node.target == "transpose"):
        return sorted(axis % axes for axis in node.args[1:3]) == [axes - 2, axes - 1]  # type: ignore[operator]
    if node.target is aten.permute.default:
        swapped = [*range(axes - 2), axes - 1, axes - 2]
        return [axis % axes for axis in node.args[1]] == swapped  # type: ignore[union-attr, operator]
    return node.target is getattr and node.args[1] in ("T", "mT")


def readers(matrix: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Every node that reads a matrix (or a stack), directly or transposed, and the node under which it reads it."""
    direct = [(user, matrix) for user in matrix.users if not is_transpose(user)]
    return direct + [(user, view) for view in matrix.users if is_transpose(view) for user in view.users]


def rank(node: Any) -> int:
    """Number of axes of the tensor that a node makes; 0 if it is not known to make a tensor."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0
