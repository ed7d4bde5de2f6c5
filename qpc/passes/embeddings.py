"""Embeddings: pack tables and output heads at one rate, apart from the allocation; what is tied stays tied."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qpc.ir.annotation import LinearShape, annotation, fake_value
from qpc.ir.linear import LINEAR
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.ir.table import APART, Lookup, Table, looks_up
from qpc.passes.base import Pass, PassResult
from qpc.passes.packing import Order, Parcel, pack
from qpc.passes.shelf import Facts, Shelf, hollow
from qpc.progress import Progress, silent, track
from qpc.quant.hadamard import block_within
from qpc.quant.quantizer import Quantizer
from qpc.quant.rotation import Rotation, seeded_generator
from qpc.spread import HERE, Spread

PROBED_ROWS = 256
"""Rows on which a module of its own class is compared with a scaled lookup."""


@dataclass(frozen=True)
class Embeddings(Pass):
    """Packs every table that the graph only looks up or multiplies by, and every output head: before the allocation, which needs the bytes.

    quantizer: of all of them. seed: of the signs, which depend on it and on the name of the parameter. rotation_block: as for `Quantize`.
    postponed: leave the values to `PackTables`; sizes and signs are known without them. spread: where tables are packed.
    Rounds each weight on its own, without error feedback. A table that was folded is rotated already.
    """

    name: ClassVar[str] = "embeddings"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.GROUPED
    quantizer: Quantizer
    seed: int = 0
    rotation_block: int | None = None
    progress: Progress = silent
    postponed: bool = False
    spread: Spread = HERE

    def run(self, program: Program) -> PassResult:
        """Fill `program.tables`."""
        remarks: list[Remark] = []
        placeholders = program.graph.find_nodes(op="placeholder")
        found = [candidate for node in placeholders if (candidate := self._candidate(program, node, remarks)) is not None]
        for weight, lookups, heads in found:
            table, stored = self._hollow(program, weight, lookups, heads), program.tensor(weight).nbytes
            if table.packed.nbytes >= stored:
                remarks.append(self.declined(weight, f"{self.quantizer} does not make it smaller than its {stored} bytes"))
            else:
                program.tables[weight] = table
        if not self.postponed:
            made = self.spread(pack, ((table, _order(program, table)) for table in list(program.tables.values())))
            for table, ((packed, facts),) in track(made, "embeddings", len(program.tables), self.progress):
                whole = replace(packed, rotation=table.packed.rotation).to(program.home(table.weight))
                program.tables[table.weight] = replace(_known(table, facts), packed=whole)
        return PassResult(tuple(program.tables), tuple(remarks))

    def _candidate(self, program: Program, node: fx.Node, remarks: list[Remark]) -> tuple[str, tuple[Lookup, ...], tuple[str, ...]] | None:
        """Name, lookups and heads of the table behind a placeholder; None, with a remark if need be, where it must stay as it is."""
        value = fake_value(node)
        if node.name not in program.tensors or not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            return None
        weight = program.tensors[node.name]
        owners = _owners(program.module, program.tensor(weight))
        lookups = [user for user in node.users if looks_up(user, node)]
        if not lookups and not any(program.excluded.get(name) == APART for name, _ in owners):
            return None
        others = [user for user in node.users if user not in lookups and not _multiplies(user, node)]
        if others:
            remarks.append(self.declined(weight, f"also read by {others[0].target}"))
            return None
        scales, heads = [], []
        for name, module in owners:
            reason = program.excluded.get(name, APART)
            if reason != APART:
                remarks.append(self.declined(name, reason))
                return None
            if not isinstance(module, nn.Embedding):
                heads.append(name)
            elif (scale := lookup_scale(module)) is not None:
                scales.append(Lookup(name, scale))
            else:
                remarks.append(self.declined(name, f"its class {type(module).__name__} does more than look rows up and scale them"))
                return None
        return weight, tuple(scales), tuple(heads)

    def _hollow(self, program: Program, weight: str, lookups: tuple[Lookup, ...], heads: tuple[str, ...]) -> Table:
        """The table without its values."""
        shape = LinearShape(*program.tensor(weight).shape)
        rotation = None
        if weight not in program.rotated:
            block = block_within(shape.in_features, self.rotation_block)
            drawn = Rotation.random(shape.in_features, seeded_generator(self.seed, weight), block)
            rotation = drawn.to(program.home(weight))
        return Table(weight, shape, lookups, heads, hollow(self.quantizer, shape, rotation), distortion=0.0, kurtosis=(0.0, 0.0))


@dataclass(frozen=True)
class PackTables(Pass):
    """Fills the tables that `Embeddings` has left without values, and puts them on a shelf, unless it has them already."""

    name: ClassVar[str] = "pack-tables"
    requires: ClassVar[Stage] = Stage.ALLOCATED
    ensures: ClassVar[Stage] = Stage.ALLOCATED
    shelf: Shelf
    progress: Progress = silent
    spread: Spread = HERE

    def run(self, program: Program) -> PassResult:
        """Table by table."""
        for table, facts in track(self._packed(program), "embeddings", len(program.tables), self.progress):
            program.tables[table.weight] = _known(table, facts)
        return PassResult(tuple(program.tables))

    def _packed(self, program: Program) -> Iterator[tuple[Table, Facts]]:
        """All tables, once each is on the shelf."""
        left = []
        for table in list(program.tables.values()):
            if (facts := self.shelf.find(table.weight)) is not None:
                yield table, facts
            else:
                left.append(table)
        for table, ((packed, facts),) in self.spread(pack, ((table, _order(program, table)) for table in left)):
            self.shelf.put(table.weight, table.names, replace(packed, rotation=table.packed.rotation), facts)
            yield table, facts


def _order(program: Program, table: Table) -> Order:
    """What packing a table takes."""
    return Order(table.packed.quantizer, (Parcel(program.where(table.weight), False, table.packed.rotation),))


def _known(table: Table, facts: Facts) -> Table:
    """A table with what is known of it once it is packed."""
    return replace(table, distortion=facts.distortion, kurtosis=facts.kurtosis)


def lookup_scale(module: nn.Embedding) -> float | None:
    """The scalar by which an embedding multiplies the rows that it looks up; None if it does anything else.

    A class with a forward of its own is compared on some rows with a lookup times each scalar that the module holds: equal means equal.
    """
    if module.max_norm is not None:
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    count = module.num_embeddings
    if module.weight.is_meta:  # any values will do
        count = min(count, PROBED_ROWS)
        values = torch.randn(count, module.embedding_dim, dtype=module.weight.dtype)
        module = copy.deepcopy(module, {id(module.weight): nn.Parameter(values)})
    indices = torch.linspace(0, count - 1, min(count, PROBED_ROWS), device=module.weight.device).long()[None]
    with torch.no_grad():
        rows = nn.functional.embedding(indices, module.weight)
        try:
            made = module(indices)
        except (TypeError, RuntimeError):
            return None
        held = [value.item() for value in module.buffers(recurse=False) if value.numel() == 1]
        held += [value for value in vars(module).values() if isinstance(value, int | float) and not isinstance(value, bool)]
        for scale in (1.0, *map(float, held)):
            if isinstance(made, Tensor) and torch.equal(made, rows * torch.tensor(scale, dtype=rows.dtype)):
                return scale
    return None


def _multiplies(node: fx.Node, matrix: fx.Node) -> bool:
    """Whether a node is a linear outside the allocation that multiplies by this matrix as it is stored."""
    return node.target is LINEAR and annotation(node).site is None and [i for i, arg in enumerate(node.args) if arg is matrix] == [1]


def _owners(module: nn.Module, value: Tensor) -> list[tuple[str, nn.Module]]:
    """Every module that holds this parameter, by each of its names."""
    everywhere = module.named_modules(remove_duplicate=False)
    return [(name, owner) for name, owner in everywhere if any(held is value for held in owner.parameters(recurse=False))]
