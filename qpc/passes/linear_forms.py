"""The many ways in which a model writes a linear, and their rewriting to `aten.linear`."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpc.ir.annotation import fake_value
from qpc.ir.linear import LINEAR, rank, stored_weight
from qpc.ir.program import Program, named_tensors
from qpc.ir.values import remove_dead_code
from qpc.passes.expert_forms import rewrite_experts

aten = torch.ops.aten

_LINEARS = {LINEAR, torch.nn.functional.linear, torch._C._nn.linear}
_ADDMMS = {aten.addmm.default, torch.addmm}
_PRODUCTS = {aten.mm.default, aten.matmul.default, torch.mm, torch.matmul, operator.matmul}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, torch.reshape}
_VIEW_METHODS = {"view", "reshape"}


def rewrite_linears(program: Program) -> None:
    """Rewrite calls of `nn.Linear`, and every product of an activation with a stored matrix, to `aten.linear`; with a stack, see
    `rewrite_experts`.

    `view, addmm, view` over a wider value becomes one linear on that value.
    """
    _inline_linear_modules(program)
    for node in list(program.graph.nodes):
        _to_linear(program, node)
    rewrite_experts(program)
    remove_dead_code(program.graph)


def _inline_linear_modules(program: Program) -> None:
    """Turn calls of `nn.Linear` into `aten.linear` on new placeholders of its parameters."""
    names = {id(value): name for name, value in reversed(named_tensors(program.module).items())}
    placeholders: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.tensors:
            placeholders[program.tensors[node.name]] = node
    fake_mode = FakeTensorMode()

    def placeholder(value: Tensor) -> fx.Node:
        name = names[id(value)]
        if name not in placeholders:
            with program.graph.inserting_before(next(iter(program.graph.nodes))):
                node = program.graph.placeholder("p_" + name.replace(".", "_"))
            node.meta["val"] = fake_mode.from_tensor(value)
            program.tensors[node.name] = name
            placeholders[name] = node
        return placeholders[name]

    for node in list(program.graph.nodes):
        if node.op != "call_module":
            continue
        module = program.graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and id(module.weight) in names:
            parameters = [placeholder(value) for value in (module.weight, module.bias) if value is not None]
            _replace(node, node.args[0] if node.args else node.kwargs["input"], *parameters)


def _to_linear(program: Program, node: fx.Node) -> None:
    """Rewrite one node to `aten.linear` if it is a product with a stored matrix."""
    if node.op != "call_function":
        return
    if node.target in _LINEARS:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        node.target, node.kwargs = LINEAR, {}
        node.args = tuple(given[key] for key in ("input", "weight", "bias") if given.get(key) is not None)
        return
    if node.target in _ADDMMS and not node.kwargs and len(node.args) == 3 and rank(node.args[0]) == 1:
        bias, x, right = node.args
    elif node.target in _PRODUCTS and not node.kwargs and len(node.args) == 2 and rank(node.args[0]) >= 2:
        (x, right), bias = node.args, None
    else:
        return
    stored, is_transposed = stored_weight(program, right)
    if stored is None:
        return
    assert isinstance(x, fx.Node)
    weight = stored if is_transposed else _transpose(node, stored)
    wide, views = _flattened_from(node, x)
    _replace(node, wide or x, weight, *([] if bias is None else [bias]), instead_of=views)


def _transpose(before: fx.Node, matrix: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before), torch.no_grad():
        transposed: fx.Node = before.graph.create_node("call_function", aten.t.default, (matrix,), name="transposed")
        transposed.meta["val"] = fake_value(matrix).t()
    return transposed


def _flattened_from(node: fx.Node, x: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """If `x` is a view [-1, features] of a wider value, and every reader of `node` restores its axes: that value, and the readers."""
    source = x.args[0] if _is_view(x) else None
    if not isinstance(source, fx.Node) or rank(x) != 2 or _shape(source)[-1:] != _shape(x)[-1:]:
        return None, []
    restored = _shape(source)[:-1] + _shape(node)[-1:]
    readers = list(node.users)
    if not readers or not all(_is_view(reader) and _shape(reader) == restored for reader in readers):
        return None, []
    return source, readers


def _is_view(node: fx.Node) -> bool:
    return node.target in _VIEWS or (node.op == "call_method" and node.target in _VIEW_METHODS)


def _replace(node: fx.Node, *args: Any, instead_of: list[fx.Node] | None = None) -> None:
    """Put `aten.linear(*args)` in the place of `node`, or of the views that read it."""
    replaced = instead_of or [node]
    with node.graph.inserting_before(node):
        linear = node.graph.create_node("call_function", LINEAR, args, name="linear")
    linear.meta = dict(node.meta)
    for key in ("val", "example_value"):
        if key in replaced[0].meta:
            linear.meta[key] = replaced[0].meta[key]
    for old in replaced:
        old.replace_all_uses_with(linear)
        if old is not node:
            node.graph.erase_node(old)
    node.graph.erase_node(node)


def _shape(node: fx.Node) -> list[str]:
    """Sizes as text: comparing symbolic sizes themselves would add guards."""
    value = fake_value(node)
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else []
