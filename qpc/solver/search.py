"""The integer program over the choices that a better allocation could hold, solved by HiGHS.

At given prices every choice has an excess: by how much the lower bound rises if it is forced. A choice whose excess is more than what lies
between the bound and the best known allocation is in no better one, and is left out. If too many stay, those of the least excess are
searched, and the bound holds up to the excess of those that were left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_array  # type: ignore[import-untyped]

from qpc.errors import SolverError
from qpc.solver.dual import Best, Problem
from qpc.solver.statement import Status
from qpc.solver.tables import Floats, Picks, Row

MAX_REJECTED = 12
"""Solutions that break a limit within the tolerance of HiGHS are cut off, one by one; the search ends after so many."""
LARGEST_COEFFICIENT = 1e5
"""Of a limit's row, unless whole numbers need more."""
DUAL_ROUNDING = 1e-6
"""Of the distance between bound and best allocation: what is taken off a bound of HiGHS for its tolerances."""


@dataclass(frozen=True)
class Effort:
    """How far to search: choices in the integer program, the gap at which it may stop [unit of the objective], and when it must [s]."""

    most_choices: int
    absolute_gap: float
    deadline_s: float


@dataclass(frozen=True)
class _Columns:
    """The choices of an integer program.

    at: int64 [4, column], block, cluster, part and quantizer. sites: the sites of each column, numbered through. values: float64
    [row, column], less those of a base allocation (laid on one site of each of its parts), so that they are small. base: its totals.
    """

    at: npt.NDArray[np.int64]
    sites: list[list[int]]
    values: Floats
    base: Floats


def search(problem: Problem, best: Best, weights: Floats, bound: float, effort: Effort) -> tuple[float, Status]:
    """Look for allocations better than `best`, to which those found are offered.

    weights: the objective's plus the prices that gave `bound`.

    Returns a lower bound, infinity if there is no allocation, and how the search ended. Raises `SolverError` if HiGHS fails.
    """
    excess = problem.tables.excess(weights)
    flat = np.concatenate([block.ravel() for block in excess])
    room = best.value - bound
    # The sums behind an excess are rounded; a choice on the edge stays.
    edge = room + 1e-9 * max(abs(best.value), abs(bound)) if math.isfinite(room) else math.inf
    cut = int(((flat <= edge) & np.isfinite(flat)).sum()) > effort.most_choices
    if cut:
        edge = float(np.partition(flat, effort.most_choices)[effort.most_choices])
    keep = [np.isfinite(block) & ((block < edge) if cut else (block <= edge)) for block in excess]
    cheapest = problem.tables.best(weights)
    assert cheapest is not None, "every cluster has a cover"
    for picks in (best.picks, cheapest):
        for kept, chosen in zip(keep, picks or (), strict=picks is not None):
            c, p = np.nonzero(chosen >= 0)
            kept[c, p, chosen[c, p]] = True
    reached, status = _solve(problem, best, _columns(problem, keep, best.picks or cheapest), bound, effort)
    if cut:
        reached = min(reached, bound + edge)
        status = Status.SIZE_LIMIT if status is Status.OPTIMAL else status
    return max(bound, min(reached, best.value)), status


def _columns(problem: Problem, keep: Sequence[npt.NDArray[np.bool_]], base: Picks) -> _Columns:
    at, values, sites = [], [], []
    laid: dict[int, Floats] = {}
    first = 0
    for index, (block, kept, chosen) in enumerate(zip(problem.tables.blocks, keep, base, strict=True)):
        count = block.plan.full.bit_count()
        members = [[bit for bit in range(count) if mask >> bit & 1] for mask in block.plan.masks]
        c, p, q = np.nonzero(kept)
        at.append(np.stack([np.full(len(c), index), c, p, q]))
        values.append(block.values[:, c, p, q])
        sites += [[first + cluster * count + bit for bit in members[part]] for cluster, part in zip(c.tolist(), p.tolist(), strict=True)]
        for cluster, part in np.argwhere(chosen >= 0).tolist():
            laid[first + cluster * count + members[part][0]] = block.values[:, cluster, part, chosen[cluster, part]]
        first += len(block.clusters) * count
    joined = np.concatenate(values, axis=1)
    for column, covered in enumerate(sites):
        for site in covered:
            if site in laid:
                joined[:, column] -= laid[site]
    return _Columns(np.concatenate(at, axis=1), sites, joined, problem.tables.totals(base))


def _solve(problem: Problem, best: Best, columns: _Columns, bound: float, effort: Effort) -> tuple[float, Status]:
    """What HiGHS proves, infinity if nothing is feasible, and how it ended."""
    objective, base = columns.values[problem.objective.value], float(columns.base[problem.objective.value])
    # Scaled so that the bound is at 1 and the best known allocation at 2; the constant lies on the columns of the first site.
    scale = best.value - bound if math.isfinite(best.value) else float(np.abs(objective).max())
    scale = scale if scale > 0 else 1.0
    costs = objective / scale + np.where([0 in covered for covered in columns.sites], 1 + (base - bound) / scale, 0.0)
    count = len(costs)
    width = count + (0 if problem.most_quantizers is None else len(problem.tables.counted))
    constraints = [_cover(columns, width), *_limits(problem, columns, width)]
    if problem.most_quantizers is not None:
        constraints += _links(problem, columns, width, problem.most_quantizers)
    proven = bound
    for _ in range(MAX_REJECTED):
        result = milp(
            np.pad(costs, (0, width - count)),
            integrality=np.ones(width),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": effort.absolute_gap / scale / 2, "time_limit": max(effort.deadline_s - monotonic(), 0.0)},
        )
        if result.status == 2:  # HiGHS allows more than the limits, never less, and what was cut off breaks them
            return math.inf, Status.OPTIMAL
        if result.status not in (0, 1):
            raise SolverError(f"HiGHS ended with status {result.status}: {result.message}")
        stopped = result.status == 1
        if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
            proven = max(proven, bound + (float(result.mip_dual_bound) - 1 - DUAL_ROUNDING) * scale)
        if result.x is None:
            return proven, Status.TIME_LIMIT
        chosen = np.flatnonzero(result.x[:count] > 0.5)
        picks = _picks(problem, columns, chosen)
        totals = problem.tables.totals(picks)
        best.offer(picks, totals)
        if stopped or problem.keeps(totals):
            return proven, Status.TIME_LIMIT if stopped else Status.OPTIMAL
        constraints.append(LinearConstraint(_sparse([chosen], width), ub=len(chosen) - 1))
    return proven, Status.SIZE_LIMIT


def _cover(columns: _Columns, width: int) -> Any:
    """Each site once."""
    holders: dict[int, list[int]] = {}
    for column, covered in enumerate(columns.sites):
        for site in covered:
            holders.setdefault(site, []).append(column)
    return LinearConstraint(_sparse(list(holders.values()), width), 1, 1)


def _limits(problem: Problem, columns: _Columns, width: int) -> list[Any]:
    """Each limited resource; whole numbers are divided by their greatest common divisor, large ones further."""
    found = []
    for row, limit in problem.limits.items():
        spent, room = columns.values[row.value], limit - columns.base[row.value]
        divisor = float(np.abs(spent).max()) / LARGEST_COEFFICIENT or 1.0
        if row is not Row.LOSS:
            common = int(np.gcd.reduce(spent.astype(np.int64))) or 1
            room = room // common * common
            divisor = max(divisor, float(common))
        found.append(LinearConstraint(np.pad(spent / divisor, (0, width - len(spent)))[None, :], ub=room / divisor))
    return found


def _links(problem: Problem, columns: _Columns, width: int, most: int) -> list[Any]:
    """A switch for each quantizer, on if any site takes it, and at most so many on."""
    users: dict[tuple[int, int], list[int]] = {}
    start = len(columns.sites)
    for column, (quantizer, covered) in enumerate(zip(columns.at[3].tolist(), columns.sites, strict=True)):
        if problem.tables.counted[quantizer]:
            for site in covered:
                users.setdefault((quantizer, site), []).append(column)
    on = [start + quantizer for quantizer in np.flatnonzero(problem.tables.counted).tolist()]
    uses = _sparse(list(users.values()), width) - _sparse([[start + quantizer] for quantizer, _ in users], width)
    return [LinearConstraint(uses, ub=0), LinearConstraint(_sparse([on], width), ub=most)]


def _sparse(rows: Sequence[Sequence[int] | npt.NDArray[np.int64]], width: int) -> Any:
    """A matrix with ones in these columns of each row."""
    at = [index for index, row in enumerate(rows) for _ in row]
    columns = [column for row in rows for column in row]
    return csr_array((np.ones(len(at)), (at, columns)), shape=(len(rows), width))


def _picks(problem: Problem, columns: _Columns, chosen: npt.NDArray[np.int64]) -> Picks:
    picks = tuple(np.full(block.closed.shape[:2], -1) for block in problem.tables.blocks)
    for block, cluster, part, quantizer in columns.at[:, chosen].T:
        picks[block][cluster, part] = quantizer
    return picks
