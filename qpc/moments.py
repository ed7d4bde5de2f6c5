"""Second moments of what the linears of a program read, collected while batches of inputs walk through its graph side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from qpc.ir.annotation import annotation, site_of
from qpc.ir.program import Program
from qpc.ir.walk import Walk
from qpc.quant.experts import rows_of_experts
from qpc.quant.moment import Moment

ROWS_AT_ONCE = 8192
"""Inputs that are converted and multiplied at a time; bounds the memory of the temporaries."""

Importance = Sequence[Mapping[str, Tensor]]
"""How much each position counts: for each batch, by name of the linear node, [positions] from 0."""

MEMORY_SHARE = 0.25
"""Share of the free memory of a GPU that live values of waiting batches may take before they wait on the CPU."""


class SecondMoments(Protocol):
    """Where the second moments of what linears read come from: asked for in the order of the graph."""

    def moment(self, nodes: Iterable[fx.Node]) -> Moment:
        """Of the values that linears read, over all of them together. nodes: the linears that apply one weight."""

    def moments_of_experts(self, nodes: Iterable[fx.Node]) -> list[Moment]:
        """Of the rows that each expert of a stack reads."""

    def replace(self, weights: Mapping[fx.Node, Tensor]) -> None:
        """Let linears have other weights: [out_features, in_features]."""


@dataclass
class Sum:
    """The sum of x x^T over inputs x. dtype: in which it is summed."""

    dtype: torch.dtype = torch.float32
    count: int = 0
    weight: float = 0.0
    total: Tensor | None = None

    def add(self, value: Tensor, weights: Tensor | None = None) -> None:
        """value: [..., in_features]. weights: how much each position counts, [positions]; None: all alike."""
        flat = value.reshape(-1, value.shape[-1])
        counts = torch.ones(len(flat)) if weights is None else weights
        for rows, share in zip(torch.split(flat, ROWS_AT_ONCE), torch.split(counts, ROWS_AT_ONCE), strict=True):
            wide = rows.to(self.dtype)
            weighted = wide if weights is None else wide * share.to(wide)[:, None]
            self.total = weighted.t() @ wide if self.total is None else self.total.addmm_(weighted.t(), wide)
            self.count += len(rows)
        self.weight += float(counts.sum(dtype=torch.float64))

    def moment(self) -> Moment | None:
        """The mean, in the place of the sum, of which nothing is left; None if nothing was added."""
        total, self.total = self.total, None
        if total is None or self.count == 0:
            return None
        return Moment(total.div_(self.weight) if self.weight > 0 else total, self.count)


@dataclass
class ExpertSums:
    """The same of each expert of a stack. counts: inputs that each has read."""

    experts: int
    dtype: torch.dtype = torch.float32
    counts: tuple[int, ...] = ()
    totals: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, expert: Tensor) -> None:
        """x: [rows, in_features]. expert: of each row."""
        if not self.totals:
            self.totals = tuple(torch.zeros(x.shape[1], x.shape[1], dtype=self.dtype, device=x.device) for _ in range(self.experts))
            self.counts = (0,) * self.experts
        counts = list(self.counts)
        for index, rows in rows_of_experts(expert, self.experts):
            wide = x[rows].to(self.dtype)
            self.totals[index].addmm_(wide.t(), wide)
            counts[index] += len(rows)
        self.counts = tuple(counts)

    def moments(self) -> list[Moment]:
        """The means, of zeros where an expert has read nothing; none if nothing was added."""
        return [Moment(total / max(count, 1), count) for total, count in zip(self.totals, self.counts, strict=True)]


class MomentStream:
    """Batches of inputs on their way through a program, in step.

    `moment` moves all of them to a linear; `replace` gives linears other weights for the rest of the way. Between the two one batch after
    another advances, so the memory is that of the values which later nodes still need (those that the batches wait with, on the CPU if
    there are too many for a GPU), and of the activations of one batch.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Tensor],
        held_out: Sequence[Tensor] = (),
        *,
        importance: Importance | None = None,
        held_out_importance: Importance | None = None,
        sequential: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """A stream at the beginning of the graph.

        program: CANONICAL or later, not lowered, with one input. batches, held_out: values of that input. importance,
        held_out_importance: how much each position counts in the moments; alike for linears for which it is not given. sequential:
        whether `replace` has an effect; otherwise all moments are those of the original model. dtype: in which moments are summed, float32
        or float64.
        """
        self._program = program
        self._device = program.device
        self._walks = [[Walk(program, (batch.to(self._device),)) for batch in part] for part in (batches, held_out)]
        self._importance = (importance, held_out_importance)
        self._order = {node: position for position, node in enumerate(program.graph.nodes)}
        self._weights: dict[fx.Node, Tensor] = {}
        self._sequential = sequential
        self._dtype = dtype

    @torch.no_grad()
    def moment(self, nodes: Iterable[fx.Node]) -> Moment:
        """The second moment of the values that linears read, over all of them together.

        nodes: the linears that apply one weight, none of them before one that the stream has been moved to. The stream moves to the first
        of them in the graph, and a copy of it looks ahead to the others, with the weights as they are replaced now.
        """
        ordered = sorted(nodes, key=self._order.__getitem__)
        fit, held_out = (self._summed(walks, ordered, counts) for walks, counts in zip(self._walks, self._importance, strict=True))
        assert fit is not None, "a stream has batches"
        self._forget(ordered[0])
        return replace(fit, held_out=held_out)

    @torch.no_grad()
    def moments_of_experts(self, nodes: Iterable[fx.Node]) -> list[Moment]:
        """The second moments of the rows that each expert of a stack reads, all rows alike: `moment` of one expert after the other.

        One that reads none has a moment of zero.
        """
        ordered = sorted(nodes, key=self._order.__getitem__)
        fit, held_out = (self._summed_by_expert(walks, ordered) for walks in self._walks)
        self._forget(ordered[0])
        return [replace(moment, held_out=held_out[index] if held_out else None) for index, moment in enumerate(fit)]

    def _summed_by_expert(self, walks: list[Walk], nodes: list[fx.Node]) -> list[Moment]:
        """A moment of each expert; none if there are no batches."""
        found = ExpertSums(len(self._program.tensor(site_of(nodes[0]).weight)), self._dtype)
        parked = self._crowded(walks)
        for walk in walks:
            walk.move(self._device)
            for number, node in enumerate(nodes):
                here = walk if number == 0 else walk.fork()
                found.add(here.input_of(node, self._weights), here.input_of(node, self._weights, 2))
            if parked:
                walk.move(torch.device("cpu"))
        return found.moments()

    def replace(self, weights: Mapping[fx.Node, Tensor]) -> None:
        """Let linears that the stream has not passed have these weights: [out_features, in_features], any dtype, on any device."""
        if self._sequential:
            for node, weight in weights.items():
                site = annotation(node).site
                assert site is not None
                self._weights[node] = weight.to(self._device, self._program.tensor(site.weight).dtype)

    def _summed(self, walks: list[Walk], nodes: list[fx.Node], importance: Importance | None) -> Moment | None:
        found = Sum(self._dtype)
        parked = self._crowded(walks)
        for batch, walk in enumerate(walks):
            walk.move(self._device)
            for number, node in enumerate(nodes):
                value = (walk if number == 0 else walk.fork()).input_of(node, self._weights)
                found.add(value, None if importance is None else importance[batch].get(node.name))
            if parked:
                walk.move(torch.device("cpu"))
        return found.moment()

    def _crowded(self, walks: list[Walk]) -> bool:
        """Whether the values with which walks wait are too many for the memory of the GPU."""
        if self._device.type != "cuda":
            return False
        live = [tensor for walk in walks for tensor in walk.live()]
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        on_device = sum(tensor.nbytes for tensor in live if tensor.is_cuda)
        return sum(tensor.nbytes for tensor in live) > MEMORY_SHARE * (free + on_device)

    def _forget(self, node: fx.Node) -> None:
        """Drop weights that every batch has passed."""
        if not any(walk.stays for part in self._walks for walk in part):
            self._weights = {other: weight for other, weight in self._weights.items() if self._order[other] >= self._order[node]}
