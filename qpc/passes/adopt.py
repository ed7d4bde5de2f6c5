"""Adopt: take the quantizers and packed weights of a program that was compiled from the same module before.

A graph that Dynamo captured anew (another shape, another entry point) must not be allocated or quantized anew: the weights are the same.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Adopt(Pass):
    """source: a program of the same module at QUANTIZED or later. Sites match by name; one that the source lacks stays as it is."""

    name: ClassVar[str] = "adopt"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    source: Program

    def run(self, program: Program) -> PassResult:
        """Copy annotations, packed weights, tables and tuned values; keep groups to the members that are here and read one value here."""
        known = self.source.decisions
        nodes = list(program.linears())
        here = {site_of(node).name: annotation(node).group for node in nodes}
        changed, remarks = [], []
        for node in nodes:
            name, legal = site_of(node).name, annotation(node).group
            decided = known.get(name)
            assert legal is not None
            if decided is None or decided.group is None:
                remarks.append(self.declined(name, "not among the linears that were allocated"))
                annotate(node, annotation(node).but(group=legal.subset((name,))))
                continue
            if all(member in known and here.get(member) == legal for member in decided.group.members):
                group = replace(decided.group, input=legal.input)
            else:
                remarks.append(self.declined(name, "the members of its group do not meet in this graph"))
                group = legal.subset((name,))
            annotate(node, decided.but(site=site_of(node), group=group))
            if name in self.source.packed:
                program.packed[name] = self.source.packed[name]
                changed.append(name)
        program.tables.update(self.source.tables)
        program.tuned.update(self.source.tuned)
        program.decisions.update((site_of(node).name, annotation(node)) for node in nodes)
        return PassResult(tuple(changed), tuple(remarks))
