"""Tables: matrices whose rows the graph looks up by index, and output heads, both packed at a rate of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpc.ir.annotation import LinearShape
from qpc.quant.quantizer import PackedWeight

APART = "quantized at the rate of the embeddings, if at all"
"""Why a linear that may become the head of a table is excluded from the allocation."""

_INDEX_OF_TABLE: dict[Any, int] = {torch.ops.aten.embedding.default: 0, torch.nn.functional.embedding: 1}


@dataclass(frozen=True)
class Lookup:
    """A module that looks rows up: its qualified name, and the scalar that it multiplies them by."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """A packed table [rows, features] and the modules that share it.

    weight: qualified name of the parameter. heads: names of the linears that multiply by it (tied, or a head alone).
    distortion: relative squared error. kurtosis: excess kurtosis of the rows before and after the rotation.
    """

    weight: str
    shape: LinearShape
    lookups: tuple[Lookup, ...]
    heads: tuple[str, ...]
    packed: PackedWeight
    distortion: float
    kurtosis: tuple[float, float]

    @property
    def names(self) -> tuple[str, ...]:
        """All modules that read it."""
        return (*(lookup.name for lookup in self.lookups), *self.heads)


def looks_up(node: fx.Node, table: fx.Node) -> bool:
    """Whether a node looks rows of this table up, and does nothing else with it."""
    place = _INDEX_OF_TABLE.get(node.target)
    return place is not None and [i for i, arg in enumerate(node.args) if arg is table] == [place] and table not in node.kwargs.values()


def indices_of(node: fx.Node) -> fx.Node:
    """The indices that a lookup reads."""
    indices = node.args[1 - _INDEX_OF_TABLE[node.target]]
    assert isinstance(indices, fx.Node)
    return indices
