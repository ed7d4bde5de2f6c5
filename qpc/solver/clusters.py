"""Items that share linears form clusters; the solver's subproblems are independent between clusters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx  # type: ignore[import-untyped]

from qpc.cost import Cost
from qpc.errors import SolverError
from qpc.quant.quantizer import Quantizer
from qpc.solver.statement import Item, Rules


@dataclass(frozen=True)
class Way:
    """One way to run a part: its cost, and the sites of the items in it (several only where they must be alike)."""

    cost: Cost
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Part:
    """Sites that take one quantizer. ways: by the position of the quantizer in the list of all of them."""

    sites: tuple[str, ...]
    ways: Mapping[int, Way]


@dataclass(frozen=True)
class Cluster:
    """Sites tied by items. parts: an allocation takes some that cover each site once."""

    sites: tuple[str, ...]
    parts: tuple[Part, ...]


def quantizers_of(items: Iterable[Item]) -> list[Quantizer | None]:
    """All quantizers of the items, each once, in the order in which they occur."""
    found: dict[int, Quantizer | None] = {}
    for item in items:
        for choice in item.choices:
            found.setdefault(id(choice.quantizer), choice.quantizer)
    return list(dict.fromkeys(found.values()))


def clusters_of(items: Sequence[Item], rules: Rules, quantizers: Sequence[Quantizer | None]) -> list[Cluster]:
    """The clusters of what the rules leave, in the order in which their sites first occur.

    Raises `SolverError` if a quantizer occurs twice in an item, a rule names an unknown site, or nothing is left for a site.
    """
    position = {quantizer: index for index, quantizer in enumerate(quantizers)}
    by_identity = {id(choice.quantizer): position[choice.quantizer] for item in items for choice in item.choices}
    ties: nx.Graph[str] = nx.Graph()
    for item in items:
        ties.add_nodes_from(item.sites)
        nx.add_path(ties, item.sites)
    ruled = {*rules.allowed, *rules.least_rate, *rules.excluded, *(site for sites in rules.alike for site in sites)}
    if unknown := sorted(ruled - set(ties)):
        raise SolverError(f"a rule names {', '.join(unknown)}, of which no item is known")
    for sites in rules.alike:
        nx.add_path(ties, list(sites))
    order = {site: index for index, site in enumerate(ties)}
    bound = rules.allowed.keys() | rules.least_rate.keys() | set(rules.excluded)
    parts: dict[str, list[Part]] = {}
    for item in items:
        ways: dict[int, Way] = {}
        limited = [site for site in item.sites if site in bound]
        for choice in item.choices:
            index = by_identity[id(choice.quantizer)]
            if index in ways:
                raise SolverError(f"{', '.join(item.sites)}: {choice.quantizer} occurs twice")
            if all(rules.permit(site, choice.quantizer) for site in limited):
                ways[index] = Way(choice.cost, (item.sites,))
        if ways:
            parts.setdefault(item.sites[0], []).append(Part(item.sites, ways))
    alike = {site for sites in rules.alike for site in sites}
    found = []
    for component in nx.connected_components(ties):
        sites = tuple(sorted(component, key=order.__getitem__))
        cluster = Cluster(sites, tuple(part for site in sites for part in parts.get(site, ())))
        missing = set(sites) - {site for part in cluster.parts for site in part.sites}
        if missing:
            raise SolverError(f"{', '.join(sorted(missing, key=order.__getitem__))}: the rules leave no quantizer")
        found.append(_alike(cluster) if component & alike else cluster)
    return found


def _alike(cluster: Cluster) -> Cluster:
    """The same cluster with parts that cover all of it with one quantizer.

    For each quantizer only the covers that no other one beats in bytes, loss and latency are kept, most often the one that fuses all.
    """
    columns: list[dict[int, Way]] = []
    for index in sorted({index for part in cluster.parts for index in part.ways}):
        for depth, way in enumerate(_covers(cluster, index)):
            if depth == len(columns):
                columns.append({})
            columns[depth][index] = way
    if not columns:
        raise SolverError(f"{', '.join(cluster.sites)}: no quantizer is allowed for all of them, and they must be alike")
    return Cluster(cluster.sites, tuple(Part(cluster.sites, ways) for ways in columns))


def _covers(cluster: Cluster, index: int) -> list[Way]:
    """The undominated covers by parts of one quantizer."""
    known: dict[frozenset[str], list[Way]] = {frozenset(): [Way(Cost(0, 0.0), ())]}

    def covers(left: frozenset[str]) -> list[Way]:
        if left not in known:
            first = next(site for site in cluster.sites if site in left)
            made = [
                Way(part.ways[index].cost + rest.cost, part.ways[index].groups + rest.groups)
                for part in cluster.parts
                if first in part.sites and index in part.ways and left.issuperset(part.sites)
                for rest in covers(left - frozenset(part.sites))
            ]
            known[left] = _undominated(made)
        return known[left]

    return covers(frozenset(cluster.sites))


def _undominated(ways: list[Way]) -> list[Way]:
    def key(way: Way) -> tuple[int, int, float]:
        return way.cost.latency_ps, way.cost.weight_bytes, way.cost.distortion

    kept: list[Way] = []
    for way in sorted(ways, key=key):
        if not any(all(mine <= its for mine, its in zip(key(other), key(way), strict=True)) for other in kept):
            kept.append(way)
    return kept
