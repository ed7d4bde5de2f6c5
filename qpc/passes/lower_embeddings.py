"""LowerEmbeddings: put lookups of packed rows, and linears on the same codes, in the place of what reads a packed table."""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qpc.ir.annotation import KEY
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.ir.table import Table, indices_of, looks_up
from qpc.kernels.linear import operator
from qpc.kernels.lookup import lookup_operator
from qpc.passes.base import Pass, PassResult
from qpc.passes.lower import constant


@dataclass(frozen=True)
class LowerEmbeddings(Pass):
    """Packed tables become buffers of the graph module, each once; their placeholders stay, read by nothing."""

    name: ClassVar[str] = "lower-embeddings"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    ensures: ClassVar[Stage] = Stage.QUANTIZED

    def run(self, program: Program) -> PassResult:
        """Replace table by table, in graph order."""
        changed = []
        for node in program.graph.find_nodes(op="placeholder"):
            table = program.tables.get(program.tensors.get(node.name, ""))
            if table is not None:
                _lower(program, node, table)
                changed.append(table.weight)
        program.graph.lint()
        program.graph_module.recompile()
        return PassResult(tuple(changed))


def _lower(program: Program, matrix: fx.Node, table: Table) -> None:
    graph, packed, rotation = program.graph, table.packed, table.packed.rotation
    label = re.sub(r"\W", "_", table.names[0])
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        codes = [constant(program, f"{label}_codes{index}", part) for index, part in enumerate(packed.codes)]
        scales = constant(program, f"{label}_scales", packed.scales)
        none = packed.scales.new_empty(0, dtype=torch.uint8)
        signs = constant(program, f"{label}_signs", none if rotation is None else rotation.signs)
    block = 0 if rotation is None else rotation.block
    for node in list(matrix.users):
        with graph.inserting_before(node):
            if looks_up(node, matrix):
                target, code = lookup_operator(packed.quantizer, packed.in_features)
                shape = (packed.out_features, packed.in_features, program.tensor(table.weight).dtype)
                made = graph.call_function(target, (indices_of(node), codes, scales, signs, block, *code, *shape))  # type: ignore[arg-type]
            else:
                x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
                assert isinstance(x, fx.Node)
                turned = x
                if rotation is not None:
                    turned = graph.call_function(torch.ops.qpc.rotate.default, (x, signs, block))
                    turned.meta = {key: value for key, value in x.meta.items() if key != KEY}
                target, code = operator(packed.quantizer, packed.in_features)
                made = graph.call_function(target, (turned, codes, scales, bias, *code, packed.out_features))  # type: ignore[arg-type]
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
