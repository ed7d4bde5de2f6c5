"""Operands: turn an activation into the operand of the integer multiplication, once for all weights that read it."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qpc.ir.annotation import annotation, fake_value
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.kernels import fused
from qpc.kernels.launch import MAX_BATCH
from qpc.kernels.ops import trellis_parts
from qpc.kernels.select import Support
from qpc.passes.base import Pass, PassResult
from qpc.quant.quantizer import UniformQuantizer

Supports = Callable[[Sequence[UniformQuantizer], int, torch.dtype, torch.device], Support]

ROTATE, LINEAR = torch.ops.qpc.rotate.default, torch.ops.qpc.trellis_linear.default
ROTATE_OPERAND, PACK = torch.ops.qpc.rotate_operand.default, torch.ops.qpc.pack_operand.default


@dataclass(frozen=True)
class Operands(Pass):
    """Puts `rotate_operand` and `operand_linear` in the place of `rotate` and the `trellis_linear`s behind it.

    What reads a value that is rotated already, since the rotation was folded, gets a `pack_operand` of it.
    Only where the number of rows is known, since the shape of an operand depends on it. A rotation that something else reads too stays for
    that. supports: whether a multiplication runs on operands, and why not.
    """

    name: ClassVar[str] = "operands"
    requires: ClassVar[Stage] = Stage.LOWERED
    ensures: ClassVar[Stage] = Stage.LOWERED

    supports: Supports = fused.supports

    def run(self, program: Program) -> PassResult:
        """Rewrite value by value, in graph order of their first reader."""
        changed: list[str] = []
        remarks: list[Remark] = []
        readers: dict[fx.Node, list[fx.Node]] = {}
        for linear in program.graph.find_nodes(op="call_function", target=LINEAR):
            readers.setdefault(linear.args[0], []).append(linear)
        for node, linears in readers.items():
            reasons = {linear: self._obstacle(node, linear) for linear in linears}
            remarks += [self.declined(_label(linear), reason) for linear, reason in reasons.items() if reason is not None]
            chosen = [linear for linear in linears if reasons[linear] is None]
            if chosen:
                changed += _rewrite(program.graph, node, chosen)
        program.graph.lint()
        program.graph_module.recompile()
        return PassResult(tuple(changed), tuple(remarks))

    def _obstacle(self, source: fx.Node, linear: fx.Node) -> str | None:
        """Why this linear cannot read an operand."""
        value = fake_value(source)
        if not isinstance(value, Tensor):
            return "nothing is known of its input"
        rows = _rows(value)
        if rows is None:
            return f"the number of rows is not fixed, but {list(value.shape)}; the shape of an operand depends on it"
        if not 1 <= rows <= MAX_BATCH:
            return f"{rows} rows, an operand has 1 to {MAX_BATCH}"
        step_bits, window_bits = linear.args[4:6]
        found = self.supports(trellis_parts(step_bits, window_bits), rows, value.dtype, value.device)  # type: ignore[arg-type]
        return None if found.implementation is not None else found.reason


def _rows(value: Tensor) -> int | None:
    """The number of rows; None if it is not fixed."""
    rows = 1
    for size in value.shape[:-1]:
        if not isinstance(size, int):
            return None
        rows *= size
    return rows


def _label(linear: fx.Node) -> str:
    """The names of the sites that the node stands for; where it has none, its own."""
    sites = [site for node in (linear, *linear.users) if (site := annotation(node).site) is not None]
    return ", ".join(site.name for site in sites) or linear.name


def _rewrite(graph: fx.Graph, source: fx.Node, linears: list[fx.Node]) -> list[str]:
    """One operand of a rotation, or of a value as it is, for all of these linears; their labels."""
    value, rotates = fake_value(source), source.target is ROTATE
    with graph.inserting_before(linears[0]):
        both = graph.call_function(ROTATE_OPERAND, source.args) if rotates else graph.call_function(PACK, (source,))
        operand = tuple(graph.call_function(operator.getitem, (both, index)) for index in range(2))
    labels = []
    for linear in linears:
        labels.append(_label(linear))
        out_features = linear.args[-1]
        with graph.inserting_before(linear):
            result = graph.call_function(torch.ops.qpc.operand_linear.default, (*operand, *linear.args[1:], value.dtype))
            if value.ndim != 2:
                result = graph.call_function(torch.ops.aten.view.default, (result, [*value.shape[:-1], out_features]))
        result.meta = dict(linear.meta)
        linear.replace_all_uses_with(result)
        graph.erase_node(linear)
    if rotates and not source.users:
        graph.erase_node(source)
    return labels
