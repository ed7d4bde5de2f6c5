"""Canonicalize: every linear becomes one `aten.linear` call that knows its `LinearSite`."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpc.ir.annotation import Annotation, LinearShape, LinearSite, annotate, fake_value
from qpc.ir.program import Program, Remark, named_tensors
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult

aten = torch.ops.aten

LINEAR = aten.linear.default
_LINEARS = {LINEAR, torch.nn.functional.linear, torch._C._nn.linear}
_ADDMMS = {aten.addmm.default, torch.addmm}
_PRODUCTS = {aten.mm.default, aten.matmul.default, torch.mm, torch.matmul, operator.matmul}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, torch.reshape}
_VIEW_METHODS = {"view", "reshape"}
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t}
_AXIS_TRANSPOSES = {aten.transpose.int, torch.transpose}
_TABLES = {aten.embedding.default, torch.nn.functional.embedding}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites `nn.Linear` calls, `F.linear`, `addmm`, `mm` and `matmul` with a 2-D parameter.

    A linear is named after the module that owns its weight. Its weight must be a parameter that only linears read, and all in one
    orientation; other linears keep their place in the graph and get a remark. A weight of [in_features, out_features] is transposed
    in the graph, and `LinearSite.transposed` says so.
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[Stage] = Stage.CAPTURED
    ensures: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> PassResult:
        _inline_linear_modules(program)
        for node in list(program.graph.nodes):
            _to_linear(program, node)
        program.graph.eliminate_dead_code()
        changed, remarks = self._annotate(program)
        remarks += self._leftovers(program)
        program.graph.lint()
        program.graph_module.recompile()
        return PassResult(tuple(changed), tuple(remarks))

    def _annotate(self, program: Program) -> tuple[list[str], list[Remark]]:
        changed: list[str] = []
        remarks: list[Remark] = []
        for node in program.graph.find_nodes(op="call_function", target=LINEAR):
            bias = node.args[2] if len(node.args) > 2 else None
            weight, transposed = stored_weight(program, node.args[1])
            if weight is None:
                remarks.append(self.declined(node.name, "its weight is computed, not a parameter"))
                continue
            name = _site_name(program, node, program.tensors[weight.name])
            reason = program.excluded.get(name) or _refusal(program, weight, transposed)
            if reason:
                remarks.append(self.declined(name, reason))
                continue
            rows, columns = fake_value(weight).shape
            site = LinearSite(
                name=name,
                weight=program.tensors[weight.name],
                shape=LinearShape(columns, rows) if transposed else LinearShape(rows, columns),
                bias=program.tensors.get(bias.name) if isinstance(bias, fx.Node) else None,
                transposed=transposed,
            )
            annotate(node, Annotation(site=site))
            changed.append(name)
        return changed, remarks

    def _leftovers(self, program: Program) -> list[Remark]:
        """Matrices that something other than a linear reads."""
        remarks = []
        for node in program.graph.find_nodes(op="placeholder"):
            value = fake_value(node)
            if node.name in program.tensors and isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point():
                targets = {user.target for user, _ in _readers(node)}
                if LINEAR in targets:
                    continue
                readers = sorted(str(target) for target in targets - _TABLES)
                if readers:
                    remarks.append(self.declined(program.tensors[node.name], f"read by {', '.join(readers)}, which is no linear"))
        return remarks


def stored_weight(program: Program, node: Any) -> tuple[fx.Node | None, bool]:
    """The placeholder of the matrix behind the weight argument of a linear, and whether the graph transposes it."""
    if not isinstance(node, fx.Node):
        return None, False
    transposed = _is_transpose(node)
    source = node.args[0] if transposed else node
    if isinstance(source, fx.Node) and source.name in program.tensors and _rank(source) == 2:
        return source, transposed
    return None, False


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    if node.target in _TRANSPOSES or (node.op == "call_method" and node.target == "t"):
        return True
    if node.target in _AXIS_TRANSPOSES or (node.op == "call_method" and node.target == "transpose"):
        return sorted(axis % 2 for axis in node.args[1:3]) == [0, 1]  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [axis % 2 for axis in node.args[1]] == [1, 0]  # type: ignore[union-attr, operator]
    return node.target is getattr and node.args[1] in ("T", "mT")


def _rank(node: Any) -> int:
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def _shape(node: fx.Node) -> list[str]:
    """Sizes as text: comparing symbolic sizes themselves would add guards."""
    value = fake_value(node)
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else []


def _inline_linear_modules(program: Program) -> None:
    """Turn calls of `nn.Linear` into `aten.linear` on new placeholders of its parameters."""
    names = {id(value): name for name, value in reversed(named_tensors(program.module).items())}
    placeholders = {name: node for node in program.graph.find_nodes(op="placeholder") if (name := program.tensors.get(node.name))}
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
    if node.target in _ADDMMS and not node.kwargs and len(node.args) == 3 and _rank(node.args[0]) == 1:
        bias, x, right = node.args
    elif node.target in _PRODUCTS and not node.kwargs and len(node.args) == 2 and _rank(node.args[0]) >= 2:
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
        node = before.graph.call_function(aten.t.default, (matrix,))
        node.meta["val"] = fake_value(matrix).t()
    return node


def _flattened_from(node: fx.Node, x: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """If `x` is a view [-1, features] of a wider value, and every reader of `node` restores its axes: that value, and the readers."""
    source = x.args[0] if _is_view(x) else None
    if not isinstance(source, fx.Node) or _rank(x) != 2 or _shape(source)[-1:] != _shape(x)[-1:]:
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
        linear = node.graph.call_function(LINEAR, args)
    linear.meta = dict(node.meta)
    for key in ("val", "example_value"):
        if key in replaced[0].meta:
            linear.meta[key] = replaced[0].meta[key]
    for old in replaced:
        old.replace_all_uses_with(linear)
        if old is not node:
            node.graph.erase_node(old)
    node.graph.erase_node(node)


def _readers(matrix: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Every node that reads a matrix, directly or transposed, and the node under which it reads it."""
    direct = [(user, matrix) for user in matrix.users if not _is_transpose(user)]
    return direct + [(user, view) for view in matrix.users if _is_transpose(view) for user in view.users]


def _refusal(program: Program, matrix: fx.Node, transposed: bool) -> str | None:
    """Why the weight of a linear must stay as it is."""
    value = program.tensor(program.tensors[matrix.name])
    if not isinstance(value, nn.Parameter):
        return "its weight is a buffer, not a parameter"
    if not value.is_floating_point():
        return f"its weight is {value.dtype}, not a floating-point matrix"
    for user, view in _readers(matrix):
        if user.target is not LINEAR or [i for i, arg in enumerate(user.args) if arg is view] != [1]:
            return f"its weight is also read by {user.target}"
        if (view is not matrix) != transposed:
            return "its weight is also used transposed"
    return None


def _site_name(program: Program, node: fx.Node, weight: str) -> str:
    """The innermost module around the node that owns the weight; failing that, the name of the weight."""
    value = program.tensor(weight)
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    try:
        owned = program.module.get_submodule(path).named_parameters(recurse=False)
    except AttributeError:
        owned = iter(())
    name = next((f"{path}.{leaf}" if path else leaf for leaf, parameter in owned if parameter is value), weight)
    return name.removesuffix(".weight")
