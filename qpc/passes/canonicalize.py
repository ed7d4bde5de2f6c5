"""Canonicalize: every linear becomes one `aten.linear`, or one `qpc::expert_linear`, that knows its `LinearSite`."""

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qpc.ir.annotation import Annotation, LinearShape, LinearSite, annotate, fake_value
from qpc.ir.linear import LINEAR, WEIGHT_RANKS, readers, stored_weight
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.expert_forms import routers
from qpc.passes.linear_forms import rewrite_linears
from qpc.quant.experts import EXPERT_LINEAR
from qpc.quant.layout import BLOCK_ROWS

aten = torch.ops.aten

ROUTER = "it decides which experts run"

_TABLES = {aten.embedding.default, torch.nn.functional.embedding}
_LOOKUPS = {aten.index.Tensor, operator.getitem}
"""How models look up a vector for each row, such as the bias of its expert."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites `nn.Linear` calls, `F.linear`, `addmm`, `mm` and `matmul` with a 2-D parameter.

    A linear is named after the module that owns its weight. Its weight must be a parameter that only linears read, and all in one
    orientation; other linears keep their place in the graph and get a remark. A weight of [in_features, out_features] is transposed
    in the graph, and `LinearSite.transposed` says so.

    A stack of experts becomes one site, if each has whole blocks of rows. The linear that decides which experts run stays as it is: it has
    few weights, and an error of it may pick another expert, which no loss that is linear in errors foresees.
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
        routing = routers(program.graph)
        for node in [node for node in program.graph.nodes if node.target in WEIGHT_RANKS]:
            bias = node.args[2] if node.target is LINEAR and len(node.args) > 2 else None
            weight, transposed = stored_weight(program, node.args[1], WEIGHT_RANKS[node.target])
            if weight is None:
                remarks.append(self.declined(node.name, "its weight is computed, not a parameter"))
                continue
            name = _site_name(program, node, program.tensors[weight.name])
            if node in routing:
                program.excluded[name] = ROUTER
            reason = program.excluded.get(name) or _refusal(program, node, weight, transposed)
            if reason:
                remarks.append(self.declined(name, reason))
                continue
            stored = program.tensors[weight.name]
            *stack, rows, columns = program.tensor(stored).shape
            if transposed:
                rows, columns = columns, rows
            site = LinearSite(
                name=name,
                weight=stored,
                shape=LinearShape(math.prod(stack) * rows, columns),
                bias=program.tensors.get(bias.name) if isinstance(bias, fx.Node) else None,
                transposed=transposed,
                experts=stack[0] if stack else None,
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
                if not targets.isdisjoint(WEIGHT_RANKS):
                    continue
                tables = _TABLES if value.ndim > 2 else _TABLES | _LOOKUPS
                others = sorted(str(target) for target in targets - tables)
                if others:
                    remarks.append(self.declined(program.tensors[node.name], f"read by {', '.join(others)}, which is no linear"))
        return remarks


def _refusal(program: Program, node: fx.Node, matrix: fx.Node, transposed: bool) -> str | None:
    """Why the weight of a linear must stay as it is. matrix: the placeholder of the weight."""
    value = program.tensor(program.tensors[matrix.name])
    if not isinstance(value, nn.Parameter):
        return "its weight is a buffer, not a parameter"
    if not value.is_floating_point():
        return f"its weight is {value.dtype}, not a floating-point matrix"
    for user, view in readers(matrix):
        if user.target is not node.target or [i for i, arg in enumerate(user.args) if arg is view] != [1]:
            return f"its weight is also read by {user.target}"
        if (view is not matrix) != transposed:
            return "its weight is also used transposed"
    rows = value.shape[-1 if transposed else -2]
    if node.target is EXPERT_LINEAR and rows % BLOCK_ROWS:
        return f"out_features={rows} of each expert must be divisible by {BLOCK_ROWS}"
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
