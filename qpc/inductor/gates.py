"""Gated activations into the operator that rotates their product into an operand."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from qpc.inductor.nodes import aten, call, is_call, is_constant, results
from qpc.ir.program import Remark
from qpc.kernels import operand_ops as _operands  # noqa: F401 - importing it registers torch.ops.qpc
from qpc.kernels.gate import Activation
from qpc.kernels.ops import ACTIVATION_DTYPES
from qpc.kernels.select import Implementation, supports_one_launch

LEAST_ROWS = 8
"""Rows from which one launch pays: each of its programs computes all activations. Profiled, a step of a whole model took 4 % longer
with it for one row of 14,336, and 1 % less for 8 (`decode_gated.json` of the H200 beside `decode.json`, which is of another lease)."""

ROTATE = torch.ops.qpc.rotate_operand.default


@dataclass(frozen=True)
class Gated:
    """`activation(gate) * up`, as nodes."""

    activation: Activation
    gate: fx.Node
    up: fx.Node


def fuse_gates(graph: fx.Graph) -> tuple[int, list[Remark]]:
    """Put `gated_operand` in the place of `activation(gate) * up` that is only rotated. Returns how many, and why others were left alone.

    Both roundings stay where the graph has them, though Inductor by itself leaves out that of an activation in 16 bits. What is no product
    of two values of its own shape is not spoken of.
    """
    fused, remarks = 0, []
    for rotation in list(graph.nodes):
        if not is_call(rotation, ROTATE) or not _is_product(rotation.args[0]):
            continue
        found = _gated(rotation)
        if isinstance(found, Gated):
            _fuse(graph, rotation, found)
            fused += 1
        else:
            remarks.append(Remark("gates", rotation.args[0].name, found))
    if fused:
        graph.eliminate_dead_code()
    return fused, remarks


def match_activation(node: fx.Node) -> tuple[Activation, fx.Node] | None:
    """The activation that a node is the result of, and of what, as Inductor spells it; None if it is none that a kernel knows."""
    dtype = node.meta["val"].dtype
    for activation in Activation if dtype in ACTIVATION_DTYPES else ():
        found: dict[fx.Node, fx.Node] = {}
        if _is_alike(node, _pattern(activation, dtype), found):
            (gate,) = found.values()
            return (activation, gate) if gate.meta["val"].dtype == dtype else None
    return None


def _gated(rotation: fx.Node) -> Gated | str:
    """The product that a rotation reads, or why it does not go into the rotation."""
    product, signs, block = rotation.args
    assert isinstance(product, fx.Node) and isinstance(block, int)
    gated = _match_gated(product)
    if gated is None:
        return f"neither factor is an activation that goes into a transform ({', '.join(Activation)})"
    others = [user.name for user in product.users if user.target is not ROTATE]
    if others:
        return f"the product is read by {', '.join(others)} too"
    values = [node.meta["val"] for node in (gated.gate, gated.up, product)]
    if any(value.dtype != values[0].dtype for value in values):
        return f"gate, up and product are {', '.join(str(value.dtype) for value in values)}; required one dtype"
    if not is_constant(signs):
        return "the graph computes the signs of the rotation"
    rows = math.prod(values[2].shape[:-1])
    if not statically_known_true(rows >= LEAST_ROWS):
        return f"{rows} rows; one launch is faster from {LEAST_ROWS} on"
    found = supports_one_launch(int(values[2].shape[-1]), block)
    return gated if found.implementation is Implementation.TRITON else found.reason


def _fuse(graph: fx.Graph, rotation: fx.Node, gated: Gated) -> None:
    with graph.inserting_before(rotation):
        arguments = (gated.gate, gated.up, gated.activation.value, *rotation.args[1:])
        operand = results(graph, call(graph, torch.ops.qpc.gated_operand.default, *arguments), 2)
    for user in list(rotation.users):
        user.replace_all_uses_with(operand[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(rotation)


def _is_product(node: Any) -> bool:
    """Whether a node multiplies two values of its own shape."""
    if not is_call(node, aten.mul.Tensor) or not all(isinstance(factor, fx.Node) for factor in node.args):
        return False
    return all(isinstance(each.meta["val"], Tensor) and each.meta["val"].shape == node.meta["val"].shape for each in node.args)


def _match_gated(product: fx.Node) -> Gated | None:
    """Activation, gate and up of a product."""
    for factor, up in (product.args, product.args[::-1]):
        assert isinstance(factor, fx.Node) and isinstance(up, fx.Node)
        found = match_activation(factor)
        if found is not None:
            return Gated(*found, up)
    return None


@cache
def _pattern(activation: Activation, dtype: torch.dtype) -> fx.Node:
    """An activation of a placeholder as the decompositions of this version of Inductor spell it."""
    from torch._inductor.decomposition import select_decomp_table  # heavy, and not needed to load a model

    with _disable_current_modes(), torch._guards.tracing(None):
        recorded = make_fx(lambda x: activation(x), select_decomp_table(), tracing_mode="fake")(torch.empty(2, dtype=dtype))
    (result,) = recorded.graph.output_node().all_input_nodes
    return result


def _is_alike(value: Any, pattern: Any, found: dict[fx.Node, fx.Node]) -> bool:
    """Whether a value is computed as a pattern says; `found` holds what its placeholders are."""
    if isinstance(pattern, list | tuple):
        return len(value) == len(pattern) and all(_is_alike(*both, found) for both in zip(value, pattern, strict=True))
    if not isinstance(pattern, fx.Node):
        return type(value) is type(pattern) and bool(value == pattern)
    if not isinstance(value, fx.Node):
        return False
    if pattern.op == "placeholder":
        return found.setdefault(pattern, value) is value
    same = value.target == pattern.target and value.kwargs == pattern.kwargs
    return same and _is_alike(value.args, pattern.args, found)
