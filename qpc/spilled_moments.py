"""Second moments of a model that is never in memory: part after part of it is run on all inputs, whose activations wait on the disk.

All moments are those of the original model, as a `MomentStream` that is not sequential has them, bit for bit: the same operators run on the
same batches in the same order.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qpc.calibration import Samples
from qpc.freed_memory import give_back
from qpc.held_source import HeldSource
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.ir.segments import segments
from qpc.ir.values import representatives
from qpc.moments import ExpertSums, Sum
from qpc.partial_run import PartialRun
from qpc.quant.moment import Moment
from qpc.spill import Spill

MOMENT_BYTES = 1 << 30
"""Moments of so many bytes are taken in one run through a part, at least one; a part that has more of them is run again."""

Key = tuple[fx.Node, ...]
"""Which values a moment is of: what the linears of one weight read, or those linears themselves if it is a stack of experts."""

Sums = Mapping[Key, tuple[Sum | ExpertSums, Sum | ExpertSums]]
"""Of inputs, and of those that are held out."""


class SpilledMoments:
    """A `SecondMoments` that goes through a program once, from segment to segment.

    The weights of a segment are in memory while its moments are taken, and those that read the last of them, which are packed then, until
    the next begins. The activations of one batch are; those of all batches are on the disk, before this segment and before the next.
    """

    def __init__(self, program: Program, nodes: Iterable[fx.Node], samples: Samples, source: HeldSource, spill: Spill) -> None:
        """program: CANONICAL or later, with one input. nodes: the linears whose moments may be asked for. source: of the program.

        Raises `ModelError` if the program cannot be run in parts.
        """
        self._program, self._source, self._spill = program, source, spill
        self._inputs = [(held, batch) for held, part in enumerate((samples.batches, samples.held_out)) for batch in part]
        self._segments = segments(program)
        self._place = {node: number for number, segment in enumerate(self._segments) for node in segment.nodes}
        self._same = representatives(program.graph)
        self._order = {node: position for position, node in enumerate(program.graph.nodes)}
        self._wanted: list[dict[Key, list[fx.Node]]] = [{} for _ in self._segments]
        self._weights: dict[Key, list[str]] = {}
        by_weight: dict[str, list[fx.Node]] = {}
        for node in nodes:
            by_weight.setdefault(site_of(node).weight, []).append(node)
        for weight, sharing in by_weight.items():
            self._wanted[self._place[sharing[0]]].setdefault(self._key(sharing), sharing)
            self._weights.setdefault(self._key(sharing), []).append(weight)
        self._current = -1
        self._sums: dict[Key, tuple[Sum | ExpertSums, Sum | ExpertSums]] = {}

    def moment(self, nodes: Iterable[fx.Node]) -> Moment:
        """As that of a `MomentStream`. Raises `CheckpointError` if the disk is full, and `ModelError` if a weight cannot be read."""
        fit, held_out = self._taken(list(nodes))
        assert isinstance(fit, Sum) and isinstance(held_out, Sum)
        found = fit.moment()
        assert found is not None, "samples have batches"
        return Moment(found.matrix, found.count, held_out.moment())

    def moments_of_experts(self, nodes: Iterable[fx.Node]) -> list[Moment]:
        """As those of a `MomentStream`. Raises as `moment` does."""
        fit, held_out = self._taken(list(nodes))
        assert isinstance(fit, ExpertSums) and isinstance(held_out, ExpertSums)
        found, judges = fit.moments(), held_out.moments()
        return [Moment(each.matrix, each.count, judges[index] if judges else None) for index, each in enumerate(found)]

    def close(self) -> None:
        """Remove the activations, and drop the weights."""
        self._spill.clear()
        self._source.hold(())
        self._sums, self._current = {}, -1

    def replace(self, weights: Mapping[fx.Node, Tensor]) -> None:
        """Without effect: all moments are those of the original model."""

    def _key(self, sharing: list[fx.Node]) -> Key:
        ordered = sorted(sharing, key=self._order.__getitem__)
        if site_of(ordered[0]).experts is not None:
            return tuple(ordered)
        return tuple(self._same[node.all_input_nodes[0]] for node in ordered)

    def _taken(self, sharing: list[fx.Node]) -> tuple[Sum | ExpertSums, Sum | ExpertSums]:
        """The sums for linears of one weight, which are then forgotten."""
        number, key = self._place[sharing[0]], self._key(sharing)
        if number != self._current:
            self._sums = {}
            for before in range(self._spill.newest(number), number):
                self._run(before, {})
            self._current = number
        if key not in self._sums:
            self._sums = {}  # before others take their place
            give_back()
            self._sums = {each: (self._empty(each), self._empty(each)) for each in self._together(number, key)}
            self._run(number, self._sums)
            if [*self._wanted[number]][-1] in self._sums:  # nothing of the segment is run again
                self._source.hold(weight for each in self._sums for weight in self._weights[each])
        return self._sums.pop(key)

    def _empty(self, key: Key) -> Sum | ExpertSums:
        experts = site_of(self._wanted_nodes(key)[0]).experts
        return Sum() if experts is None else ExpertSums(experts)

    def _wanted_nodes(self, key: Key) -> list[fx.Node]:
        return next(wanted[key] for wanted in self._wanted if key in wanted)

    def _together(self, number: int, key: Key) -> list[Key]:
        """The moments of a segment that are taken in one run with this one: itself, and those behind it as long as there is room."""
        keys = list(self._wanted[number])
        found, room = [key], MOMENT_BYTES - self._bytes(key)
        for other in keys[keys.index(key) + 1 :]:
            room -= self._bytes(other)
            if room < 0:
                break
            found.append(other)
        return found

    def _bytes(self, key: Key) -> int:
        site = site_of(self._wanted_nodes(key)[0])
        return 2 * 4 * site.shape.in_features**2 * (site.experts or 1)

    @torch.no_grad()
    def _run(self, number: int, sums: Sums) -> None:
        """Run one segment on all inputs: what its linears read is added up, and what it leaves is put on the disk unless it is there."""
        segment = self._segments[number]
        self._spill.drop_before(number)
        sites: dict[fx.Node, list[tuple[Sum | ExpertSums, Sum | ExpertSums]]] = {}
        for key, pair in sums.items():
            for node in self._wanted[number][key]:
                sites.setdefault(node, []).append(pair)
        writes = number + 1 < len(self._segments) and not self._spill.has(number + 1)
        run = PartialRun(self._program, segment if writes else segment.until(sites), self._source)
        with self._spill.writing(number + 1) if writes else nullcontext() as writer:
            for index, (held, batch) in enumerate(self._inputs):
                watches = {node: [partial(_add, pair[held]) for pair in pairs] for node, pairs in sites.items()}
                left = run(batch, self._spill.read(number, index) if number else None, watches)
                if writer is not None:
                    assert left is not None
                    writer.append(left)


def _add(total: Sum | ExpertSums, args: Sequence[Any]) -> None:
    if isinstance(total, ExpertSums):
        total.add(args[0], args[2])
    else:
        total.add(args[0])
