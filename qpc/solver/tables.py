"""All choices as arrays, and the best cover of every cluster at given prices.

Clusters whose parts overlap in the same way are laid side by side, so that one dynamic program over subsets of sites serves them all.
Every amount is a float64; bytes and picoseconds are whole numbers below 2^53, of which sums are exact.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpc.errors import SolverError
from qpc.solver.clusters import Cluster, Part, Way

Floats = npt.NDArray[np.float64]
Picks = tuple[npt.NDArray[np.int64], ...]
"""For each block, int64 [cluster, part]: position of the quantizer that a part takes, -1 where it is not taken."""


class Row(Enum):
    """What the tables count of each choice; the first three are the caller's resources.

    The others are whole numbers that the search splits on: launches, and launches saved by fusing. Their sum is the number of sites.
    """

    LOSS = 0
    BYTES = 1
    LATENCY = 2
    LAUNCHES = 3
    FUSIONS = 4


MAX_STATES = 1 << 14
EXACT = 1 << 53


@dataclass(frozen=True)
class Plan:
    """The order in which covers are built.

    masks: the sites of each part as bits. full: all sites. states: sets of sites to be covered, smaller ones first; each with the parts
    that can cover its lowest site, and what they leave.
    """

    masks: tuple[int, ...]
    full: int
    states: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

    @cached_property
    def options(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """The parts that can cover the lowest site of a state, and what they leave."""
        return dict(self.states)

    @cached_property
    def packings(self) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
        """As `states`, but the lowest site may stay uncovered too: part -1."""
        todo, found = [self.full], dict[int, tuple[tuple[int, int], ...]]()
        while todo:
            state = todo.pop()
            if state and state not in found:
                lowest = state & -state
                fitting = [(part, state & ~mask) for part, mask in enumerate(self.masks) if mask & lowest and mask & ~state == 0]
                found[state] = ((-1, state & ~lowest), *fitting)
                todo += [rest for _, rest in found[state]]
        return tuple(sorted(found.items(), key=lambda entry: (entry[0].bit_count(), entry[0])))

    @staticmethod
    def of(masks: tuple[int, ...], sites: int) -> "Plan":
        """The plan of a cluster. Raises `SolverError` if the parts overlap in too many ways to go through."""
        full = (1 << sites) - 1
        todo, states = [full, *(full & ~mask for mask in masks)], dict[int, tuple[tuple[int, int], ...]]()
        while todo:
            state = todo.pop()
            if state == 0 or state in states:
                continue
            lowest = state & -state
            states[state] = tuple((part, state & ~mask) for part, mask in enumerate(masks) if mask & lowest and mask & ~state == 0)
            todo += [rest for _, rest in states[state]]
            if len(states) > MAX_STATES:
                raise SolverError(f"groups of {sites} tied linears overlap in more than {MAX_STATES} ways; offer fewer of them")
        return Plan(masks, full, tuple(sorted(states.items(), key=lambda entry: (entry[0].bit_count(), entry[0]))))


@dataclass(frozen=True, eq=False)
class Covers:
    """The cheapest cover of each state: its cost, float64 [cluster], and which of its options covers the lowest site, int64 [cluster]."""

    plan: Plan
    costs: dict[int, Floats]
    taken: dict[int, npt.NDArray[np.int64]]

    @property
    def least(self) -> Floats:
        """The cost of covering all: float64 [cluster]."""
        return self.costs[self.plan.full]

    def parts(self, state: int) -> npt.NDArray[np.bool_]:
        """The parts that cover a state: bool [cluster, part]."""
        picked = np.zeros((len(self.least), len(self.plan.masks)), dtype=np.bool_)
        reached: dict[int, npt.NDArray[np.bool_]] = {state: np.ones(len(self.least), dtype=np.bool_)}
        for here, options in reversed(self.plan.states):
            if here in reached:
                for option, (part, rest) in enumerate(options):
                    through = reached[here] & (self.taken[here] == option)
                    picked[:, part] |= through
                    reached[rest] = reached[rest] | through if rest in reached else through
        return picked


@dataclass(frozen=True, eq=False)
class Block:
    """Clusters of one plan.

    values: float64 [row, cluster, part, quantizer]. closed: float64 [cluster, part, quantizer], 0 where the part may take the
    quantizer, else infinity.
    """

    plan: Plan
    clusters: tuple[Cluster, ...]
    values: Floats
    closed: Floats

    def reduced(self, weights: Floats) -> Floats:
        """The weighted sum of rows of each choice: float64 [cluster, part, quantizer]."""
        priced = self.closed.copy()
        for weight, value in zip(weights, self.values, strict=True):
            if weight != 0:
                priced += weight * value
        return priced

    def cover(self, best: Floats) -> "Covers":
        """The cheapest covers when part p of cluster c costs best[c, p]."""
        costs: dict[int, Floats] = {0: np.zeros(len(best))}
        taken: dict[int, npt.NDArray[np.int64]] = {}
        for state, options in self.plan.states:
            if not options:
                costs[state] = np.full(len(best), np.inf)
                continue
            stacked = np.stack([best[:, part] + costs[rest] for part, rest in options])
            taken[state] = stacked.argmin(axis=0)
            costs[state] = np.take_along_axis(stacked, taken[state][None], axis=0)[0]
        return Covers(self.plan, costs, taken)


@dataclass(frozen=True, eq=False)
class Tables:
    """The blocks of a problem. quantizers: how many there are. counted: bool [quantizer], False for linears that stay as they are."""

    blocks: tuple[Block, ...]
    counted: npt.NDArray[np.bool_]

    @staticmethod
    def of(clusters: Sequence[Cluster], counted: Sequence[bool]) -> "Tables":
        """Lay out clusters. Raises `SolverError` if sums could be too large to be exact."""
        alike: dict[tuple[int, tuple[int, ...]], list[Cluster]] = {}
        for cluster in clusters:
            bits = {site: 1 << index for index, site in enumerate(cluster.sites)}
            masks = tuple(sum(bits[site] for site in part.sites) for part in cluster.parts)
            alike.setdefault((len(cluster.sites), masks), []).append(cluster)
        blocks = tuple(_block(Plan.of(masks, sites), tuple(members), len(counted)) for (sites, masks), members in alike.items())
        for row in (Row.BYTES, Row.LATENCY):
            if sum(block.values[row.value].max(axis=2).sum() for block in blocks) >= EXACT:
                raise SolverError(f"{row.name.lower()} of 2^53 and more are not summed exactly")
        return Tables(blocks, np.array(counted, dtype=np.bool_))

    def only(self, quantizers: npt.NDArray[np.bool_]) -> "Tables":
        """The same problem with some quantizers alone: bool [quantizer]."""
        shut = np.where(quantizers, 0.0, np.inf)
        return Tables(tuple(Block(b.plan, b.clusters, b.values, b.closed + shut) for b in self.blocks), self.counted)

    def with_closed(self, closed: Sequence[Floats]) -> "Tables":
        """The same problem with other choices open: for each block, as `Block.closed`."""
        return Tables(tuple(Block(b.plan, b.clusters, b.values, c) for b, c in zip(self.blocks, closed, strict=True)), self.counted)

    def best(self, weights: Floats) -> Picks | None:
        """The covers of least weighted sum; None if some cluster has none."""
        found = []
        for block in self.blocks:
            priced = block.reduced(weights)
            choice = priced.argmin(axis=2)
            covers = block.cover(np.take_along_axis(priced, choice[:, :, None], axis=2)[:, :, 0])
            if not np.isfinite(covers.least).all():
                return None
            found.append(np.where(covers.parts(block.plan.full), choice, -1))
        return tuple(found)

    def least(self, weights: Floats) -> float:
        """The least weighted sum; infinity if some cluster has no cover."""
        return math.fsum(value for block in self.blocks for value in block.cover(block.reduced(weights).min(axis=2)).least)

    def excess(self, weights: Floats) -> list[Floats]:
        """By how much the weighted sum rises at least if a choice is forced: for each block, [cluster, part, quantizer]."""
        found = []
        for block in self.blocks:
            priced = block.reduced(weights)
            covers = block.cover(priced.min(axis=2))
            others = np.stack([covers.costs[block.plan.full & ~mask] - covers.least for mask in block.plan.masks], axis=1)
            found.append(priced + others[:, :, None])
        return found

    def totals(self, picks: Picks) -> Floats:
        """What an allocation spends: float64 [row]; the loss is summed with one rounding, the others exactly."""
        spent = []
        for block, chosen in zip(self.blocks, picks, strict=True):
            clusters, parts = np.nonzero(chosen >= 0)
            spent.append(block.values[:, clusters, parts, chosen[clusters, parts]])
        return np.array([math.fsum(row) for row in np.concatenate(spent, axis=1)])

    def distinct(self, picks: Picks) -> npt.NDArray[np.bool_]:
        """The counted quantizers that an allocation uses: bool [quantizer]."""
        used = np.zeros(len(self.counted), dtype=np.bool_)
        for chosen in picks:
            used[chosen[chosen >= 0]] = True
        return used & self.counted

    def ways(self, picks: Picks) -> Iterator[tuple[int, Way]]:
        """The ways that were taken, each with the position of its quantizer."""
        for block, chosen in zip(self.blocks, picks, strict=True):
            for cluster, part in zip(*np.nonzero(chosen >= 0), strict=True):
                index = int(chosen[cluster, part])
                yield index, block.clusters[cluster].parts[part].ways[index]


def _block(plan: Plan, clusters: tuple[Cluster, ...], quantizers: int) -> Block:
    values = np.zeros((len(Row), len(clusters), len(plan.masks), quantizers))
    closed = np.full(values.shape[1:], np.inf)
    for c, cluster in enumerate(clusters):
        for p, part in enumerate(cluster.parts):
            indices = list(part.ways)
            values[:, c, p, indices] = _amounts(part)
            closed[c, p, indices] = 0
    return Block(plan, clusters, values, closed)


def _amounts(part: Part) -> Floats:
    """float64 [row, way]."""
    counts = [(len(way.groups), len(part.sites) - len(way.groups)) for way in part.ways.values()]
    costs = [(way.cost.distortion, way.cost.weight_bytes, way.cost.latency_ps) for way in part.ways.values()]
    return np.array([(*cost, *count) for cost, count in zip(costs, counts, strict=True)], dtype=np.float64).T
