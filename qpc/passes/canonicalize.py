"""Canonicalize: every linear becomes one `aten.linear` call that knows its `LinearSite`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qpc.ir.annotation import Annotation, LinearShape, LinearSite, annotate, fake_value
from qpc.ir.linear import LINEAR, readers, stored_weight
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.linear_forms import rewrite_linears

aten = torch.ops.aten

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
        rewrite_linears(program)
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
            stored = program.tensors[weight.name]
            rows, columns = program.tensor(stored).shape
            site = LinearSite(
                name=name,
                weight=stored,
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
                targets = {user.target for user, _ in readers(node)}
                if LINEAR in targets:
                    continue
                others = sorted(str(target) for target in targets - _TABLES)
                if others:
                    remarks.append(self.declined(program.tensors[node.name], f"read by {', '.join(others)}, which is no linear"))
        return remarks


def _refusal(program: Program, matrix: fx.Node, transposed: bool) -> str | None:
    """Why the weight of a linear must stay as it is."""
    value = program.tensor(program.tensors[matrix.name])
    if not isinstance(value, nn.Parameter):
        return "its weight is a buffer, not a parameter"
    if not value.is_floating_point():
        return f"its weight is {value.dtype}, not a floating-point matrix"
    for user, view in readers(matrix):
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
