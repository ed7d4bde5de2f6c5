"""Lower: put qpc operators in the place of the quantized linears.

A chosen group becomes one operator on its stacked rows; everything that reads one value through the same signs shares one rotation.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qpc.ir.annotation import KEY, FusionGroup, annotation
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.kernels.linear import operator, stack_rows
from qpc.passes.base import Pass, PassResult
from qpc.passes.quantize import site_of
from qpc.quant.quantizer import TILE, PackedWeight


@dataclass(frozen=True)
class Lower(Pass):
    """Packed tensors become buffers of the graph module; placeholders that nothing reads any more stay, for callers that still pass them."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    ensures: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program) -> PassResult:
        """Replace group by group, in graph order."""
        nodes = {site_of(node).name: node for node in program.linears() if annotation(node).quantizer is not None}
        rotations: dict[tuple[fx.Node, int], fx.Node] = {}
        done: set[str] = set()
        for name, node in nodes.items():
            if name in done:
                continue
            group = annotation(node).group
            assert group is not None
            members = [nodes[member] for member in group.members]
            _lower_group(program, group, members, rotations)
            done.update(group.members)
        program.graph.lint()
        program.graph_module.recompile()
        return PassResult(changed=tuple(done))


def _lower_group(program: Program, group: FusionGroup, members: list[fx.Node], rotations: dict[tuple[fx.Node, int], fx.Node]) -> None:
    graph, first = program.graph, members[0]
    weights = [program.packed[site_of(node).name] for node in members]
    quantizer, rotation = weights[0].quantizer, weights[0].rotation
    x = first.args[0]
    assert isinstance(x, fx.Node)
    label = re.sub(r"\W", "_", group.members[0])
    with graph.inserting_before(first):
        if rotation is not None:
            key = (x, rotation.signs.data_ptr())
            if key not in rotations:
                signs = _constant(program, f"{label}_signs", rotation.signs)
                rotations[key] = graph.call_function(torch.ops.qpc.rotate.default, (x, signs, rotation.block))
                rotations[key].meta = {k: v for k, v in x.meta.items() if k != KEY}
            x = rotations[key]
        codes, scales = stack_rows(weights)
        _view_rows(program, members, codes, scales)
        code_nodes = [_constant(program, f"{label}_codes{index}", part) for index, part in enumerate(codes)]
        scale_node = _constant(program, f"{label}_scales", scales)
        target, code = operator(quantizer, weights[0].in_features)
        rows = sum(w.out_features for w in weights)
        bias = _bias(program, label, members, weights)
        y = graph.call_function(target, (x, code_nodes, scale_node, bias, *code, rows))  # type: ignore[arg-type]
        pieces, start = [y], 0
        if len(members) > 1:
            pieces = []
            for weight in weights:
                pieces.append(graph.call_function(torch.ops.aten.slice.Tensor, (y, -1, start, start + weight.out_features)))
                start += weight.out_features
    for node, piece in zip(members, pieces, strict=True):
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
        graph.erase_node(node)


def _view_rows(program: Program, members: list[fx.Node], codes: tuple[Tensor, ...], scales: Tensor) -> None:
    """Make the packed weight of each member a row range of the group's one packed weight."""
    start = 0
    for node in members:
        name = site_of(node).name
        weight = program.packed[name]
        rows = weight.scales.numel() // TILE
        views = tuple(part[start : start + rows] for part in codes)
        program.packed[name] = replace(weight, codes=views, scales=scales[start * TILE : (start + rows) * TILE])
        start += rows


def _bias(program: Program, label: str, members: list[fx.Node], weights: list[PackedWeight]) -> fx.Node | None:
    """The bias of the stacked rows: the placeholder itself for a single, else a constant with zeros for members that have none."""
    names = [site_of(node).bias for node in members]
    if all(name is None for name in names):
        return None
    if len(members) == 1:
        bias = members[0].args[2]
        assert isinstance(bias, fx.Node)
        return bias
    live = [None if name is None else program.tensor(name).detach() for name in names]
    like = next(b for b in live if b is not None)
    stacked = torch.cat([like.new_zeros(w.out_features) if b is None else b for b, w in zip(live, weights, strict=True)])
    return _constant(program, f"{label}_bias", stacked)


def _constant(program: Program, name: str, value: Tensor) -> fx.Node:
    """A buffer of the graph module, read at the insertion point."""
    name = f"qpc_{name}"
    program.graph_module.register_buffer(name, value)
    node = program.graph.get_attr(name)
    node.meta["val"] = value
    return node
