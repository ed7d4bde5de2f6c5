"""The parameters at the borders of a region: whether a rotation can be multiplied into all of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qpc.ir.annotation import fake_value
from qpc.ir.linear import rank, readers, stored_weight
from qpc.ir.program import Program
from qpc.ir.regions import Gain, Region, place


@dataclass(frozen=True)
class Reader:
    """A matrix whose input axis is to be rotated. gain: what is to be multiplied into it before. transposed: as in `LinearSite`."""

    gain: Gain | None
    transposed: bool = False


@dataclass(frozen=True)
class Writer:
    """A matrix or a bias whose rows `first` to `last` are to be rotated."""

    first: int
    last: int
    transposed: bool = False


@dataclass(frozen=True)
class Borders:
    """All of them by qualified name. apart: parameters of gains that cannot be multiplied into what reads them."""

    readers: dict[str, Reader] = field(default_factory=dict)
    writers: dict[str, Writer] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()


class _Refused(Exception):
    """Why a region cannot be folded."""


def borders(program: Program, region: Region) -> Borders | str:
    """The borders of a region, or why it has none that can be changed: nothing but the region may read what is changed."""
    try:
        behind = _readers(program, region)
        apart = _apart(behind)
        _check_gains(program, region, apart)
        chosen = {
            name: Reader(next((gain for gain in gains if gain is not None and gain.parameter not in apart), None), transposed)
            for name, (gains, transposed) in behind.items()
        }
        return Borders(chosen, _writers(program, region), frozenset(apart))
    except _Refused as refused:
        return str(refused)


Behind = dict[str, tuple[list[Gain | None], bool]]
"""For each matrix that reads a region the gains before its readers, and whether it is stored transposed."""


def _readers(program: Program, region: Region) -> Behind:
    """Raises `_Refused` where something else reads the matrix."""
    found: Behind = {}
    for linear, gain in region.readers.items():
        matrix, transposed = stored_weight(program, linear.args[1])
        if matrix is None:
            raise _Refused(f"the weight of {place(linear) or linear.name} is computed, not a parameter")
        name = _parameter(program, matrix)
        found.setdefault(name, ([], transposed))[0].append(gain)
        for user, view in readers(matrix):
            if not (user in region.lookups or (user in region.readers and user.args[1] is view and (view is not matrix) == transposed)):
                raise _Refused(f"{name} is also read by {user.target}")
    for lookup in region.lookups:
        table = lookup.args[0]
        name = _parameter(program, table)
        assert isinstance(table, fx.Node)
        found.setdefault(name, ([], False))[0].append(None)
        others = [user for user, _ in readers(table) if user not in region.lookups and user not in region.readers]
        if others or found[name][1]:
            raise _Refused(f"{name} is also read by {others[0].target if others else 'a linear, transposed'}")
    return found


def _apart(behind: Behind) -> set[str]:
    """Parameters of gains before a matrix that is also read without them, or behind others."""
    apart: set[str] = set()
    while True:
        more = set()
        for gains, _ in behind.values():
            before = {None if gain is None or gain.parameter in apart else gain.parameter for gain in gains}
            more |= before - {None} if len(before) > 1 else set()
        if not more:
            return apart
        apart |= {name for name in more if name is not None}


def _check_gains(program: Program, region: Region, apart: set[str]) -> None:
    """Raise `_Refused` unless each gain is a parameter of its own that may become one, or whose module may be replaced."""
    nodes = {gain.node for gain in region.gains}
    for gain in region.gains:
        value = fake_value(gain.node)
        if not isinstance(value, Tensor) or value.shape[-1] != region.width:
            raise _Refused(f"the gain {gain.parameter} is multiplied in each head")
        (source,) = (node for node in program.graph.find_nodes(op="placeholder") if program.tensors.get(node.name) == gain.parameter)
        _parameter(program, source)
        pending = [source]
        while pending:
            for user in pending.pop().users:
                if user not in nodes:
                    if rank(user) != 1:
                        raise _Refused(f"{gain.parameter} is also read by {user.target}")
                    pending.append(user)
        if len({other.offset for other in region.gains if other.parameter == gain.parameter}) > 1:
            raise _Refused(f"{gain.parameter} is a gain with and without an offset")
        owner = gain.parameter.rpartition(".")[0]
        if gain.parameter in apart and (place(gain.node) != owner or not _is_output(gain.node, owner)):
            raise _Refused(f"{gain.parameter} lies before a weight that a table shares, and is not the last step of its module")


def _is_output(node: fx.Node, owner: str) -> bool:
    """Whether nothing but casts follows a node within a module."""
    inside = [user for user in node.users if place(user) == owner]
    return all(user.target in (torch.ops.aten.to.dtype, torch.ops.aten.type_as.default) and _is_output(user, owner) for user in inside)


def _writers(program: Program, region: Region) -> dict[str, Writer]:
    """Raises `_Refused` where something else reads the matrix or the bias."""
    found: dict[str, Writer] = {}
    for linear, (first, last) in region.writers.items():
        matrix, transposed = stored_weight(program, linear.args[1])
        bias = linear.args[2] if len(linear.args) > 2 else None
        if matrix is None:
            raise _Refused(f"the weight of {place(linear) or linear.name} is computed, not a parameter")
        linears = [user for user, _ in readers(matrix)]
        if bias is not None:
            if not isinstance(bias, fx.Node) or bias.name not in program.tensors:
                raise _Refused(f"the bias of {place(linear) or linear.name} is computed, not a parameter")
            linears += bias.users
            found[_parameter(program, bias)] = Writer(first, last)
        for user in linears:
            if region.writers.get(user) != (first, last):
                raise _Refused(f"{_parameter(program, matrix)} is also read by {user.target}")
        found[_parameter(program, matrix)] = Writer(first, last, transposed)
    return found


def _parameter(program: Program, node: object) -> str:
    """The qualified name of the parameter that a node is."""
    name = program.tensors.get(node.name) if isinstance(node, fx.Node) else None
    if name is None or not isinstance(program.tensor(name), nn.Parameter) or not program.tensor(name).is_floating_point():
        raise _Refused(f"{node} is no floating-point parameter")
    return name
