"""RMSNorm, and the sum with the residual before it, into the operator that rotates its result into an operand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpc.inductor.nodes import aten, call, is_call, is_constant, results, unconverted
from qpc.ir.program import Remark
from qpc.kernels import operand_ops as _operands  # noqa: F401 - importing it registers torch.ops.qpc

ROTATE = torch.ops.qpc.rotate_operand.default


@dataclass(frozen=True)
class Norm:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)`; all nodes, weight one that nothing in the graph computes."""

    x: fx.Node
    weight: fx.Node
    eps: float
    offset: float


def fuse_norms(graph: fx.Graph) -> tuple[int, list[Remark]]:
    """Put `norm_operand` and `add_norm_operand` in the place of a norm whose result is only rotated. Returns how many, and why others were
    left alone.

    What stood between them in less than float32 is no longer rounded there. A sum is rounded as before, and given to its other readers.
    What is no norm is not spoken of.
    """
    fused, remarks = 0, []
    for node in list(graph.nodes):
        norm = match_norm(node.args[0]) if is_call(node, ROTATE) else None
        if norm is None:
            continue
        reason = _obstacle(node, norm)
        if reason is None:
            _fuse(graph, node, norm)
            fused += 1
        else:
            remarks.append(Remark("norms", node.args[0].name, reason))
    if fused:
        graph.eliminate_dead_code()
    return fused, remarks


def _obstacle(rotation: fx.Node, norm: Norm) -> str | None:
    """Why a norm does not go into the rotation that reads it."""
    rotated, signs, _ = rotation.args
    assert isinstance(rotated, fx.Node)
    others = [user.name for user in rotated.users if user.target is not ROTATE]
    if others:
        return f"the normalized value is read by {', '.join(others)} too"
    if not is_constant(signs):
        return "the graph computes the signs of the rotation"
    features, shapes = rotated.meta["val"].shape[-1], [tuple(each.meta["val"].shape) for each in (norm.weight, norm.x)]
    if shapes[0] != (features,) or shapes[1][-1] != features:
        return f"the weight is {shapes[0]} and the value {shapes[1]}; required ({features},) and (…, {features})"
    return None


def _fuse(graph: fx.Graph, rotation: fx.Node, norm: Norm) -> None:
    _, signs, block = rotation.args
    rest = (norm.weight, norm.eps, norm.offset, signs, block)
    terms = _terms(norm.x) if norm.weight < norm.x and signs < norm.x else None  # type: ignore[operator]
    if terms is None:
        with graph.inserting_before(rotation):
            operand = results(graph, call(graph, torch.ops.qpc.norm_operand.default, norm.x, *rest), 2)
    else:
        with graph.inserting_before(norm.x):
            words, scales, total = results(graph, call(graph, torch.ops.qpc.add_norm_operand.default, *terms, *rest), 3)
        operand = [words, scales]
        norm.x.replace_all_uses_with(total)
        graph.erase_node(norm.x)
    for user in list(rotation.users):
        user.replace_all_uses_with(operand[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(rotation)


def match_norm(result: Any) -> Norm | None:
    """The RMSNorm that a node is the result of, as transformers write it; None if it is none."""
    product = unconverted(result)
    if not is_call(product, aten.mul.Tensor):
        return None
    for weight, normalized in (product.args, product.args[::-1]):
        found, x = _weight(weight), _normalized(unconverted(normalized))
        if found is not None and x is not None:
            return Norm(x[0], found[0], x[1], found[1])
    return None


def _weight(node: Any) -> tuple[fx.Node, float] | None:
    """A vector that the graph is given, and what is added to it."""
    offset = 0.0
    node = unconverted(node)
    if is_call(node, aten.add.Tensor) and isinstance(node.args[1], int | float) and not node.kwargs:
        node, offset = unconverted(node.args[0]), float(node.args[1])
    return (node, offset) if is_constant(node) and node.meta["val"].ndim == 1 else None


def _normalized(node: Any) -> tuple[fx.Node, float] | None:
    """x and eps, if a node is `x * rsqrt(mean(x^2) + eps)`."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for x, root in (node.args, node.args[::-1]):
        if not is_call(root, aten.rsqrt.default) or not is_call(root.args[0], aten.add.Tensor):
            continue
        mean, eps = root.args[0].args
        if not is_call(mean, aten.mean.dim) or not isinstance(eps, float) or list(mean.args[1]) != [-1] or mean.args[2:3] != (True,):
            continue
        if _is_square(mean.args[0], x) and isinstance(unconverted(x), fx.Node):
            return unconverted(x), eps
    return None


def _is_square(node: Any, x: object) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return bool(node.args == (x, 2))
    return is_call(node, aten.mul.Tensor) and bool(node.args == (x, x))


def _terms(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two terms of a sum of values of one shape and dtype."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    one, other = node.args
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return None
    values = [each.meta["val"] for each in (one, other, node)]
    alike = all(isinstance(v, Tensor) and v.shape == values[2].shape and v.dtype == values[2].dtype for v in values)
    return (one, other) if alike else None
