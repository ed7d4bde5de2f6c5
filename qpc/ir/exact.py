"""Running a program in float64, whatever dtypes it names, with other values for some of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from qpc.ir.program import Program

Change = Callable[[Tensor], Tensor]
"""Makes the new value of a parameter of its old one, float64 to float64."""


class _Exact(fx.Interpreter):
    """Reads one parameter at a time, so that no second copy of a large model is in memory."""

    def __init__(self, program: Program, graph: fx.Graph, inputs: Sequence[Tensor], changes: Mapping[str, Change]) -> None:
        super().__init__(program.graph_module, graph=graph)
        self._program, self._changes = program, changes
        self._inputs = dict(zip(program.inputs, inputs, strict=True))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with every floating-point tensor and dtype made float64."""
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._value)
        changed: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(torch.dtype, _wide_dtype, (tuple(args), dict(kwargs)))
        return changed

    def _value(self, node: fx.Node) -> Any:
        if node.op != "placeholder":
            return self.env[node]
        if node.name in self._inputs:
            return _wide(self._inputs[node.name])
        name = self._program.tensors[node.name]
        value = _wide(self._program.tensor(name).detach())
        return self._changes[name](value) if name in self._changes else value

    def run_node(self, n: fx.Node) -> Any:
        """Placeholders are read where they are used."""
        if n.op == "placeholder":
            return None
        return tree_map_only(Tensor, _wide, super().run_node(n))


def run_exactly(program: Program, graph: fx.Graph, inputs: Sequence[Tensor], changes: Mapping[str, Change]) -> list[Tensor]:
    """The flattened tensors that a graph of the program returns, in float64.

    inputs: those of the program. changes: of parameters, by qualified name. Constants of the graph are widened as they are; whatever
    an operator makes narrower inside of itself stays so.
    """
    with torch.no_grad():
        outputs = _Exact(program, graph, inputs, changes).run(*[None for _ in graph.find_nodes(op="placeholder")])
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype
