"""Fusion analysis: which linears read the same value and may run as one kernel."""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
from torch import fx

from qpc.ir.annotation import FusionGroup, LinearSite, annotate, annotation
from qpc.ir.network import view
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.ir.values import mutated, representatives
from qpc.passes.base import Pass, PassResult

Cluster = list[fx.Node]

ALL_SUBSETS_UP_TO = 6
"""Members of the largest group of which every subset is a candidate."""


@dataclass(frozen=True)
class Fusion(Pass):
    """Gives every site the largest legal group of linears that read the same value.

    A group is legal if no member depends on another, all weights have one dtype and device, and no weight occurs twice. A weight that
    is applied more than once is grouped only if it has the same partners each time.
    """

    name: ClassVar[str] = "fusion"
    requires: ClassVar[Stage] = Stage.CANONICAL
    ensures: ClassVar[Stage] = Stage.GROUPED

    def run(self, program: Program) -> PassResult:
        same, written, network = representatives(program.graph), mutated(program.graph), view(program)
        readers: dict[fx.Node, Cluster] = {}
        for node in program.linears():
            readers.setdefault(same[_input(node)], []).append(node)
        clusters: list[Cluster] = []
        remarks: list[Remark] = []
        for nodes in readers.values():
            if len(nodes) > 1 and any(_input(node) in written for node in nodes):
                remarks += [self.declined(_site(node).name, "its input is written to in place") for node in nodes]
                clusters += [[node] for node in nodes]
            else:
                clusters += self._split(program, network, nodes, remarks)
        clusters = self._without_cycles(network, self._with_constant_partners(clusters, remarks), remarks)
        for cluster in clusters:
            sites = [_site(node) for node in cluster]
            group = FusionGroup(tuple(site.name for site in sites), _input(cluster[0]).name, tuple(site.shape for site in sites))
            for node in cluster:
                annotate(node, annotation(node).but(group=group))
        grouped = [_site(node).name for cluster in clusters if len(cluster) > 1 for node in cluster]
        return PassResult(tuple(grouped), tuple(dict.fromkeys(remarks)))

    def _split(self, program: Program, network: "nx.DiGraph[str]", nodes: Cluster, remarks: list[Remark]) -> list[Cluster]:
        """Cut the readers of one value into legal clusters: each takes all that it may of those left."""
        clusters = []
        while nodes:
            cluster, left = [nodes[0]], []
            for node in nodes[1:]:
                reason = next((r for member in cluster if (r := _obstacle(program, network, member, node))), None)
                if reason is None:
                    cluster.append(node)
                else:
                    left.append(node)
                    remarks.append(self.declined(_site(node).name, reason))
            clusters.append(cluster)
            nodes = left
        return clusters

    def _with_constant_partners(self, clusters: list[Cluster], remarks: list[Remark]) -> list[Cluster]:
        """Take weights out that occur in several clusters with different partners."""
        while True:
            partners: dict[str, set[tuple[str, ...]]] = {}
            for cluster in clusters:
                weights = tuple(_site(node).weight for node in cluster)
                for weight in weights:
                    partners.setdefault(weight, set()).add(weights)
            loose = [node for cluster in clusters if len(cluster) > 1 for node in cluster if len(partners[_site(node).weight]) > 1]
            if not loose:
                return clusters
            remarks += [self.declined(_site(node).name, "its weight is applied elsewhere with other partners") for node in loose]
            rest = [[node for node in cluster if node not in loose] for cluster in clusters]
            clusters = [cluster for cluster in rest if cluster] + [[node] for node in loose]

    def _without_cycles(self, network: "nx.DiGraph[str]", clusters: list[Cluster], remarks: list[Remark]) -> list[Cluster]:
        """Take groups apart that wait for each other: each may be legal, and yet the first need a result of the second and back."""
        while True:
            owner = {node.name: cluster[0].name for cluster in clusters for node in cluster}
            try:
                cycle = nx.find_cycle(nx.relabel_nodes(network, owner))
            except nx.NetworkXNoCycle:
                return clusters
            name = next(begin for begin, _ in cycle if list(owner.values()).count(begin) > 1)
            apart = next(cluster for cluster in clusters if cluster[0].name == name)
            remarks += [self.declined(_site(node).name, "its group and another would wait for each other") for node in apart]
            clusters = [cluster for cluster in clusters if cluster is not apart] + [[node] for node in apart]


def candidates(group: FusionGroup) -> tuple[FusionGroup, ...]:
    """Every subset of two or more members, smallest first; of a group larger than `ALL_SUBSETS_UP_TO`, only the whole."""
    count = len(group.members)
    sizes = range(2, count + 1) if count <= ALL_SUBSETS_UP_TO else range(count, count + 1)
    return tuple(group.subset(members) for size in sizes for members in combinations(group.members, size))


def _obstacle(program: Program, network: "nx.DiGraph[str]", member: fx.Node, node: fx.Node) -> str | None:
    """Why `node` cannot join a group with `member`, which comes before it in the graph."""
    first, second = _site(member), _site(node)
    if first.experts is not None or second.experts is not None:
        return "a stack of experts runs by itself"
    if first.weight == second.weight:
        return f"it shares its weight with {first.name}"
    one, other = program.tensor(first.weight), program.tensor(second.weight)
    if one.dtype != other.dtype:
        return f"its weight is {other.dtype}, that of {first.name} is {one.dtype}"
    if one.device != other.device:
        return f"its weight is on {other.device}, that of {first.name} on {one.device}"
    begin, end = network.nodes[member.name]["position"], network.nodes[node.name]["position"]
    between = [name for name, position in network.nodes(data="position") if begin <= position <= end]
    if nx.has_path(network.subgraph(between), member.name, node.name):
        return f"it depends on {first.name}"
    return None


def _site(node: fx.Node) -> LinearSite:
    site = annotation(node).site
    assert site is not None
    return site


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
