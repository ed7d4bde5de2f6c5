"""The ways in which a model multiplies by a stack of experts, and their rewriting to `qpc::expert_linear`.

    grouped    rows sorted by expert, and where each expert ends: grouped_mm(x, stack, ends)
    gathered   the matrix of each row: bmm(x[:, None], stack[expert]) or bmm(stack[expert], x[..., None])

A bias that is added per expert stays an addition of its own.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import fake_value
from qpc.ir.linear import LINEAR, is_transpose, rank, stored_weight
from qpc.ir.program import Program
from qpc.ir.values import remove_dead_code
from qpc.quant.experts import EXPERT_LINEAR

aten = torch.ops.aten

_GROUPED = {"aten._grouped_mm", "transformers.grouped_mm_fallback", "_grouped_mm", "grouped_mm"}
_PRODUCTS = {aten.bmm.default, torch.bmm}
_UNSQUEEZES = {aten.unsqueeze.default, torch.unsqueeze}


def rewrite_experts(program: Program) -> None:
    """Rewrite every product of an activation [rows, features] with a stored stack."""
    experts: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op == "call_function" and _operator(node.target) in _GROUPED:
            _from_grouped(program, node, experts)
        elif node.target in _PRODUCTS and len(node.args) == 2:
            _from_gathered(program, node)
    remove_dead_code(program.graph)


def routers(graph: fx.Graph) -> set[fx.Node]:
    """The last linears before the choice of an expert."""
    pending = [node.args[2] for node in graph.find_nodes(op="call_function", target=EXPERT_LINEAR)]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            inputs = [] if node.target in (LINEAR, EXPERT_LINEAR) else node.all_input_nodes
            pending += [source for source in inputs if not isinstance(fake_value(source), int | torch.SymInt)]
    return {node for node in seen if node.target is LINEAR}


def _operator(target: object) -> str:
    """The name of an operator without its overload, or of a function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return str(target) if isinstance(target, torch._ops.OpOverloadPacket) else getattr(target, "__name__", "")


def _from_grouped(program: Program, node: fx.Node, experts: dict[fx.Node, fx.Node]) -> None:
    """experts: for the ends of groups that were met before, the expert of each row."""
    given = dict(zip(("x", "weight", "offs"), node.args, strict=False)) | node.kwargs
    x, weight, ends = (given.pop(key, None) for key in ("x", "weight", "offs"))
    stored, transposed = stored_weight(program, weight, 3)
    others = [*node.args[3:], *given.values()]
    if stored is None or any(other is not None for other in others) or rank(x) != 2 or rank(ends) != 1:
        return
    assert isinstance(x, fx.Node) and isinstance(ends, fx.Node)
    if ends not in experts:
        with program.graph.inserting_before(node):
            experts[ends] = _expert_of_rows(program.graph, x, ends)
    product = _expert_linear(node, x, stored, experts[ends], in_rows=transposed)
    node.replace_all_uses_with(product)
    program.graph.erase_node(node)


def _expert_of_rows(graph: fx.Graph, x: fx.Node, ends: fx.Node) -> fx.Node:
    """The expert of each row, int64 [rows], from where the rows of each expert end."""
    value: Tensor = fake_value(x)
    with torch.no_grad():
        rows = graph.call_function(aten.sym_size.int, (x, 0))
        rows.meta["val"] = value.shape[0]
        numbers = graph.call_function(aten.arange.default, (rows,), {"dtype": fake_value(ends).dtype, "device": value.device})
        numbers.meta["val"] = value.new_empty(value.shape[:1], dtype=fake_value(ends).dtype)
        expert = graph.call_function(aten.searchsorted.Tensor, (ends, numbers), {"right": True})
        expert.meta["val"] = value.new_empty(value.shape[:1], dtype=torch.int64)
    return expert


def _from_gathered(program: Program, node: fx.Node) -> None:
    for matrix, vector, axis in ((node.args[1], node.args[0], 1), (node.args[0], node.args[1], 2)):
        assert isinstance(matrix, fx.Node)
        turned = is_transpose(matrix)
        found = _gathered(program, matrix.args[0] if turned else matrix)
        x = _without_axis(vector, axis)
        if found is not None and x is not None:
            stored, transposed, expert = found
            product = _expert_linear(node, x, stored, expert, in_rows=(transposed != turned) == (axis == 1))
            with program.graph.inserting_before(node):
                result = program.graph.call_function(aten.unsqueeze.default, (product, axis))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
            return


def _gathered(program: Program, node: Any) -> tuple[fx.Node, bool, fx.Node] | None:
    """If a node is the matrices of given experts: the stack, whether the graph transposes it before, and the experts."""
    if not isinstance(node, fx.Node) or node.target not in (aten.index.Tensor, operator.getitem):
        return None
    index = node.args[1]
    if isinstance(index, list | tuple) and len(index) == 1:
        index = index[0]
    stored, transposed = stored_weight(program, node.args[0], 3)
    return (stored, transposed, index) if stored is not None and isinstance(index, fx.Node) and rank(index) == 1 else None


def _without_axis(node: Any, axis: int) -> fx.Node | None:
    """The rows [rows, features] that an unsqueeze at this axis makes three axes of."""
    if not isinstance(node, fx.Node) or not (node.target in _UNSQUEEZES or (node.op == "call_method" and node.target == "unsqueeze")):
        return None
    x, at = node.args
    return x if isinstance(x, fx.Node) and rank(x) == 2 and isinstance(at, int) and at % 3 == axis else None


def _expert_linear(before: fx.Node, x: fx.Node, stored: fx.Node, expert: fx.Node, *, in_rows: bool) -> fx.Node:
    """in_rows: the matrices are stored [out_features, in_features]; else the other way round."""
    graph, stack = before.graph, fake_value(stored)
    with graph.inserting_before(before), torch.no_grad():
        weight = stored
        if not in_rows:
            weight = graph.create_node("call_function", aten.transpose.int, (stored, 1, 2), name="transposed")
            weight.meta["val"] = stack = stack.transpose(1, 2)
        product = graph.create_node("call_function", EXPERT_LINEAR, (x, weight, expert, len(stack)), name="expert_linear")
        product.meta = dict(before.meta)
        value = fake_value(x)
        product.meta["val"] = value.new_empty((value.shape[0], stack.shape[1]))
    return product
