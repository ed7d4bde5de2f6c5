"""Running one segment of a program whose values are read from a source: only what that segment reads is in memory."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from qpc.held_source import HeldSource
from qpc.ir.program import Program
from qpc.ir.segments import Segment
from qpc.ir.walk import evaluated, last_uses

_LOOKUP = torch.ops.aten.embedding.default

Watches = Mapping[fx.Node, Sequence[Callable[[Sequence[Any]], None]]]
"""What is called with the values of the arguments of a node before it is computed."""


class PartialRun:
    """A segment of a program, to be run on one batch after another. Its parameters are held from now on, and no others."""

    def __init__(self, program: Program, segment: Segment, source: HeldSource) -> None:
        self._program, self._segment, self._source = program, segment, source
        self._dead = last_uses(segment.nodes)
        source.hold(program.tensors[name] for name in segment.tensors)

    def __call__(
        self,
        batch: Tensor,
        start: Tensor | None,
        watches: Watches = MappingProxyType({}),
        weights: Mapping[fx.Node, Tensor] = MappingProxyType({}),
    ) -> Tensor | None:
        """The result of the segment, None if it ends before that.

        batch: the input of the program. start: what the segment before left, of this batch. weights: matrices [out_features, in_features]
        of linears instead of their own. Raises `ModelError` if a parameter cannot be read.
        """
        values: dict[fx.Node, Any] = {}
        if self._segment.start is not None and start is not None:
            values[self._segment.start] = start.to(self._source.device)
        for node in self._program.graph.find_nodes(op="placeholder"):
            if node.name in self._program.inputs:
                values[node] = batch.to(self._source.device)
            elif node.name in self._segment.tensors and not self._is_looked_up(node):
                values[node] = self._program.values(self._program.tensors[node.name]).to(self._source.device)
        result: Tensor | None = None
        for node in self._segment.nodes:
            for watch in watches.get(node, ()):
                watch([values[argument] if isinstance(argument, fx.Node) else argument for argument in node.args])
            if node.target is _LOOKUP and node.args[0] not in values:
                values[node] = self._rows(node, values)
            else:
                value = evaluated(self._program.graph_module, node, values, weights)
                values[node] = value.to(self._source.device) if node.op == "get_attr" else value
            if node is self._segment.result:
                result = values[node]
            for used in self._dead[node]:
                values.pop(used, None)
        return result

    def _is_looked_up(self, placeholder: fx.Node) -> bool:
        """Whether the segment does nothing with a stored parameter but look rows up."""
        readers = set(self._segment.nodes).intersection(placeholder.users)
        stored = self._program.tensor(self._program.tensors[placeholder.name]).is_meta
        return stored and all(reader.target is _LOOKUP and reader.args[0] is placeholder for reader in readers)

    def _rows(self, lookup: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
        """The rows of a table that is read piece by piece, for it may be larger than any layer."""
        table, indices = lookup.args[:2]
        assert isinstance(table, fx.Node) and isinstance(indices, fx.Node)
        wanted, start = values[indices], 0
        made: Tensor | None = None
        for piece in self._source.pieces(self._program.tensors[table.name]):
            made = piece.new_empty((*wanted.shape, piece.shape[1])) if made is None else made
            inside = (wanted >= start) & (wanted < start + len(piece))
            made[inside] = piece[wanted[inside] - start]
            start += len(piece)
        assert made is not None, "a table has rows"
        return made
