"""The bounds: water-filling is optimal and below every quantizer, the palette's relaxation is the linear program's."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from qpc.cost import Cost
from qpc.errors import BudgetError, SolverError
from qpc.solver import Item, Limits, decibels, palette_bound, solve, water_filling
from tests.solver.test_knapsack import TABLES, items_of, smallest_bytes

LINEARS = st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 10**9)), min_size=1, max_size=12)


@settings(max_examples=300)
@given(LINEARS, st.floats(0, 12))
def test_water_filling_spends_the_bits_at_one_level(linears: list[tuple[float, int]], bits: float) -> None:
    """The conditions of Karush, Kuhn and Tucker, which are sufficient: the problem is convex."""
    sensitivities, weights = zip(*linears, strict=True)
    total = bits * sum(weights)
    found = water_filling(sensitivities, weights, total)
    assert math.fsum(rate * count for rate, count in zip(found.rates, weights, strict=True)) == pytest.approx(
        total, rel=1e-9, abs=1e-8 * sum(weights)
    )
    for a, n, rate in zip(sensitivities, weights, found.rates, strict=True):
        density = a / n * 2 ** (-2 * rate)
        assert density == pytest.approx(found.level, rel=1e-6) if rate > 1e-9 else density <= found.level * (1 + 1e-6)
    assert found.loss == pytest.approx(sum(a * 2 ** (-2 * r) for a, r in zip(sensitivities, found.rates, strict=True)))


@settings(max_examples=200)
@given(LINEARS, st.floats(0, 8), st.lists(st.floats(0.01, 1), min_size=12, max_size=12))
def test_no_rates_of_the_same_bits_lose_less(linears: list[tuple[float, int]], bits: float, shares: list[float]) -> None:
    sensitivities, weights = zip(*linears, strict=True)
    total = bits * sum(weights)
    share = shares[: len(linears)]
    rates = [total * s / sum(share) / n for s, n in zip(share, weights, strict=True)]
    loss = math.fsum(a * 2 ** (-2 * rate) for a, rate in zip(sensitivities, rates, strict=True))
    assert water_filling(sensitivities, weights, total).loss <= loss * (1 + 1e-9)


def test_equal_linears_get_equal_rates_and_insensitive_ones_none() -> None:
    found = water_filling([1.0, 1.0, 0.0], [10, 10, 10], 60)
    assert found.rates == pytest.approx((3.0, 3.0, 0.0))
    assert found.loss == pytest.approx(2 * 2**-6)
    assert water_filling([0.0], [1], 8).loss == 0


@pytest.mark.parametrize(("sensitivities", "weights"), [([], []), ([1.0], [1, 2]), ([math.nan], [1]), ([-1.0], [1]), ([1.0], [0])])
def test_malformed_linears_are_refused(sensitivities: list[float], weights: list[int]) -> None:
    with pytest.raises(SolverError):
        water_filling(sensitivities, weights, 1.0)


@settings(max_examples=300)
@given(TABLES, st.integers(0, 250))
@example([[Cost(0, 1.0), Cost(1, 2.0**-24), Cost(1, 0.0)], [Cost(0, 2.0**-24), Cost(1, 0.0)]], 2)
@example([[Cost(0, 0.0)], [Cost(3, 5.47265625), Cost(45, 0.0)], [Cost(3, 5.47265625), Cost(45, 0.0)]], 90)
def test_the_palette_bound_is_the_linear_program(tables: list[list[Cost]], budget: int) -> None:
    smallest = sum(min(cost.weight_bytes for cost in table) for table in tables)
    if smallest > budget:
        with pytest.raises(BudgetError, match=f"of {smallest} bytes"):
            palette_bound(tables, budget)
        return
    costs = [cost for table in tables for cost in table]
    one_each = np.array([[float(owner == index) for owner, table in enumerate(tables) for _ in table] for index in range(len(tables))])
    sizes = np.array([[cost.weight_bytes for cost in costs]])
    exact = linprog(
        [cost.distortion for cost in costs],
        A_ub=sizes,
        b_ub=[budget],
        A_eq=one_each,
        b_eq=np.ones(len(tables)),
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    bound = palette_bound(tables, budget)
    assert bound == pytest.approx(exact.fun, rel=1e-7, abs=1e-7)
    found = solve(items_of(tables), Limits(budget))
    assert bound <= found.cost.distortion * (1 + 1e-12) + 1e-15


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(1e-3, 10), st.integers(1, 50)), min_size=1, max_size=6), st.integers(1, 6), st.data())
def test_the_bounds_stand_in_order(linears: list[tuple[float, int]], bits: int, data: st.DataObject) -> None:
    """Quantizers that keep Shannon's bound, in whole bytes: Gaussian bound, palette bound, and plan."""
    waste = data.draw(st.lists(st.floats(1, 2), min_size=8, max_size=8))
    tables = [[Cost(math.ceil(n * r), a * waste[r] * 2.0 ** (-16 * r / 8)) for r in range(1, 8)] for a, n in linears]
    items: list[Item] = items_of(tables)
    budget = max(smallest_bytes(items), bits * sum(n for _, n in linears))
    ideal = water_filling([a for a, _ in linears], [8 * n for _, n in linears], 8 * budget).loss
    palette, plan = palette_bound(tables, budget), solve(items, Limits(budget)).cost.distortion
    assert ideal <= palette * (1 + 1e-9)
    assert palette <= plan * (1 + 1e-9)
    assert decibels(plan, ideal) >= -1e-6


def test_decibels() -> None:
    assert decibels(4.0, 1.0) == pytest.approx(6.0206, abs=1e-4)
    assert decibels(0.0, 0.0) == 0
    assert decibels(1.0, 0.0) == math.inf


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(SolverError):
        palette_bound([[]], 1)
