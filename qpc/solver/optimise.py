"""The allocation of least loss, bytes or latency within limits of the others, with a proof of how good it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import numpy.typing as npt

from qpc.cost import Cost
from qpc.errors import SolverError
from qpc.quant.quantizer import Quantizer
from qpc.solver.clusters import clusters_of, quantizers_of
from qpc.solver.dual import Best, Problem, Relaxation, relax, unit
from qpc.solver.few import choose
from qpc.solver.median import median_bound
from qpc.solver.repair import repair
from qpc.solver.search import Effort, search
from qpc.solver.statement import Allocation, InfeasibleError, Item, Limits, Resource, Rules, Status
from qpc.solver.tables import Floats, Picks, Row, Tables

SIZES = (1000, 4000, 16000)
"""Choices in the integer program: first few, for a good allocation soon; then more, if the gap asks for it."""
NEAREST_LOSS = 1e-6
"""Relative gap at which a loss is called the smallest; whole numbers must be proven exactly."""
WHOLE = 1e-6
"""What a number of launches may be off a whole one, and count as whole."""


def solve(
    items: Sequence[Item],
    limits: Limits,
    *,
    objective: Resource = Resource.LOSS,
    rules: Rules | None = None,
    relative_gap: float = 1e-4,
    time_limit_s: float = 10.0,
) -> Allocation:
    """The allocation with the least of the objective that keeps limits and rules, to a relative gap.

    Items cover each site exactly once, each with one quantizer; of covers with the same quantizers the fastest is taken. Limits are kept to
    the byte and the picosecond. Equal input gives equal output, unless the time limit stops the search; then, or when the integer program
    becomes too large, the best allocation found is returned with its gap. Tables and prices take a second on the largest models; the time
    limit is for the integer programs of one search. A limited number of quantizers adds a search (among a set of them), and so does the
    nearest feasible value of each limit that cannot be kept.

    Raises `InfeasibleError` if no allocation keeps the limits, `SolverError` if the items or rules contradict each other, HiGHS fails, or
    the time was too short to find an allocation or to exclude that there is one.
    """
    if not items:
        raise SolverError("there is nothing to allocate")
    rules = rules or Rules()
    quantizers = quantizers_of(items)
    tables = Tables.of(clusters_of(items, rules, quantizers), [quantizer is not None for quantizer in quantizers])
    problem = _problem(tables, objective, limits.given, rules.most_quantizers)
    effort, own = _Effort(relative_gap, time_limit_s), limits.of(objective)
    found = _minimise(problem, effort)
    if found.best.picks is not None and own is not None and found.bound <= own < found.best.value:
        found = _minimise(problem, _Effort(0.0, time_limit_s), found.best.picks)
    if found.best.picks is None or (own is not None and found.best.value > own):
        found = _minimise(problem, effort, _nearest(problem, limits.given, time_limit_s))
    assert found.best.picks is not None, "the start keeps all limits"
    return _allocation(found, quantizers)


def _problem(tables: Tables, objective: Resource, limits: Mapping[Resource, float], most_quantizers: int | None) -> Problem:
    """The objective is not limited by itself here."""
    others = {Row(resource.value): limit for resource, limit in limits.items() if resource is not objective}
    return Problem(tables, Row(objective.value), others, most_quantizers)


@dataclass(frozen=True)
class _Effort:
    """relative_gap: when to stop. time_limit_s: of all integer programs of one problem."""

    relative_gap: float
    time_limit_s: float


@dataclass(frozen=True)
class _Outcome:
    """best: what was found, if anything. bound: infinity if it is proven that there is nothing."""

    best: Best
    bound: float
    status: Status


@dataclass
class _Node:
    """A part of the problem: between all of them every allocation is in one. weights: the objective's plus the prices that gave `base`.

    bound: of this part; it rises above `base` by search.
    """

    problem: Problem
    weights: Floats
    base: float
    bound: float
    status: Status = Status.OPTIMAL


def _minimise(problem: Problem, effort: _Effort, start: Picks | None = None) -> _Outcome:
    """Prices, then a repaired allocation, then integer programs of rising size until the gap is reached."""
    tables, best = problem.tables, Best(problem)
    if start is not None:
        best.offer(start, tables.totals(start))
    root = relax(problem, best)
    if root is None:
        return _Outcome(best, math.inf, Status.OPTIMAL)
    nodes = [_node(problem, root, best)]
    if _open(best, nodes[0].bound, effort.relative_gap):
        nodes = _split(problem, root, best) or nodes
    if problem.most_quantizers is not None and _open(best, min(node.bound for node in nodes), effort.relative_gap):
        least, possible = _few(problem, root.weights, best, problem.most_quantizers, effort)
        for node in nodes:
            node.bound = max(node.bound, least)
            node.problem = replace(node.problem, tables=tables.only(possible))
    deadline_s = monotonic() + effort.time_limit_s
    for size in SIZES:
        for node in sorted(nodes, key=lambda node: node.bound):
            if _open(best, node.bound, effort.relative_gap) and (size == SIZES[0] or node.status is Status.SIZE_LIMIT):
                absolute = effort.relative_gap * best.value if best.picks is not None else 0.0
                reached, node.status = search(node.problem, best, node.weights, node.base, Effort(size, absolute, deadline_s))
                node.bound = max(node.bound, _whole(problem.objective, reached))
    bound = min(best.value, *(node.bound for node in nodes))
    left = [node.status for node in nodes if _open(best, node.bound, effort.relative_gap)]
    return _Outcome(best, bound, max(left, key=list(Status).index, default=Status.OPTIMAL))


def _node(problem: Problem, relaxation: Relaxation, best: Best) -> _Node:
    """A part of the problem with its bound; what comes of it by repair is offered to `best`."""
    if problem.limits:
        repair(problem, best, relaxation.weights)
    bound = _whole(problem.objective, problem.bound(relaxation.weights))
    return _Node(problem, relaxation.weights, bound, bound)


def _split(problem: Problem, root: Relaxation, best: Best) -> list[_Node]:
    """Two parts, with fewer launches than the fraction of them that the relaxation uses, or with more; none if it uses a whole number.

    A fraction of a launch is what the relaxation gains most by where time is limited: without it the bound is close.
    """
    launches, fusions = (float(root.totals[row.value]) for row in (Row.LAUNCHES, Row.FUSIONS))
    if abs(launches - round(launches)) < WHOLE:
        return []
    nodes = []
    for row, limit in ((Row.LAUNCHES, math.floor(launches)), (Row.FUSIONS, math.floor(fusions))):
        part = replace(problem, limits={**problem.limits, row: limit})
        relaxation = relax(part, Best(part))
        if relaxation is not None:
            nodes.append(_node(part, relaxation, best))
    return nodes


def _few(problem: Problem, weights: Floats, best: Best, most: int, effort: _Effort) -> tuple[float, npt.NDArray[np.bool_]]:
    """Offer to `best` the allocation of a well chosen set of quantizers.

    weights: the objective's plus the prices of the problem without the rule.

    Returns a lower bound that knows of the rule, and the quantizers that a better allocation may use: bool [quantizer].
    """
    for chosen in reversed(list(choose(problem, weights, most))):
        restricted = Problem(problem.tables.only(chosen), problem.objective, problem.limits)
        within = _minimise(restricted, effort)
        if within.best.picks is not None and within.best.totals is not None:
            best.offer(within.best.picks, within.best.totals)
            relaxation = relax(restricted, Best(restricted))
            assert relaxation is not None, "the set has an allocation"
            bound, possible = median_bound(problem, relaxation.weights, within.best.picks, most, best.value)
            return _whole(problem.objective, bound), possible
    return -math.inf, np.ones(len(problem.tables.counted), dtype=np.bool_)


def _open(best: Best, bound: float, relative_gap: float) -> bool:
    """Whether the gap is not reached yet."""
    return math.isfinite(bound) and (best.picks is None or best.value - bound > relative_gap * best.value)


def _whole(row: Row, bound: float) -> float:
    """A bound of whole numbers is the next of them, less what the rounding of the sums in it may be."""
    return bound if row is Row.LOSS or math.isinf(bound) else float(math.ceil(bound - 1e-3 - 1e-12 * abs(bound)))


def _nearest(problem: Problem, limits: Mapping[Resource, float], time_limit_s: float) -> Picks:
    """An allocation that keeps all limits after all.

    Raises `InfeasibleError` that names the limits that bite, and for each the least amount with which the others can be kept; `SolverError`
    if the time was too short to find that out.
    """
    nearest: dict[Resource, float] = {}
    bites: list[str] = []
    undecided = False
    asked = " and ".join(resource.show(limit) for resource, limit in limits.items())
    for resource, limit in limits.items():
        found = _minimise(_problem(problem.tables, resource, limits, problem.most_quantizers), _Effort(0.0, time_limit_s))
        undecided |= found.bound <= limit and found.status is not Status.OPTIMAL
        if found.best.picks is None:
            continue
        if found.best.value <= limit:
            return found.best.picks
        nearest[resource] = found.best.value
        rest = ", the other limits kept" if len(limits) > 1 else ""
        proven = found.bound >= found.best.value * (1 - NEAREST_LOSS if resource is Resource.LOSS else 1)
        less = "" if proven else f" (the smallest that was found; it is proven to be at least {resource.show(found.bound)})"
        bites.append(f"{resource.show(limit)} is below the smallest feasible one of {resource.show(found.best.value)}{less}{rest}")
    if undecided:
        raise SolverError(f"the time limit of {time_limit_s} s was too short to find an allocation within {asked}, or that there is none")
    if not limits:
        raise InfeasibleError(f"no allocation has at most {problem.most_quantizers} distinct quantizers", {})
    alone: dict[Resource, float] = {}
    if not bites:
        for each, limit in limits.items():
            found = _minimise(_problem(problem.tables, each, {}, problem.most_quantizers), _Effort(0.0, time_limit_s))
            if limit < found.best.value < math.inf:
                alone[each] = found.best.value
                least = each.show(alone[each])
                bites.append(f"{each.show(limit)} is below the smallest feasible one of {least}, even without other limits")
    raise InfeasibleError(f"no allocation keeps {asked}: {'; '.join(bites) or 'the rules leave none'}", nearest, alone)


def _allocation(found: _Outcome, quantizers: Sequence[Quantizer | None]) -> Allocation:
    """The answer, in the caller's terms."""
    problem, picks = found.best.problem, found.best.picks
    assert picks is not None, "there is an allocation"
    ways = list(problem.tables.ways(_fastest(problem, picks)))
    cost = sum((way.cost for _, way in ways), start=Cost(0, 0.0))
    cost = Cost(cost.weight_bytes, math.fsum(way.cost.distortion for _, way in ways), cost.latency_ps)
    value = Resource(problem.objective.value).of(cost)
    bound = min(found.bound, value)
    chosen = {site: quantizers[index] for index, way in ways for sites in way.groups for site in sites}
    groups = tuple(sites for _, way in ways for sites in way.groups)
    return Allocation(chosen, groups, cost, bound, (value - bound) / value if value > 0 else 0.0, found.status)


def _fastest(problem: Problem, picks: Picks) -> Picks:
    """The same quantizers in the items of least latency, if that costs nothing else."""
    closed = []
    for block, chosen in zip(problem.tables.blocks, picks, strict=True):
        masks = np.array(block.plan.masks)
        shut = np.full(block.closed.shape, np.inf)
        for cluster, row in enumerate(chosen):
            of_quantizer: dict[int, int] = {}
            for part in np.flatnonzero(row >= 0):
                of_quantizer[int(row[part])] = of_quantizer.get(int(row[part]), 0) | int(masks[part])
            for quantizer, covered in of_quantizer.items():
                shut[cluster, masks & ~covered == 0, quantizer] = 0
        closed.append(block.closed + shut)
    faster = problem.tables.with_closed(closed).best(unit(Row.LATENCY))
    assert faster is not None, "the allocation itself is left"
    before, after = problem.tables.totals(picks), problem.tables.totals(faster)
    return faster if bool((after <= before)[: len(Resource)].all()) else picks
