"""A limit of bytes alone: the solver equals brute force on small instances, never exceeds a budget, and its bound holds."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.cost import Choice, Cost
from qpc.errors import SolverError
from qpc.solver import InfeasibleError, Item, Limits, Resource, Status, solve
from tests.solver.instances import cost_of, solved_in
from tests.toy import ToyQuantizer

COSTS = st.builds(Cost, st.integers(0, 60), st.one_of(st.floats(0, 10), st.integers(0, 4).map(float)))
TABLES = st.lists(st.lists(COSTS, min_size=1, max_size=5), min_size=1, max_size=5)


def items_of(tables: list[list[Cost]], unit: int = 1) -> list[Item]:
    """Items named by number; the quantizer of choice k has k + 1 bits."""
    return [
        Item((f"linear{i}",), tuple(Choice(ToyQuantizer(k + 1), Cost(c.weight_bytes * unit, c.distortion)) for k, c in enumerate(table)))
        for i, table in enumerate(tables)
    ]


def smallest_bytes(items: list[Item]) -> int:
    """Bytes of the smallest allocation."""
    return solve(items, Limits(), objective=Resource.BYTES).cost.weight_bytes


@settings(max_examples=400)
@given(TABLES, st.integers(0, 250), st.sampled_from((1, 16, 1_000_003)))
def test_equals_brute_force(tables: list[list[Cost]], budget: int, unit: int) -> None:
    items = items_of(tables, unit)
    within = [
        math.fsum(cost.distortion for cost in costs)
        for costs in itertools.product(*tables)
        if sum(cost.weight_bytes for cost in costs) <= budget
    ]
    if not within:
        with pytest.raises(InfeasibleError, match=str(smallest_bytes(items))):
            solve(items, Limits(budget * unit))
        return
    found = solve(items, Limits(budget * unit), relative_gap=1e-6)
    assert cost_of(items, found).weight_bytes == found.cost.weight_bytes <= budget * unit
    assert cost_of(items, found).distortion == pytest.approx(found.cost.distortion)
    assert min(within) * (1 - 1e-9) <= found.cost.distortion <= min(within) * (1 + 1e-5) + 1e-12
    assert found.lower_bound <= min(within) * (1 + 1e-9)
    assert found.status is Status.OPTIMAL
    assert solve(items, Limits(budget * unit), relative_gap=1e-6) == found


def large_instance(seed: int, linears: int, rates: int) -> tuple[list[Item], int]:
    """Sizes and rates of a model of 8 billion weights; sensitivities spread over two decades."""
    rng = random.Random(seed)
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    items, weights = [], 0
    for i in range(linears):
        rows, columns = shapes[i % 4]
        a = math.exp(rng.gauss(0, 1.5))
        steps = [Cost(rows * columns * (6 + k) // 32 + rows * 2 + columns // 8, 1.1 * a * 2.0 ** (-(6 + k) / 2)) for k in range(rates)]
        weights += rows * columns
        items.append(items_of([steps])[0])
        items[-1] = Item((f"linear{i}",), items[-1].choices)
    return items, weights


@pytest.mark.parametrize("bits", [1.6, 2.0, 3.25, 4.0, 7.9])
def test_a_large_model_is_solved_in_seconds_to_a_small_gap(bits: float) -> None:
    items, weights = large_instance(seed=1, linears=224, rates=27)
    found = solved_in(5, items, Limits(int(bits * weights / 8)), relative_gap=1e-6)
    assert found.gap <= 1e-6
    assert found.status is Status.OPTIMAL
    assert found.cost.weight_bytes <= int(bits * weights / 8)


def test_more_bytes_never_lose() -> None:
    items, weights = large_instance(seed=2, linears=12, rates=9)
    losses = [solve(items, Limits(int(bits * weights / 8)), relative_gap=1e-7).cost.distortion for bits in (1.6, 2, 2.1, 2.5, 3, 3.5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_budget_above_the_largest_takes_the_best() -> None:
    items, _ = large_instance(seed=3, linears=8, rates=5)
    found = solve(items, Limits(1 << 60))
    assert set(found.choices.values()) == {ToyQuantizer(5)}
    assert found.gap == 0


def test_the_smallest_budget_is_feasible_and_a_byte_less_is_not() -> None:
    items, _ = large_instance(seed=3, linears=8, rates=5)
    smallest = smallest_bytes(items)
    assert set(solve(items, Limits(smallest)).choices.values()) == {ToyQuantizer(1)}
    with pytest.raises(InfeasibleError, match=str(smallest)):
        solve(items, Limits(smallest - 1))


def test_no_time_still_gives_a_feasible_allocation_with_an_honest_gap() -> None:
    items, weights = large_instance(seed=4, linears=60, rates=27)
    budget = int(3.1 * weights / 8)
    hurried, exact = solve(items, Limits(budget), relative_gap=0.0, time_limit_s=0.0), solve(items, Limits(budget), relative_gap=1e-7)
    assert hurried.cost.weight_bytes <= budget
    assert hurried.status is Status.TIME_LIMIT
    assert hurried.lower_bound <= exact.cost.distortion <= hurried.cost.distortion
    assert hurried.gap == pytest.approx((hurried.cost.distortion - hurried.lower_bound) / hurried.cost.distortion)


def test_sites_of_one_item_get_one_quantizer() -> None:
    item = Item(("q", "k"), items_of([[Cost(1, 1.0), Cost(2, 0.5)]])[0].choices)
    assert solve([item], Limits(2)).choices == {"q": ToyQuantizer(2), "k": ToyQuantizer(2)}


def test_an_item_that_cannot_be_solved_names_its_linear() -> None:
    with pytest.raises(SolverError, match="q_proj"):
        Item(("q_proj",), ())
    with pytest.raises(SolverError, match="linear0"):
        items_of([[Cost(1, math.nan)]])
