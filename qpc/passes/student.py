"""A model on its way through rounding that can learn: codes stay, whatever is continuous follows gradients.

Once all weights are rounded that is the scale of each of their rows, and every vector that is a parameter: gains and biases of norms,
biases of linears. None of it costs a bit. The scale of a row is a factor of one output of its linear,

    y_i = f_i * (W x)_i + b_i,    f_i = new scale / old scale,

so the gradient of no matrix is needed. Weights that are still to be rounded can move as a whole, to make up for those that are.

Values are used as they will be stored, scales in bfloat16 and all else in the dtype that it has; gradients pass that rounding as if it
were not there.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qpc.ir.annotation import LinearSite, annotation, site_of
from qpc.ir.linear import LINEAR, stored_matrix
from qpc.ir.program import Program
from qpc.quant.quantizer import PackedWeight


@dataclass(frozen=True)
class Scales:
    """A packed weight, its scales and their relative change, both float32 [out_features]."""

    packed: PackedWeight
    old: Tensor
    change: Tensor

    @staticmethod
    def of(packed: PackedWeight) -> "Scales":
        """Unchanged."""
        old = packed.scales[: packed.out_features].float()
        return Scales(packed, old, torch.zeros_like(old, requires_grad=True))

    @staticmethod
    def factors(several: Sequence["Scales"]) -> tuple[Tensor, ...]:
        """New over old scales of each, float32 [out_features]; 1 for rows of zeros. All at once, for they are many and small."""
        if not several:
            return ()
        old, change = torch.cat([each.old for each in several]), torch.cat([each.change for each in several])
        new = (old * (1 + change.detach())).to(several[0].packed.scales.dtype).float()
        factors = torch.where(old == 0, 1, new / torch.where(old == 0, 1, old)) + (change - change.detach())
        return torch.split(factors, [len(each.old) for each in several])

    def moved(self) -> PackedWeight:
        """The weight with new scales."""
        scales = self.packed.scales.clone()
        scales[: self.packed.out_features] = (self.old * (1 + self.change.detach())).to(scales.dtype)
        return replace(self.packed, scales=scales)


@dataclass(frozen=True)
class Free:
    """A parameter, its root mean square, and its change over that: float32 of its shape."""

    value: Tensor
    size: Tensor
    change: Tensor

    @staticmethod
    def of(value: Tensor) -> "Free":
        """Unchanged."""
        size = torch.linalg.vector_norm(value.detach(), dtype=torch.float32) / math.sqrt(value.numel())
        return Free(value.detach(), size, torch.zeros(value.shape, device=value.device, requires_grad=True))

    def moved(self) -> Tensor:
        """The new value, in the dtype of the old."""
        new = torch.addcmul(self.value.float(), self.size, self.change)
        if self.value.dtype == torch.float32:
            return new
        return new.detach().to(self.value.dtype) + (new - new.detach()).to(self.value.dtype)


State = tuple[Tensor, ...]
"""A copy of all changes."""


@dataclass(eq=False)
class Student:
    """A differentiable copy of a program, which stays as it is until `write`.

    scales, matrices: of the weights that are packed and of those that are not yet, by name of the parameter. vectors: by name, too.
    """

    program: Program
    scales: dict[str, Scales] = field(default_factory=dict)
    matrices: dict[str, Free] = field(default_factory=dict)
    vectors: dict[str, Free] = field(default_factory=dict)
    _module: fx.GraphModule = field(init=False)
    _fixed: dict[str, Tensor] = field(default_factory=dict)
    _sites: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.program.linears():
            if annotation(node).quantizer is not None:
                site = site_of(node)
                self._sites[site.weight] = tuple(dict.fromkeys((*self._sites.get(site.weight, ()), site.name)))
                if site.name in self.program.packed:
                    self.pack(site.weight, self.program.packed[site.name])
                else:
                    self.matrices[site.weight] = Free.of(stored_matrix(self.program, site))
        self.vectors.update((name, Free.of(self.program.latest(name))) for name in vectors(self.program))
        for name, table in self.program.tables.items():
            self._fixed[name] = table.packed.restored().to(self.program.tensor(name).dtype)
        graph = copy.deepcopy(self.program.graph)
        scale_outputs(graph, list(self._sites))
        self._module = fx.GraphModule(self.program.graph_module, graph)

    def pack(self, weight: str, packed: PackedWeight) -> None:
        """A weight is rounded: from now on only its scales move."""
        self.matrices.pop(weight, None)
        self.scales[weight] = Scales.of(packed)
        self._fixed[weight] = packed.restored().to(self.program.tensor(weight).dtype)

    def matrix(self, site: LinearSite) -> Tensor:
        """What is to be rounded: float32 [out_features, in_features]."""
        return self.matrices[site.weight].moved().detach().float()

    def outputs(self, inputs: Sequence[Tensor]) -> list[Any]:
        """The flattened outputs on these inputs."""
        given = dict(zip(self.program.inputs, inputs, strict=True))
        bound = []
        for node in self.program.graph.find_nodes(op="placeholder"):
            name = self.program.tensors.get(node.name)
            if name is None:
                bound.append(given[node.name])
            elif name in self.vectors:
                bound.append(self.vectors[name].moved())
            else:
                bound.append(self._fixed[name] if name in self.program.tables else self.program.tensor(name).detach())
        factors = dict(zip(self.scales, Scales.factors(list(self.scales.values())), strict=True))
        for name in self._sites:
            matrix = self.matrices[name].moved() if name in self.matrices else self._fixed[name]
            bound += [matrix, factors[name].to(matrix.dtype) if name in factors else matrix.new_ones(len(matrix))]
        return tree_leaves(self._module(*bound))

    def changes(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The leaves that move, zero at the beginning: of scales, of vectors and of matrices."""
        scales = [each.change for each in self.scales.values()]
        return scales, [each.change for each in self.vectors.values()], [each.change for each in self.matrices.values()]

    def state(self) -> State:
        """All changes as they are now."""
        return tuple(change.detach().clone() for kind in self.changes() for change in kind)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go back there."""
        for change, before in zip((change for kind in self.changes() for change in kind), state, strict=True):
            change.copy_(before)

    @torch.no_grad()
    def write(self) -> tuple[str, ...]:
        """Put scales into the packed weights and vectors into `program.tuned`: names of what has changed."""
        written: list[str] = []
        for name, scales in self.scales.items():
            if bool((scales.change != 0).any()):
                self.program.packed.update(dict.fromkeys(self._sites[name], scales.moved()))
                written += self._sites[name]
        for name, vector in self.vectors.items():
            if bool((vector.change != 0).any()):
                self.program.tuned[name] = vector.moved().detach()
                written.append(name)
        return tuple(written)


def vectors(program: Program) -> Mapping[str, Tensor]:
    """The parameters of one axis that the graph reads, but for those of excluded modules."""
    found = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name = program.tensors.get(node.name)
        if name is None or not node.users or name.rpartition(".")[0] in program.excluded:
            continue
        value = program.tensor(name)
        if isinstance(value, nn.Parameter) and value.ndim == 1 and value.is_floating_point():
            found[name] = value
    return found


def scale_outputs(graph: fx.Graph, weights: Iterable[str]) -> None:
    """Let the linears of these weights read a new placeholder each, and multiply what they make by another one: pairs behind all others."""
    matrices: dict[str, fx.Node] = {}
    factors: dict[str, fx.Node] = {}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for number, name in enumerate(weights):
            matrices[name] = graph.placeholder(f"student_matrix_{number}")
            factors[name] = graph.placeholder(f"student_factors_{number}")
    for node in [node for node in graph.nodes if annotation(node).site is not None and site_of(node).weight in matrices]:
        name, bias = site_of(node).weight, node.args[2] if node.target is LINEAR and len(node.args) > 2 else None
        with graph.inserting_before(node):
            factor = factors[name]
            if node.target is LINEAR:
                made = graph.call_function(LINEAR, (node.args[0], matrices[name]))
            else:
                made = graph.call_function(node.target, (node.args[0], matrices[name], *node.args[2:]))
                factor = graph.call_function(torch.ops.aten.unflatten.int, (factor, 0, [site_of(node).experts, -1]))
                factor = graph.call_function(torch.ops.aten.index.Tensor, (factor, [node.args[2]]))
            made = graph.call_function(torch.ops.aten.mul.Tensor, (made, factor))
            if bias is not None:
                made = graph.call_function(torch.ops.aten.add.Tensor, (made, bias))
        node.replace_all_uses_with(made)
        graph.erase_node(node)
