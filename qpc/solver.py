"""Which choice for which linear: an exact multiple-choice knapsack.

Minimise the sum of losses under a limit of bytes, one choice for each item. The linear relaxation has a closed form (a greedy walk over
the convex hulls; Sinha and Zoltners, 1979) that gives a bound, a price of a byte and a first solution. At that price most choices cannot
be part of any better solution; what is left goes to HiGHS as a small integer program.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_array  # type: ignore[import-untyped]

from qpc.cost import Choice, Cost, undominated
from qpc.errors import BudgetError, SolverError
from qpc.quant.quantizer import Quantizer


class Status(StrEnum):
    """How the search ended."""

    OPTIMAL = "optimal"
    TIME_LIMIT = "time limit"


@dataclass(frozen=True)
class Item:
    """Something that takes exactly one choice: a linear, or several that must take the same.

    sites: names of the linears. choices: bytes and loss of each, summed over the item's weights.

    Raises `SolverError` if there are no choices, or a loss is not finite.
    """

    sites: tuple[str, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise SolverError(f"{', '.join(self.sites)}: no quantizer of the palette supports this linear; exclude it or add one that does")
        if not all(math.isfinite(choice.cost.distortion) for choice in self.choices):
            raise SolverError(f"{', '.join(self.sites)}: a loss is not finite; check the sensitivities")


@dataclass(frozen=True)
class Allocation:
    """What the solver chose.

    choices: quantizer of each site; None leaves it as it is. cost: bytes and loss in all. lower_bound: no allocation has a smaller loss.
    gap: (loss - lower_bound) / loss.
    """

    choices: Mapping[str, Quantizer | None]
    cost: Cost
    lower_bound: float
    gap: float
    status: Status


def smallest_bytes(items: Sequence[Item]) -> int:
    """Bytes of the smallest allocation."""
    return sum(min(choice.cost.weight_bytes for choice in item.choices) for item in items)


def solve(items: Sequence[Item], budget_bytes: int, *, relative_gap: float = 1e-6, time_limit_s: float = 10.0) -> Allocation:
    """The allocation of least loss within `budget_bytes`, to a relative gap; never a byte over.

    Equal input gives equal output, unless the time limit stops the search; then the best allocation found is returned with its gap.

    Raises `BudgetError` if nothing fits, `SolverError` if HiGHS fails.
    """
    smallest = smallest_bytes(items)
    if smallest > budget_bytes:
        raise BudgetError(f"a budget of {budget_bytes} bytes is below the smallest feasible one of {smallest} bytes")
    tables = [undominated(item.choices) for item in items]
    relaxed = _relax(tables, budget_bytes)
    best, bound, status = relaxed.picks, relaxed.bound, Status.OPTIMAL
    if _loss(tables, best) - bound > relative_gap * _loss(tables, best):
        best, bound, status = _search(tables, relaxed, budget_bytes, relative_gap, time_limit_s)
    cost = Cost(sum(table[pick].cost.weight_bytes for table, pick in zip(tables, best, strict=True)), _loss(tables, best))
    assert cost.weight_bytes <= budget_bytes
    bound = min(bound, cost.distortion)
    gap = (cost.distortion - bound) / cost.distortion if cost.distortion > 0 else 0.0
    chosen = {site: table[pick].quantizer for item, table, pick in zip(items, tables, best, strict=True) for site in item.sites}
    return Allocation(chosen, cost, bound, gap, status)


@dataclass(frozen=True)
class _Relaxation:
    """picks: a feasible choice of each item. bound: value of the linear relaxation. price: loss saved by one byte more."""

    picks: list[int]
    bound: float
    price: float


@dataclass(frozen=True, order=True)
class _Step:
    """A step along the hull of an item, from one choice to the next larger one; steps sort by saved loss per byte, largest first."""

    negated_price: float
    item: int
    start: int = field(compare=False)
    end: int
    weight_bytes: int = field(compare=False)


def _relax(tables: Sequence[tuple[Choice, ...]], budget_bytes: int) -> _Relaxation:
    """Solve the linear relaxation by walking the hulls' steps from the best price down."""
    steps = sorted(step for item, table in enumerate(tables) for step in _hull_steps(item, table))
    picks = [0] * len(tables)
    room = budget_bytes - sum(table[0].cost.weight_bytes for table in tables)
    bound: float | None = None
    price = 0.0
    for step in steps:
        if bound is None and step.weight_bytes > room:
            price = -step.negated_price
            bound = _loss(tables, picks) - price * room
        if picks[step.item] == step.start and step.weight_bytes <= room:
            picks[step.item] = step.end
            room -= step.weight_bytes
    return _Relaxation(picks, _loss(tables, picks) if bound is None else bound, price)


def _hull_steps(item: int, table: tuple[Choice, ...]) -> list[_Step]:
    """Steps between neighbours on the lower convex hull of a table, their prices falling."""
    steps: list[_Step] = []
    for end in range(1, len(table)):
        step = _step(item, table, end - 1, end)
        while steps and step.negated_price <= steps[-1].negated_price:
            step = _step(item, table, steps.pop().start, end)
        steps.append(step)
    return steps


def _step(item: int, table: tuple[Choice, ...], start: int, end: int) -> _Step:
    size = table[end].cost.weight_bytes - table[start].cost.weight_bytes
    return _Step((table[end].cost.distortion - table[start].cost.distortion) / size, item, start, end, size)


def _search(
    tables: Sequence[tuple[Choice, ...]], relaxed: _Relaxation, budget_bytes: int, relative_gap: float, time_limit_s: float
) -> tuple[list[int], float, Status]:
    """Improve the relaxation's picks by an integer program over the choices that a better solution could hold."""
    scale = _loss(tables, relaxed.picks)
    slack = scale - relaxed.bound
    open_picks: list[list[int]] = []
    for table in tables:
        priced = [choice.cost.distortion + relaxed.price * choice.cost.weight_bytes for choice in table]
        open_picks.append([pick for pick, value in enumerate(priced) if value - min(priced) <= slack + 1e-9 * scale])

    columns = [(item, pick) for item, picks in enumerate(open_picks) for pick in picks]
    losses = np.array([tables[item][pick].cost.distortion for item, pick in columns]) / scale
    base = [tables[item][picks[0]].cost.weight_bytes for item, picks in enumerate(open_picks)]
    sizes = np.array([tables[item][pick].cost.weight_bytes - base[item] for item, pick in columns], dtype=np.int64)
    unit = int(np.gcd.reduce(sizes)) or 1
    room = (budget_bytes - sum(base)) // unit
    one_each = csr_array((np.ones(len(columns)), ([item for item, _ in columns], range(len(columns)))))

    best, bound, status = relaxed.picks, relaxed.bound, Status.OPTIMAL
    for attempt in range(4):
        fits = LinearConstraint((sizes / unit)[None, :], ub=room)
        result = milp(
            losses,
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), fits],
            options={"mip_rel_gap": relative_gap, "time_limit": time_limit_s},
        )
        if attempt > 0 and result.status == 2:  # nothing fits the room as tightened below
            break
        if result.status not in (0, 1):
            raise SolverError(f"HiGHS ended with status {result.status}: {result.message}")
        if attempt == 0 and result.mip_dual_bound is not None:
            bound = max(bound, min(float(result.mip_dual_bound), 1.0) * scale)
        status = Status.TIME_LIMIT if result.status == 1 else Status.OPTIMAL
        if result.x is None:
            break
        picks = list(relaxed.picks)
        for value, (item, pick) in zip(result.x, columns, strict=True):
            if value > 0.5:
                picks[item] = pick
        excess = sum(table[pick].cost.weight_bytes for table, pick in zip(tables, picks, strict=True)) - budget_bytes
        if excess <= 0:
            if _loss(tables, picks) < _loss(tables, best):
                best = picks
            break
        room -= -(-excess // unit)  # HiGHS keeps rows to a tolerance only; the byte count here is exact.
    return best, bound, status


def _loss(tables: Sequence[tuple[Choice, ...]], picks: Sequence[int]) -> float:
    return math.fsum(table[pick].cost.distortion for table, pick in zip(tables, picks, strict=True))
