"""Allocate: which quantizer for which linear, and which of the legal groups become one kernel."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from qpc.budget import Budget
from qpc.cost import Weight, choices
from qpc.errors import BudgetError, ModelError
from qpc.ir.annotation import FusionGroup, LinearSite, annotate, annotation
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.timed_items import Timing
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.palette import Palette
from qpc.quant.quantizer import Quantizer
from qpc.sensitivity import Loss, Sensitivities
from qpc.solver import Allocation, InfeasibleError, Item, Limits, Resource, Rules, solve

RELATIVE_GAP = 1e-6
"""Of the predicted loss, within a limit of bytes."""

TIMED_GAP = 5e-4
"""Of either, within a limit of time, where groups and quantizers are chosen together: on the shapes of Llama-3.1-8B, a quarter of a second;
1e-4 can take the ten seconds of the solver and not be proven."""

SIZE_GAP = 1e-4
"""Of the bytes of the smallest model within a predicted loss: on SmolLM2-135M, 1e-5 takes ten seconds more and finds no smaller one."""


@dataclass(frozen=True)
class Allocate(Pass):
    """Gives every site the quantizer that keeps the predicted loss of the whole model smallest within the budget.

    A budget with a limit on the predicted KL asks for the smallest model that keeps all its limits instead.
    The loss of a choice is the sensitivity of the weight times the distortion of the quantizer, times the share of it that error feedback
    is expected to leave, where the linear is annotated with one. A weight that several sites share is
    stored once and gets one quantizer. Members of a legal group that get the same quantizer become one fused group. The `Allocation`
    is left in `program.allocation`.

    budget: None is no limit. sensitivities: None takes all linears for equally sensitive. same_quantizer_in_group: give all members of
    a legal group the same quantizer. may_keep: let a linear stay as it is where the budget allows it, or quantizing would not make it
    smaller. timing: fuse what takes the least time; if the budget limits it, choose groups and quantizers together. None counts no time.

    Raises `BudgetError` that names the nearest feasible budgets, or if the budget limits a KL or a time that nothing predicts, and
    `ModelError` if there is nothing to allocate or a sensitivity is missing.
    """

    name: ClassVar[str] = "allocate"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.ALLOCATED

    budget: Budget | None
    palette: Palette
    sensitivities: Sensitivities | None = None
    same_quantizer_in_group: bool = False
    may_keep: bool = True
    timing: Timing | None = None

    @staticmethod
    def uniform(quantizer: Quantizer, sensitivities: Sensitivities | None = None, timing: Timing | None = None) -> "Allocate":
        """The same quantizer for every linear: what mixed allocations are compared with."""
        return Allocate(None, Palette((quantizer,)), sensitivities, may_keep=False, timing=timing)

    def run(self, program: Program) -> PassResult:
        places, weights = _places(program), self.weights(program)
        found = self.solve(program)
        remarks = self._kept(places, weights, found)
        if self.timing is not None:
            remarks += self._estimates(self.timing, places, weights, found)
        fused = {group: self._fuse(group, found, remarks) for group in dict.fromkeys(place.group for place in places)}
        applied = Counter(place.site.name for place in places)
        times = {} if self.timing is None else self._times(self.timing, places, weights, found)
        for place in places:
            quantizer, weight = found.choices[place.site.name], weights[place.site.weight]
            cost, as_given = weight.cost(quantizer), replace(weight, kept_bytes=stored_bytes(program.tensor(place.site.weight)))
            known = annotation(place.node).but(
                group=fused[place.group][place.site.name],
                quantizer=quantizer,
                sensitivity=None if self.sensitivities is None else self.sensitivities.values[place.site.name],
                distortion=cost.distortion,
                weight_bytes=cost.weight_bytes,
                latency_ps=times.get(place.site.name),
                kept_latency_ps=None if self.timing is None else applied[place.site.name] * self.timing.latency([as_given], None).ps,
            )
            annotate(place.node, known)
        program.allocation = found
        return PassResult(tuple(name for name, quantizer in found.choices.items() if quantizer is not None), tuple(remarks))

    def weights(self, program: Program) -> dict[str, Weight]:
        """What there is to allocate, by name of the parameter: those that several sites share once."""
        places = _places(program)
        if not places:
            raise ModelError("the model has no linear that may be quantized; check the exclusions")
        return {place.site.weight: self._weight(program, place) for place in places}

    def solve(self, program: Program) -> Allocation:
        """The allocation alone; the program stays as it is."""
        found = self._within_budget(program)
        return found if self.timing is None else self._fastest(program, self.timing, found)

    def _within_budget(self, program: Program) -> Allocation:
        (items, rules), weights = self._items(program), self.weights(program)
        if self.budget is None:
            return solve(items, Limits(), rules=rules)
        if self.budget.loss is not None and (self.sensitivities is None or self.sensitivities.loss is not Loss.KL):
            reason = "only the sensitivities of a language model predict a KL; give a size instead"
            raise BudgetError(f"budget {self.budget}: {reason}")
        if self.budget.latency_ps is not None and (self.timing is None or self.timing.batch != self.budget.batch):
            raise BudgetError(f"budget {self.budget}: only the latency model of a GPU at batch {self.budget.batch} predicts its time")
        count, other = sum(weight.shape.weights for weight in weights.values()), other_bytes(program, weights)
        limits = Limits(self.budget.weight_bytes(count, other), self.budget.latency_ps, self.budget.loss)
        try:
            objective = Resource.LOSS if limits.loss is None else Resource.BYTES
            untimed = RELATIVE_GAP if objective is Resource.LOSS else SIZE_GAP
            gap = untimed if limits.latency_ps is None else TIMED_GAP
            return solve(items, limits, objective=objective, rules=rules, relative_gap=gap)
        except InfeasibleError as error:
            least = error.nearest or error.alone
            size, kl, ps = (least.get(resource) for resource in (Resource.BYTES, Resource.LOSS, Resource.LATENCY))
            raise self.budget.refusal(
                count,
                other,
                least_bytes=None if size is None else int(size),
                least_kl=kl,
                least_ps=None if ps is None else int(ps),
                apart=not error.nearest,
            ) from error

    def _fastest(self, program: Program, timing: Timing, found: Allocation) -> Allocation:
        """The same quantizers in the groups that take the least time, and what they take."""
        places = [(place.site, place.group) for place in _places(program)]
        used = [quantizer for quantizer in dict.fromkeys(found.choices.values()) if quantizer is not None]
        items = timing.items(places, self.weights(program), used, tied=True, fuse=True)
        rules = Rules(allowed={site: (quantizer,) for site, quantizer in found.choices.items()})
        fastest = solve(items, Limits(), objective=Resource.LATENCY, rules=rules)
        return replace(found, groups=fastest.groups, cost=replace(found.cost, latency_ps=fastest.cost.latency_ps))

    def _weight(self, program: Program, place: "_Place") -> Weight:
        site, share = place.site, annotation(place.node).share
        kept_bytes = stored_bytes(program.tensor(site.weight)) if self.may_keep else None
        rotated = site.weight in program.rotated
        if self.sensitivities is None:
            return Weight(site.shape, 1.0 if share is None else share, kept_bytes, rotated)
        if site.name not in self.sensitivities.values:
            raise ModelError(f"the sensitivities have no value for {site.name}; estimate them for this model")
        return Weight(site.shape, self.sensitivities.values[site.name] * (1.0 if share is None else share), kept_bytes, rotated)

    def _items(self, program: Program) -> tuple[list[Item], Rules]:
        places, weights = _places(program), self.weights(program)
        names: dict[str, dict[str, None]] = {}
        for place in places:
            names.setdefault(place.site.weight, {})[place.site.name] = None
        clusters = self._clusters(places)
        sites = [tuple(name for weight in cluster for name in names[weight]) for cluster in clusters]
        if self.timing is not None and self.budget is not None and self.budget.latency_ps is not None:
            timed, tied = [(place.site, place.group) for place in places], self.same_quantizer_in_group
            items = self.timing.items(timed, weights, self.palette.quantizers, tied=tied, fuse=self.timing.fuse)
            return items, Rules(alike=sites if tied else ())
        tables = (choices([weights[weight] for weight in cluster], self.palette.quantizers) for cluster in clusters)
        return [Item(*each) for each in zip(sites, tables, strict=True)], Rules()

    def _clusters(self, places: "Sequence[_Place]") -> list[list[str]]:
        """Names of the weights that must get the same quantizer, in graph order."""
        bonds: nx.Graph[str] = nx.Graph()
        first: dict[FusionGroup, str] = {}
        for place in places:
            bonds.add_node(place.site.weight)
            if self.same_quantizer_in_group:
                bonds.add_edge(first.setdefault(place.group, place.site.weight), place.site.weight)
        order = {weight: position for position, weight in enumerate(bonds)}
        return [sorted(cluster, key=order.__getitem__) for cluster in nx.connected_components(bonds)]

    def _kept(self, places: "Sequence[_Place]", weights: Mapping[str, Weight], found: Allocation) -> list[Remark]:
        """Why some linears stay as they are."""
        remarks = []
        for site in dict.fromkeys(place.site for place in places):
            if found.choices[site.name] is None:
                kept = weights[site.weight].cost(None).weight_bytes
                smaller = any(choice.cost.weight_bytes < kept for choice in choices([weights[site.weight]], self.palette.quantizers))
                reason = "the budget has room for it as it is" if smaller else f"no quantizer makes it smaller than its {kept} bytes"
                remarks.append(self.declined(site.name, reason))
        return remarks

    def _fuse(self, group: FusionGroup, found: Allocation, remarks: list[Remark]) -> dict[str, FusionGroup]:
        """The chosen group of each member."""
        parts = self._parts(group, found)
        if len(parts) > 1:
            texts = (f"{', '.join(map(_leaf, members))} got {found.choices[members[0]] or 'no quantizer'}" for members in parts)
            remarks.append(self.declined(", ".join(group.members), "split: " + ", ".join(texts)))
        rows = {member: shape.out_features for member, shape in zip(group.members, group.shapes, strict=True)}
        chosen = {member: group.subset((member,)) for member in group.members}
        for members in parts:
            if found.choices[members[0]] is None:
                continue
            fused = [member for member in members if member == members[-1] or rows[member] % BLOCK_ROWS == 0]
            chosen |= dict.fromkeys(fused, group.subset(fused))
            for member in members:
                if member not in fused:
                    reason = f"out_features={rows[member]} must be divisible by {BLOCK_ROWS} unless it is the last of its group"
                    remarks.append(self.declined(member, reason))
        return chosen

    def _parts(self, group: FusionGroup, found: Allocation) -> list[tuple[str, ...]]:
        """Members that go together: those that take the least time so if times are known, else those with the same quantizer."""
        if self.timing is not None:
            taken = {site: sites for sites in found.groups for site in sites if set(sites) <= set(group.members)}
            return list(dict.fromkeys(taken.get(member, (member,)) for member in group.members))
        alike: dict[Quantizer | None, tuple[str, ...]] = {}
        for member in group.members:
            alike[found.choices[member]] = (*alike.get(found.choices[member], ()), member)
        return list(alike.values())

    def _times(self, timing: Timing, places: "Sequence[_Place]", weights: Mapping[str, Weight], found: Allocation) -> dict[str, float]:
        """Time of each site [ps]: of an item that was taken, its share by weights. They add up to the time of the allocation."""
        sites, applied = {place.site.name: place.site for place in places}, Counter(place.site.name for place in places)
        times: dict[str, float] = {}
        for names in found.groups:
            stored = [weights[parameter] for parameter in dict.fromkeys(sites[name].weight for name in names)]
            runs = sum(applied[name] for name in names) // len(stored)
            work = {name: applied[name] * sites[name].shape.weights for name in names}
            spent = runs * timing.latency(stored, found.choices[names[0]]).ps
            times |= {name: spent * share / sum(work.values()) for name, share in work.items()}
        return times

    def _estimates(self, timing: Timing, places: "Sequence[_Place]", weights: Mapping[str, Weight], found: Allocation) -> list[Remark]:
        """Which of the times were not measured."""
        parameters = {place.site.name: place.site.weight for place in places}
        reasons: dict[str, list[str]] = {}
        for names in found.groups:
            stored = [weights[parameter] for parameter in dict.fromkeys(parameters[name] for name in names)]
            for reason in timing.latency(stored, found.choices[names[0]]).estimates:
                reasons.setdefault(reason, []).append(", ".join(names))
        for site in dict.fromkeys(place.site for place in places if place.site.experts is not None):
            reasons.setdefault("of a stack all experts count, though a step reads only those that are chosen", []).append(site.name)
        subjects = {reason: first if not more else f"{first} and {len(more)} more" for reason, (first, *more) in reasons.items()}
        return [self.declined(subject, f"its time is an estimate: {reason}") for reason, subject in subjects.items()]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in a checkpoint."""
    return tensor.numel() * tensor.element_size()


def other_bytes(program: Program, weights: Iterable[str]) -> int:
    """Bytes of all tensors of the model but these, tied ones once, tables as they are packed: what quantizing `weights` does not change."""

    def identity(tensor: Tensor) -> tuple[int, int, torch.Size]:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.shape

    replaced = {identity(program.tensor(name)) for name in (*weights, *program.tables)}
    others = {identity(value): stored_bytes(value) for value in program.module.state_dict(keep_vars=True).values()}
    tables = sum(table.packed.nbytes for table in program.tables.values())
    return tables + sum(size for key, size in others.items() if key not in replaced)


@dataclass(frozen=True)
class _Place:
    """A linear node, its site, and the largest legal group of the site."""

    node: fx.Node
    site: LinearSite
    group: FusionGroup


def _places(program: Program) -> list[_Place]:
    found = []
    for node in program.linears():
        known = annotation(node)
        assert known.site is not None and known.group is not None, "the verifier has seen to it"
        found.append(_Place(node, known.site, known.group))
    return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
