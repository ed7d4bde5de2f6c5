"""Regions: the values of a graph that one orthogonal transform of their last axis carries through, from the matrices that write them to
those that read them.

Every rule is local: it names an operator and the arguments whose basis its result has, since the operator commutes with an orthogonal
transform `Q` of consecutive blocks of `width` elements of the last axis. A region is closed under these rules, so that the transform can
be multiplied into the matrices at its borders and nothing else changes. (Computational invariance: SliceGPT, arXiv 2401.15024, section
3; rotations within it: QuaRot, arXiv 2404.00456, and SpinQuant, arXiv 2405.16406.)
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qpc.ir.annotation import fake_value
from qpc.ir.linear import LINEAR, rank
from qpc.ir.program import Program
from qpc.ir.values import mutated

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor}
_QUOTIENTS = {aten.div.Tensor}
_COPIES = {
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
}
_VIEWS = {aten._unsafe_view.default, aten.flatten.using_ints, aten.reshape.default, aten.unflatten.int, aten.view.default}
_SQUARES = {aten.pow.Tensor_Scalar, aten.square.default}
_MEANS = {aten.mean.dim, aten.sum.dim_IntList}
_LOOKUP = aten.embedding.default
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Gain:
    """A product with a vector: `value * (parameter + offset)`.

    factor: the node of the vector. parameter: its qualified name; offset: 1 where it is stored less 1.
    """

    node: fx.Node
    value: fx.Node
    factor: fx.Node
    parameter: str
    offset: float


@dataclass(frozen=True)
class Region:
    """A closed region.

    width: elements of the last axis that the transform may mix. readers: linears that read a value of it, with the gain that lies between
    the region's other values and them. writers: linears that make a value of it, with the first and last of the rows that do. lookups: of
    tables whose rows are values of it. values: all nodes of it.
    """

    width: int
    readers: dict[fx.Node, Gain | None]
    writers: dict[fx.Node, tuple[int, int]]
    lookups: tuple[fx.Node, ...]
    gains: tuple[Gain, ...]
    values: frozenset[fx.Node]


@dataclass(frozen=True)
class Obstacle:
    """Why there is no region around a value, and the values that were found to belong together."""

    reason: str
    values: frozenset[fx.Node]


class _Refused(Exception):
    """The reason why a value has no region."""


def grow(program: Program, start: fx.Node, width: int) -> Region | Obstacle:
    """The region of a value whose last axis consists of blocks of `width` elements, or what stands in its way."""
    growth = _Growth(program, width)
    try:
        return growth.run(start)
    except _Refused as refused:
        return Obstacle(str(refused), frozenset(growth.values))


def head_width(value: fx.Node) -> int | None:
    """The width of a head, where a value is the output of an attention with its heads side by side; None where it is not."""
    while value.target in _COPIES | _VIEWS | {aten.transpose.int, aten.permute.default}:
        (value,) = value.all_input_nodes[:1]
    return _last(value) if value.target in (_ATTENTION, aten.matmul.default, aten.bmm.default) else None


def place(node: fx.Node) -> str:
    """The qualified name of the module around a node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


@dataclass
class _Growth:
    program: Program
    width: int
    values: dict[fx.Node, None] = field(default_factory=dict)
    readers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    writers: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    lookups: dict[fx.Node, None] = field(default_factory=dict)
    squares: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self, start: fx.Node) -> Region:
        written = mutated(self.program.graph)
        pending = [start]
        while pending:
            value = pending.pop()
            if value in self.values:
                continue
            self.values[value] = None
            if value in written:
                raise _Refused(f"{_described(value)} is written to in place")
            last = _last(value)
            if last is None or last % self.width:
                raise _Refused(f"{_described(value)} is not made of blocks of {self.width}")
            pending += self._sources(value)
            pending += [user for user in value.users if self._joins(value, user)]
        gains, before = self._gains()
        readers = {linear: before[value] for linear, value in self.readers.items()}
        return Region(self.width, readers, self.writers, tuple(self.lookups), tuple(gains.values()), frozenset(self.values))

    def _sources(self, value: fx.Node) -> list[fx.Node]:
        """What the value shares its basis with, of what it is made from."""
        if value.target is _LOOKUP:
            self.lookups[value] = None
            return []
        rows = written_rows(value)
        if rows is not None:
            linear, first, last = rows
            if (last - first) % self.width:
                raise _Refused(f"{_described(linear)} has rows {first} to {last} that are not made of blocks of {self.width}")
            for other in linear.users if linear is not value else ():
                apart = written_rows(other)
                if other not in (value, value.args[0]) and (apart is None or (apart[1] < last and first < apart[2])):
                    raise _Refused(f"{_described(other)} reads the same rows")
            if self.writers.setdefault(linear, (first, last)) != (first, last):
                raise _Refused(f"{_described(linear)} has two parts")
            return []
        shared = self._shared(value)
        if not shared:
            raise _Refused(f"{_described(value)} does not commute with a rotation")
        return [value.args[index] for index in shared]  # type: ignore[misc]

    def _joins(self, value: fx.Node, user: fx.Node) -> bool:
        """Whether the value of a user shares the basis; records readers, and refuses whatever else is not the same in any basis."""
        places = [index for index, argument in enumerate(user.args) if argument is value]
        if user.target is LINEAR and places == [0]:
            self.readers[user] = value
            return False
        if _is_square(user) and user.users and all(_is_mean(mean) for mean in user.users):
            self.squares[user] = value
            return False
        if user.target is aten.sym_size.int or (user.target is aten.type_as.default and places == [1]):
            return False  # reads nothing but its shape or dtype
        shared = self._shared(user)
        if not places or not set(places) <= set(shared) or value in user.kwargs.values():
            raise _Refused(f"{_described(user)} does not commute with a rotation")
        return True

    def _shared(self, node: fx.Node) -> tuple[int, ...]:
        """The places of the arguments whose basis the value of a node has."""
        target, args = node.target, node.args
        if target in _SUMS and all(isinstance(arg, fx.Node) and _last(arg) == _last(node) for arg in args[:2]):
            return (0, 1)
        if target in _PRODUCTS:
            constant = [_is_constant(arg) or self._is_gain(arg) for arg in args]
            return (constant.index(False),) if sorted(constant) == [False, True] else ()
        if target in _QUOTIENTS:
            return (0,) if _is_constant(args[1]) and len(args) == 2 else ()
        if target is _ATTENTION:
            return (2,)
        if target in (aten.matmul.default, aten.bmm.default):
            return (1,) if rank(args[1]) > 1 else ()
        return (0,) if target in _COPIES or _is_undropped(node) or self._keeps_blocks(node) else ()

    def _keeps_blocks(self, node: fx.Node) -> bool:
        """Whether a node only moves whole blocks about."""
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if node.target in _VIEWS:
            return True  # both last axes are made of whole blocks, which lie one after the other
        axes, rest = rank(source), tuple[Any, ...](node.args[1:])
        moved: list[int] = []
        if node.target is aten.transpose.int:
            moved = [axis % axes for axis in rest]
        elif node.target is aten.permute.default:
            moved = [place for place, axis in enumerate(rest[0]) if axis % axes != place]
        elif node.target is aten.unsqueeze.default:
            return bool(rest[0] % (axes + 1) != axes)
        elif node.target in (aten.slice.Tensor, aten.select.int):
            moved = [(rest[0] if rest else 0) % axes]
        elif node.target is not aten.expand.default or _last(node) != _last(source):
            return False
        return axes - 1 not in moved

    def _is_gain(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and _vector(self.program, argument) is not None and _last(argument) == self.width

    def _gains(self) -> tuple[dict[fx.Node, Gain], dict[fx.Node, Gain | None]]:
        """The gains, and for each value the gain that lies before it. A gain may lie before linears only."""
        gains: dict[fx.Node, Gain] = {}
        before: dict[fx.Node, Gain | None] = {}
        for node in self.program.graph.nodes:
            if node not in self.values:
                continue
            sources = [] if node in self.lookups or written_rows(node) is not None else [node.args[i] for i in self._shared(node)]
            found = {before[source] for source in sources} - {None}
            vector = next((arg for arg in node.args if node.target in _PRODUCTS and self._is_gain(arg)), None)
            if vector is not None:
                known = _vector(self.program, vector)
                assert known is not None
                gains[node] = Gain(node, sources[0], vector, *known)
            earlier = next(iter(found), None)
            if earlier is not None and (vector is not None or len(sources) > 1):
                raise _Refused(f"{_described(node)} lies behind the gain {earlier.parameter}, which no rotation commutes with")
            before[node] = gains.get(node, earlier)
        for square, value in self.squares.items():
            earlier = before[value]
            if earlier is not None:
                raise _Refused(f"{_described(square)} lies behind the gain {earlier.parameter}, which no rotation commutes with")
        return gains, before


def written_rows(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The linear whose output a node is, or is a range of the last axis of: with the first row and the one behind the last."""
    source: Any = node.args[0] if node.args else None
    if node.target is LINEAR:
        return node, 0, _last(node) or 0
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.slice.Tensor and source.target is LINEAR:
        given: list[Any] = [*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :]]
        axis, first, last, step = given
        size = _last(source)
        if size is None or axis % rank(source) != rank(source) - 1 or step != 1 or not isinstance(first, int):
            return None
        stop = size if last is None else last
        if not isinstance(stop, int):
            return None
        return source, min(first % size if first < 0 else first, size), min(stop + size if stop < 0 else stop, size)
    if node.target is operator.getitem and isinstance(node.args[1], int):
        linear = source.args[0] if source.args else None
        if isinstance(linear, fx.Node) and linear.target is LINEAR:
            sizes = _split_sizes(source, linear)
            if sizes is not None:
                first = sum(sizes[: node.args[1]])
                return linear, first, first + sizes[node.args[1]]
    return None


def _split_sizes(split: fx.Node, linear: fx.Node) -> list[int] | None:
    """The sizes into which a node cuts the last axis."""
    parts = fake_value(split)
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if split.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default) or not isinstance(axis, int):
        return None
    if axis % rank(linear) != rank(linear) - 1 or not isinstance(parts, list | tuple):
        return None
    sizes = [part.shape[-1] for part in parts]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _vector(program: Program, node: fx.Node) -> tuple[str, float] | None:
    """The parameter of one axis that a node is, plus a number: (name, number)."""
    offset = 0.0
    while node.name not in program.tensors:
        if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs and not offset:
            numbers = [arg for arg in node.args if isinstance(arg, int | float)]
            offset = float(numbers[0]) if len(numbers) == 1 else 0.0
            if not numbers:
                return None
        elif node.target not in _COPIES:
            return None
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return (program.tensors[node.name], offset) if rank(node) == 1 else None


def _is_constant(argument: object) -> bool:
    """Whether a factor is the same for a whole row: a number, or one of each row."""
    if not isinstance(argument, fx.Node):
        return True
    value = fake_value(argument)
    if not isinstance(value, Tensor):
        return isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    return value.ndim == 0 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1)


def _is_square(node: fx.Node) -> bool:
    if node.target in _PRODUCTS:
        return node.args[0] is node.args[1]
    return node.target in _SQUARES and node.args[1:] in ((), (2,), (2.0,))


def _is_mean(node: fx.Node) -> bool:
    """Whether a node takes the mean over the last axis, and keeps the axis."""
    if node.target not in _MEANS or len(node.args) < 3 or not node.args[2]:
        return False
    return [axis % rank(node) for axis in node.args[1]] == [rank(node) - 1]  # type: ignore[union-attr, operator]


def _is_undropped(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and node.args[2] is False


def _last(node: Any) -> int | None:
    """The size of the last axis of a floating-point tensor, if it is known and fixed."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim or not isinstance(value.shape[-1], int):
        return None
    return value.shape[-1]


def _described(node: fx.Node) -> str:
    """What a node does, and where."""
    if node.op == "output":
        return "what the graph returns"
    what = f"{node.op} {node.target}"
    if node.op == "call_function":
        what = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "a function")
    where = place(node)
    return f"{what} in {where}" if where else what
