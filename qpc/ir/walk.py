"""Executing a graph node by node, keeping only what is still needed, with the freedom to try another weight from any point on."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from qpc.ir.program import Program
from qpc.ir.values import mutated

Watch = Callable[[fx.Node, Any], None]
"""Is called with a linear node and its value."""


class Walk:
    """An execution of a program that stands before some node.

    `advance` moves it forward; `finish` goes on to the end on a copy, optionally with other weights, and leaves the walk where it stands.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        bound = program.bind(inputs)
        self._module = program.graph_module
        self._nodes = [node for node in program.graph.nodes if node.op != "placeholder"]
        self._values: dict[fx.Node, Any] = {node: bound[node.name] for node in program.graph.find_nodes(op="placeholder")}
        self._dead = last_uses(self._nodes)
        self._position = 0
        # A copy of the walk shares its tensors with the walk, so a graph that writes into tensors is run from its start every time.
        self._stays = bool(mutated(program.graph))

    @property
    def stays(self) -> bool:
        """Whether `advance` leaves the walk at its start, because the graph writes into tensors."""
        return self._stays

    def advance(self, node: fx.Node, weights: Mapping[fx.Node, Tensor] = MappingProxyType({})) -> None:
        """Execute everything before `node`, as if the linears `weights` had these matrices [out_features, in_features]."""
        while not self._stays and self._nodes[self._position] is not node:
            self._step(self._nodes[self._position], self._values, weights)
            self._position += 1

    def input_of(self, node: fx.Node, weights: Mapping[fx.Node, Tensor] = MappingProxyType({}), argument: int = 0) -> Any:
        """The value of an argument of `node`, to which the walk advances; by default of the first."""
        self.advance(node, weights)
        values = self._values
        if self._stays:
            values = dict(values)
            for before in self._nodes[: self._nodes.index(node)]:
                self._step(before, values, weights)
        return fx.node.map_arg(node.args[argument], values.__getitem__)

    def live(self) -> list[Tensor]:
        """The tensors that the walk has computed and still needs."""
        computed = (value for node, value in self._values.items() if node.op != "placeholder")
        return [leaf for leaf in tree_leaves(list(computed)) if isinstance(leaf, Tensor)]

    def move(self, device: torch.device) -> None:
        """Put those tensors on a device; they must be on that of the model before the walk goes on."""
        for node, value in self._values.items():
            if node.op != "placeholder":
                self._values[node] = tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

    def fork(self) -> "Walk":
        """A walk that stands at the same place and goes on by itself."""
        other = copy.copy(self)
        other._values = dict(self._values)
        return other

    def finish(self, weights: Mapping[fx.Node, Tensor], watch: Watch | None = None) -> list[Any]:
        """The flattened outputs if the linears `weights` had these matrices [out_features, in_features].

        watch: is shown the value of each of these linears.
        """
        values = dict(self._values)
        for node in self._nodes[self._position :]:
            if node.op == "output":
                return tree_leaves(fx.node.map_arg(node.args, values.__getitem__))
            value = self._step(node, values, weights)
            if watch is not None and node in weights:
                watch(node, value)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], weights: Mapping[fx.Node, Tensor]) -> Any:
        value = values[node] = evaluated(self._module, node, values, weights)
        for dead in self._dead[node]:
            del values[dead]
        return value


def evaluated(
    module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any], weights: Mapping[fx.Node, Tensor] = MappingProxyType({})
) -> Any:
    """The value of one node. values: of what it reads. weights: matrices of linears [out_features, in_features] instead of their own."""
    args: tuple[Any, ...] = fx.node.map_arg(node.args, values.__getitem__)
    kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node in weights:
        args = (args[0], weights[node], *args[2:])
    target: Any = node.target
    if node.op == "call_function":
        return target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        return module.get_submodule(target)(*args, **kwargs)
    owner, _, leaf = target.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The values that nothing needs after each node."""
    dead: dict[fx.Node, list[fx.Node]] = {}
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        dead[node] = [used for used in dict.fromkeys([*node.all_input_nodes, node]) if used not in needed and used.op != "placeholder"]
        needed.update(node.all_input_nodes)
    return dead
