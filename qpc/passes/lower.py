"""Lower: put qpc operators in the place of the quantized linears.

A chosen group becomes one operator on its stacked rows; everything that reads one value through the same signs shares one rotation.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qpc.ir.annotation import KEY, FusionGroup, LinearSite, annotation, site_of
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.kernels.experts import expert_operator
from qpc.kernels.linear import operator
from qpc.kernels.row_group import stack_rows
from qpc.passes.base import Pass, PassResult
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Lower(Pass):
    """Packed tensors and tuned parameters become buffers of the graph module.

    Placeholders that nothing reads stay, for callers that still pass them.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[Stage] = Stage.QUANTIZED
    ensures: ClassVar[Stage] = Stage.LOWERED

    def run(self, program: Program) -> PassResult:
        """Replace group by group, in graph order."""
        _read_tuned(program)
        groups: dict[FusionGroup, list[fx.Node]] = {}
        for node in program.linears():
            found = annotation(node)
            if found.quantizer is not None:
                assert found.group is not None
                groups.setdefault(found.group, []).append(node)
        rotations: dict[tuple[fx.Node, int], fx.Node] = {}
        for group, nodes in groups.items():
            if site_of(nodes[0]).experts is None:
                _lower_group(program, group, nodes, rotations)
            else:
                for node in nodes:
                    _lower_experts(program, node, rotations)
        program.graph.lint()
        program.graph_module.recompile()
        return PassResult(changed=tuple(name for group in groups for name in group.members))


def _read_tuned(program: Program) -> None:
    """Let what reads a tuned parameter read a constant with its new value."""
    placeholders = program.graph.find_nodes(op="placeholder")
    with program.graph.inserting_before(next(node for node in program.graph.nodes if node.op != "placeholder")):
        for node in placeholders:
            name = program.tensors.get(node.name, "")
            if name in program.tuned:
                label = re.sub(r"\W", "_", name)
                node.replace_all_uses_with(constant(program, f"{label}_tuned", program.tuned[name]))


def _lower_group(program: Program, group: FusionGroup, nodes: list[fx.Node], rotations: dict[tuple[fx.Node, int], fx.Node]) -> None:
    """nodes: the sites of the group in graph order; a member that is applied twice to the one value has two."""
    graph, first = program.graph, nodes[0]
    weights = [program.packed[name] for name in group.members]
    sites = {site_of(node).name: site_of(node) for node in nodes}
    quantizer, rotation = weights[0].quantizer, weights[0].rotation
    x = first.args[0]
    assert isinstance(x, fx.Node)
    label = re.sub(r"\W", "_", group.members[0])
    codes, scales = stack_rows(weights)
    _view_rows(program, group, codes, scales)
    with graph.inserting_before(first):
        x = _rotated(program, x, rotation, label, rotations)
        code_nodes = [constant(program, f"{label}_codes{index}", part) for index, part in enumerate(codes)]
        scale_node = constant(program, f"{label}_scales", scales)
        if len(nodes) == 1:
            bias = first.args[2] if len(first.args) > 2 else None
        else:
            bias = _stacked_bias(program, label, [sites[name] for name in group.members])
        target, code = operator(quantizer, weights[0].in_features)
        rows = sum(weight.out_features for weight in weights)
        y = graph.call_function(target, (x, code_nodes, scale_node, bias, *code, rows))  # type: ignore[arg-type]
        pieces, start = {group.members[0]: y}, 0
        if len(weights) > 1:
            for name, weight in zip(group.members, weights, strict=True):
                pieces[name] = graph.call_function(torch.ops.aten.slice.Tensor, (y, -1, start, start + weight.out_features))
                start += weight.out_features
    for node in nodes:
        piece = pieces[site_of(node).name]
        piece.meta = dict(node.meta)
        node.replace_all_uses_with(piece)
        graph.erase_node(node)


def _lower_experts(program: Program, node: fx.Node, rotations: dict[tuple[fx.Node, int], fx.Node]) -> None:
    """node: a site that is a stack."""
    graph, site = program.graph, site_of(node)
    packed, (x, _, expert, experts) = program.packed[site.name], node.args
    assert isinstance(x, fx.Node) and site.experts is not None
    label = re.sub(r"\W", "_", site.name)
    with graph.inserting_before(node):
        x = _rotated(program, x, packed.rotation, label, rotations)
        codes = [constant(program, f"{label}_codes{index}", part) for index, part in enumerate(packed.codes)]
        scales = constant(program, f"{label}_scales", packed.scales)
        target, code = expert_operator(packed.quantizer, packed.in_features)
        rows = packed.out_features // site.experts
        y = graph.call_function(target, (x, codes, scales, expert, *code, rows, experts))  # type: ignore[arg-type]
    y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)


def _rotated(program: Program, x: fx.Node, rotation: Rotation | None, label: str, rotations: dict[tuple[fx.Node, int], fx.Node]) -> fx.Node:
    """The value behind a rotation, at the insertion point unless it is there already."""
    if rotation is None:
        return x
    key = (x, rotation.signs.data_ptr())
    if key not in rotations:
        signs = constant(program, f"{label}_signs", rotation.signs)
        rotations[key] = program.graph.call_function(torch.ops.qpc.rotate.default, (x, signs, rotation.block))
        rotations[key].meta = {k: v for k, v in x.meta.items() if k != KEY}
    return rotations[key]


def _view_rows(program: Program, group: FusionGroup, codes: tuple[Tensor, ...], scales: Tensor) -> None:
    """Make the packed weight of each member a row range of the group's one packed weight."""
    start = 0
    for name in group.members:
        weight = program.packed[name]
        rows = weight.scales.numel() // BLOCK_ROWS
        views = tuple(part[start : start + rows] for part in codes)
        program.packed[name] = replace(weight, codes=views, scales=scales[start * BLOCK_ROWS : (start + rows) * BLOCK_ROWS])
        start += rows


def _stacked_bias(program: Program, label: str, sites: list[LinearSite]) -> fx.Node | None:
    """The biases of the stacked rows as a constant, with zeros for members that have none."""
    live = [None if site.bias is None else program.latest(site.bias).detach() for site in sites]
    like = next((bias for bias in live if bias is not None), None)
    if like is None:
        return None
    pieces = [like.new_zeros(site.shape.out_features) if bias is None else bias for bias, site in zip(live, sites, strict=True)]
    return constant(program, f"{label}_bias", torch.cat(pieces))


def constant(program: Program, name: str, value: Tensor) -> fx.Node:
    """A buffer of the graph module, read at the insertion point."""
    name = f"qpc_{name}"
    while hasattr(program.graph_module, name):  # the same linear, applied once more
        name += "_again"
    program.graph_module.register_buffer(name, value)
    node = program.graph.get_attr(name)
    node.meta["val"] = value
    return node
