"""Rotary embedding of query and key into the attention that reads both."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpc.inductor.nodes import aten, is_call
from qpc.ir.program import Remark
from qpc.kernels import attention_ops as _ops  # noqa: F401 - importing it registers torch.ops.qpc

ATTENTION = torch.ops.qpc.decode_attention.default
FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2
STRIDES = ("eager_input_vals", "arg_kwarg_vals")
"""Where Inductor keeps how the arguments of a node were laid out."""


@dataclass(frozen=True)
class Turned:
    """`x cos + rotate_half(x) sin`. x: [batch, heads, 1, width]; cos, sin: [batch or 1, 1, width]."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def fuse_ropes(graph: fx.Graph) -> tuple[int, list[Remark]]:
    """Let attention turn query and key where both are turned by the same angles, and nothing else reads the results. Returns how many, and
    why others were left alone.

    Where neither is turned nothing is said.
    """
    fused, remarks = 0, []
    for node in graph.find_nodes(op="call_function", target=FUNCTIONAL):
        if node.args[0] is not ATTENTION or node.kwargs["cos"] is not None:
            continue
        found = match_turned(node.kwargs["q"]), match_turned(node.kwargs["k"])
        reason = _obstacle(node, *found)
        if reason is not None:
            remarks.append(Remark("ropes", node.name, reason))
        elif found[0] is not None and found[1] is not None:
            node.kwargs = {**node.kwargs, "q": found[0].x, "k": found[1].x, "cos": found[0].cos, "sin": found[0].sin}
            for key in STRIDES:
                node.meta.pop(key, None)
            fused += 1
    return fused, remarks


def _obstacle(attention: fx.Node, q: Turned | None, k: Turned | None) -> str | None:
    """Why the turns of query and key do not go into their attention; None also where there are none."""
    if q is None and k is None:
        return None
    if q is None or k is None:
        return f"the {'query' if q is None else 'key'} is not turned as the other is, by the rotary embedding that transformers writes"
    if (q.cos, q.sin) != (k.cos, k.sin):
        return "query and key are turned by other angles"
    for name in ("q", "k"):
        others = [user.name for user in attention.kwargs[name].users if user is not attention]  # type: ignore[union-attr]
        if others:
            return f"the turned {'query' if name == 'q' else 'key'} is read by {', '.join(others)} too"
    return None


def match_turned(node: Any) -> Turned | None:
    """The rotary embedding that a node is the result of, as transformers write it; None if it is none."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        if not is_call(straight, aten.mul.Tensor) or not is_call(crossed, aten.mul.Tensor):
            continue
        x, cos = straight.args[0], _angles(straight.args[1])
        half, sin = crossed.args[0], _angles(crossed.args[1])
        if cos is not None and sin is not None and _is_half_turn(half, x):
            return Turned(x, cos, sin)
    return None


def _angles(node: Any) -> fx.Node | None:
    """[batch or 1, 1, width] of which a node is the same with an axis for heads."""
    if not is_call(node, aten.unsqueeze.default) or node.args[1] != 1 or node.args[0].meta["val"].ndim != 3:
        return None
    found: fx.Node = node.args[0]
    return found


def _is_half_turn(node: Any, x: Any) -> bool:
    """Whether a node is `cat(-x[..., width / 2:], x[..., :width / 2])`."""
    if not is_call(node, aten.cat.default) or not isinstance(x, fx.Node):
        return False
    ndim, width = x.meta["val"].ndim, x.meta["val"].shape[-1]
    if ndim != 4 or width % 2 or len(node.args[0]) != 2 or (*node.args, 0)[1] not in (-1, ndim - 1):
        return False
    high, low = node.args[0]
    if not is_call(high, aten.neg.default):
        return False
    return _is_slice(high.args[0], x, width // 2, width) and _is_slice(low, x, 0, width // 2)


def _is_slice(node: Any, x: fx.Node, start: int, end: int) -> bool:
    """Whether a node is `x[..., start:end]`."""
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x or len(node.args) not in (3, 4):
        return False
    last, width = x.meta["val"].ndim - 1, x.meta["val"].shape[-1]
    return node.args[1] in (-1, last) and node.args[2] == start and min((*node.args, width)[3], width) == end
