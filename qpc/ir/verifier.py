"""The verifier: what holds of a program at each stage. A breach is a defect of a pass, so it names the node."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from qpc.errors import VerifierError
from qpc.ir.annotation import FusionGroup, LinearSite, annotation, fake_value
from qpc.ir.linear import LINEAR, WEIGHT_RANKS, stored_weight
from qpc.ir.program import Program, named_tensors
from qpc.ir.stage import Stage
from qpc.ir.values import representatives
from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight, Quantizer

Site = tuple[fx.Node, LinearSite]


def verify(program: Program) -> None:
    """Check the contract of the program's stage, and of all stages before it that still apply.

    At LOWERED one operator may stand for all members of a group and carry the annotation of the first.

    Raises `VerifierError` that names the stage and the node.
    """
    stage = program.stage
    _graph(program)
    _placeholders(program)
    if stage < Stage.CANONICAL:
        return
    sites = [(node, site) for node in program.linears() if (site := annotation(node).site) is not None]
    _canonical(program, sites)
    if Stage.GROUPED <= stage < Stage.LOWERED:
        _grouped(program, sites)
    if stage >= Stage.ALLOCATED:
        _allocated(program, sites)
    if stage >= Stage.QUANTIZED:
        _quantized(program, sites)
    _tables(program)
    if stage >= Stage.LOWERED:
        for node, site in sites:
            _require(program, annotation(node).quantizer is None or node.target not in WEIGHT_RANKS, node, f"{site.name} is not lowered")


def _require(program: Program, holds: bool, subject: fx.Node | str, breach: str) -> None:
    if not holds:
        raise VerifierError(f"stage {program.stage.name}, node {str(subject)!r}: {breach}")


def _graph(program: Program) -> None:
    try:
        program.graph.lint()
    except Exception as error:
        raise VerifierError(f"stage {program.stage.name}: the graph is malformed: {error}") from error


def _placeholders(program: Program) -> None:
    """Every placeholder is an input or one live tensor of the same shape and dtype; no tensor has two."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for name in (*program.tensors, *program.inputs):
        _require(program, name in placeholders, name, "is listed in the program but no placeholder of the graph")
    _require(program, len(set(program.inputs)) == len(program.inputs), ", ".join(program.inputs), "an input is listed twice")
    live, owner = named_tensors(program.module), dict[int, str]()
    for name, node in placeholders.items():
        _require(program, (name in program.tensors) != (name in program.inputs), node, "must be either a tensor of the module or an input")
        if name in program.inputs:
            continue
        qualified = program.tensors[name]
        _require(program, qualified in live, node, f"the module has no parameter or buffer {qualified!r}")
        value, known = live[qualified], fake_value(node)
        other = owner.setdefault(id(value), name)
        _require(program, other == name, node, f"stands for {qualified!r}, as does {other!r}: tied tensors share one placeholder")
        if isinstance(known, Tensor):
            seen, actual = (known.dtype, tuple(known.shape)), (value.dtype, tuple(value.shape))
            _require(program, seen == actual, node, f"was captured as {seen}, but {qualified!r} is {actual}")


def _canonical(program: Program, sites: list[Site]) -> None:
    """Each site is one `aten.linear`, or `qpc::expert_linear`, on the parameter that it names."""
    for node in program.graph.nodes:
        module = program.graph_module.get_submodule(node.target) if node.op == "call_module" else None
        other = isinstance(module, nn.Linear) or node.target in (torch.nn.functional.linear, torch._C._nn.linear)
        _require(program, not other, node, "a linear that is not aten.linear")
    by_name: dict[str, LinearSite] = {}
    for node, site in sites:
        same = by_name.setdefault(site.name, site)
        agrees = replace(same, bias=None) == replace(site, bias=None)
        _require(program, agrees, node, f"{site} and {same} have one name but differ")
        _require(program, site.name not in program.excluded, node, f"{site.name} is excluded ({program.excluded.get(site.name)})")
        if node.target not in WEIGHT_RANKS:
            _require(program, program.stage >= Stage.LOWERED, node, f"carries the site {site.name}, but is {node.target}, not aten.linear")
            continue
        weight, transposed = stored_weight(program, node.args[1], WEIGHT_RANKS[node.target])
        _require(program, weight is not None, node, f"the weight of {site.name} is no parameter")
        assert weight is not None
        read = program.tensors[weight.name]
        _require(program, read == site.weight, node, f"reads {read!r}, but its site says {site.weight!r}")
        _require(program, transposed == site.transposed, node, f"transposed is {site.transposed}, but the graph says {transposed}")
        live = program.tensor(site.weight).mT if transposed else program.tensor(site.weight)
        rows, columns = live.shape[:-1].numel(), live.shape[-1]
        shape = (site.shape.out_features, site.shape.in_features)
        _require(program, shape == (rows, columns), node, f"site shape {site.shape}, but {site.weight!r} is {rows}x{columns}")
        stack = len(live) if node.target is not LINEAR else None
        _require(program, site.experts == stack, node, f"the site has {site.experts} experts, but {site.weight!r} {stack}")
        bias = node.args[2] if node.target is LINEAR and len(node.args) > 2 else None
        name = program.tensors.get(bias.name) if isinstance(bias, fx.Node) else None
        replaced = program.stage >= Stage.LOWERED and site.bias in program.tuned
        _require(program, replaced or name == site.bias, node, f"adds {name!r}, but its site says {site.bias!r}")


def _grouped(program: Program, sites: list[Site]) -> None:
    """The sites of each group are its members, in graph order, and read its input."""
    nodes = {node.name: node for node in program.graph.nodes}
    same = representatives(program.graph)
    found: dict[FusionGroup, dict[str, LinearSite]] = {}
    for node, site in sites:
        group = annotation(node).group
        if group is None:
            raise VerifierError(f"stage {program.stage.name}, node {node.name!r}: {site.name} has no group")
        found.setdefault(group, {})[site.name] = site
        _require(program, site.name in group.members, node, f"{site.name} is not among the members {group.members} of its group")
        if node.target in WEIGHT_RANKS:
            source = nodes.get(group.input)
            _require(program, source is not None, node, f"the group reads {group.input!r}, which is not in the graph")
            reads = same[node.all_input_nodes[0]]
            _require(program, source is not None and same[source] is reads, node, f"reads {reads.name!r}, its group {group.input!r}")
    for group, members in found.items():
        present = tuple(members)
        _require(program, present == group.members, group.members[0], f"the group is {group.members}, but its sites are {present}")
        shapes = tuple(site.shape for site in members.values())
        _require(program, shapes == group.shapes, group.members[0], f"the group has shapes {group.shapes}, its sites {shapes}")


def _allocated(program: Program, sites: list[Site]) -> None:
    """One quantizer, or none, for each group and for each weight."""
    chosen: dict[FusionGroup | str, Quantizer | None] = {}
    for node, site in sites:
        found = annotation(node)
        _require(program, isinstance(found.quantizer, Quantizer | None), node, f"{found.quantizer!r} is no quantizer")
        for owner in (found.group, site.weight):
            if owner is not None:
                other = chosen.setdefault(owner, found.quantizer)
                what = "weight" if isinstance(owner, str) else "group"
                _require(program, other == found.quantizer, node, f"{site.name} has {found.quantizer}, but its {what} has {other}")


def _quantized(program: Program, sites: list[Site]) -> None:
    """Every site with a quantizer has a packed weight of its shape; members of a group share their rotation."""
    quantized = set()
    for node, site in sites:
        found = annotation(node)
        if found.quantizer is not None:
            quantized |= {site.name} if node.target in WEIGHT_RANKS or found.group is None else set(found.group.members)
    for name in program.packed:
        _require(program, name in quantized, name, "has a packed weight, but no quantizer")
    rotations: dict[FusionGroup, PackedWeight] = {}
    for node, site in sites:
        found = annotation(node)
        if found.quantizer is None:
            continue
        packed = program.packed.get(site.name)
        if packed is None:
            raise VerifierError(f"stage {program.stage.name}, node {node.name!r}: {site.name} has no packed weight")
        breach = _misfit(site, found.quantizer, packed)
        _require(program, breach is None, node, f"{site.name}: {breach}")
        if found.group is not None:
            partner = rotations.setdefault(found.group, packed)
            _require(program, _rotate_alike(packed, partner), node, f"{site.name} is rotated otherwise than the rest of its group")


def _tables(program: Program) -> None:
    """Every packed table fits its parameter; once lowered, nothing reads the parameter any more."""
    for name, table in program.tables.items():
        breach = _misfit(LinearSite(name, name, table.shape), table.packed.quantizer, table.packed)
        _require(program, breach is None, name, f"the table {breach}")
        shape = (table.shape.out_features, table.shape.in_features)
        _require(program, tuple(program.tensor(name).shape) == shape, name, f"the table has shape {table.shape}")
    if program.stage >= Stage.LOWERED:
        for node in program.graph.find_nodes(op="placeholder"):
            packed = program.tensors.get(node.name) in program.tables
            _require(program, not packed or not node.users, node, "is a packed table, but is still read")


def _misfit(site: LinearSite, quantizer: Quantizer, packed: PackedWeight) -> str | None:
    """How a packed weight fails to be one of this site and quantizer."""
    shape, expected = (packed.out_features, packed.in_features), (site.shape.out_features, site.shape.in_features)
    if shape != expected:
        return f"the packed weight is {shape[0]}x{shape[1]}, the site {site.shape}"
    if packed.quantizer != quantizer:
        return f"packed by {packed.quantizer}, allocated to {quantizer}"
    rows = row_blocks(packed.out_features)
    codes = [tuple(part.shape) for part in packed.codes]
    required = [(rows, columns, part.block_words) for part, columns in quantizer.parts(packed.in_features)]
    if codes != required or any(part.dtype != torch.int32 for part in packed.codes):
        return f"codes are {[(str(part.dtype), tuple(part.shape)) for part in packed.codes]}, int32 {required} is required"
    if packed.scales.dtype != torch.bfloat16 or tuple(packed.scales.shape) != (rows * BLOCK_ROWS,):
        return f"scales are {packed.scales.dtype} {tuple(packed.scales.shape)}, bfloat16 {(rows * BLOCK_ROWS,)} is required"
    if packed.rotation is not None and packed.rotation.features != packed.in_features:
        return f"rotates {packed.rotation.features} inputs of {packed.in_features}"
    return None


def _rotate_alike(one: PackedWeight, other: PackedWeight) -> bool:
    if one.rotation is None or other.rotation is None:
        return one.rotation is other.rotation
    return one.rotation.block == other.rotation.block and torch.equal(one.rotation.signs, other.rotation.signs)
