"""Groups, two limits and each objective: the solver equals brute force, keeps its limits exactly, and its bound holds."""

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpc.cost import Choice, Cost
from qpc.errors import SolverError
from qpc.solver import InfeasibleError, Item, Limits, Resource, Rules, Status, solve
from tests.solver.instances import Possible, cost_of, keeps, limited
from tests.toy import ToyQuantizer

MANY = settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
RESOURCES = st.sampled_from(list(Resource))
Problem = tuple[list[Item], list[Possible], Limits]


def check(problem: Problem, objective: Resource, rules: Rules, legal: Callable[[Possible], bool]) -> None:
    """Compare with all allocations that are legal."""
    items, possible, limits = problem
    within = [each.cost for each in possible if legal(each) and keeps(each.cost, limits)]
    try:
        found = solve(items, limits, objective=objective, rules=rules, relative_gap=1e-6)
    except InfeasibleError as error:
        assert not within
        check_nearest(problem, legal, error)
        return
    assert cost_of(items, found) == found.cost
    assert any(each.choices == found.choices and legal(each) for each in possible)
    assert keeps(found.cost, limits)
    least, reached = min(objective.of(cost) for cost in within), objective.of(found.cost)
    assert reached <= least * (1 + 1e-5) + 1e-12
    assert found.lower_bound <= least * (1 + 1e-9)
    assert found.gap == pytest.approx((reached - found.lower_bound) / reached if reached else 0)
    assert found.status is Status.OPTIMAL
    assert solve(items, limits, objective=objective, rules=rules, relative_gap=1e-6) == found


def check_nearest(problem: Problem, legal: Callable[[Possible], bool], error: InfeasibleError) -> None:
    """Each limit that is named is broken by all that keep the others, and the nearest value is the least of theirs."""
    _, possible, limits = problem
    for resource in limits.given:
        others = Limits(
            None if resource is Resource.BYTES else limits.weight_bytes,
            None if resource is Resource.LATENCY else limits.latency_ps,
            None if resource is Resource.LOSS else limits.loss,
        )
        amounts = [resource.of(each.cost) for each in possible if legal(each) and keeps(each.cost, others)]
        assert (resource in error.nearest) == bool(amounts)
        if amounts:
            assert error.nearest[resource] == pytest.approx(min(amounts), rel=1e-6)
            assert error.nearest[resource] >= min(amounts)
            assert resource is Resource.LOSS or error.nearest[resource] == min(amounts)
            assert resource.show(error.nearest[resource]) in str(error)


@MANY
@given(limited(), RESOURCES)
def test_equals_brute_force(problem: Problem, objective: Resource) -> None:
    check(problem, objective, Rules(), lambda each: True)


@MANY
@given(limited(), RESOURCES, st.integers(1, 3))
def test_few_quantizers_equal_brute_force(problem: Problem, objective: Resource, most: int) -> None:
    check(problem, objective, Rules(most_quantizers=most), lambda each: len(set(each.choices.values())) <= most)


@MANY
@given(limited(), RESOURCES)
def test_the_same_quantizer_in_a_cluster_equals_brute_force(problem: Problem, objective: Resource) -> None:
    items, _, _ = problem
    clusters = [[site for item in items if len(item.sites) == 1 for site in item.sites if site.startswith(f"c{n}.")] for n in (0, 1)]
    rules = Rules(alike=[sites for sites in clusters if sites])
    check(problem, objective, rules, lambda each: all(len({each.choices[site] for site in sites}) <= 1 for sites in clusters))


@MANY
@given(limited(), RESOURCES, st.data())
def test_floors_equal_brute_force(problem: Problem, objective: Resource, data: st.DataObject) -> None:
    items, _, _ = problem
    tables = {item.sites[0]: [choice.quantizer for choice in item.choices] for item in items if len(item.sites) == 1}
    allowed, floors = {}, {}
    for site, quantizers in tables.items():
        if data.draw(st.booleans()):
            allowed[site] = data.draw(st.lists(st.sampled_from(quantizers), min_size=1, unique=True))
        elif data.draw(st.booleans()):
            floors[site] = data.draw(st.sampled_from(quantizers)).rate

    def legal(each: Possible) -> bool:
        return all(each.choices[site] in quantizers for site, quantizers in allowed.items()) and all(
            each.choices[site].rate >= rate for site, rate in floors.items()
        )

    check(problem, objective, Rules(allowed=allowed, least_rate=floors), legal)


def pair(saved_ps: int = 5, kept: bool = False) -> list[Item]:
    """Two linears and their group; bits 1 to 3."""
    costs = {bits: Cost(10 * bits, 2.0**-bits, 10 + bits) for bits in (1, 2, 3)}
    table = [Choice(ToyQuantizer(bits), cost) for bits, cost in costs.items()] + ([Choice(None, Cost(100, 0.0, 50))] if kept else [])
    double = [Choice(c.quantizer, c.cost + c.cost + Cost(0, 0.0, -saved_ps)) for c in table]
    return [Item(("a",), tuple(table)), Item(("b",), tuple(table)), Item(("a", "b"), tuple(double))]


def test_groups_are_taken_where_they_save_time_and_nobody_asked() -> None:
    assert solve(pair(), Limits(weight_bytes=40)).groups == (("a", "b"),)
    assert solve(pair(saved_ps=-5), Limits(weight_bytes=40)).groups == (("a",), ("b",))


def test_the_smallest_model_under_a_loss() -> None:
    found = solve(pair(), Limits(loss=0.75), objective=Resource.BYTES)
    assert found.cost.weight_bytes == 30
    assert found.cost.distortion == 0.75
    assert solve(pair(), Limits(loss=0.75), objective=Resource.LATENCY).cost.latency_ps == 2 * 12 - 5


def test_excluded_linears_stay_as_they_are() -> None:
    found = solve(pair(kept=True), Limits(), objective=Resource.BYTES, rules=Rules(excluded=("a",)))
    assert found.choices == {"a": None, "b": ToyQuantizer(1)}
    with pytest.raises(SolverError, match="a: the rules leave no quantizer"):
        solve(pair(), Limits(), rules=Rules(excluded=("a",)))


def test_what_stays_as_it_is_counts_as_no_quantizer() -> None:
    rules = Rules(excluded=("a",), most_quantizers=1)
    assert solve(pair(kept=True), Limits(weight_bytes=120), rules=rules).choices == {"a": None, "b": ToyQuantizer(2)}
    with pytest.raises(InfeasibleError, match="at most 0 distinct quantizers"):
        solve(pair(), Limits(), rules=Rules(most_quantizers=0))


def test_kept_linears_are_above_any_floor() -> None:
    rules = Rules(least_rate={"a": Fraction(9)})
    assert solve(pair(kept=True), Limits(), objective=Resource.BYTES, rules=rules).choices["a"] is None


def test_an_infeasible_combination_names_what_bites() -> None:
    with pytest.raises(InfeasibleError) as raised:
        solve(pair(), Limits(weight_bytes=25, latency_ps=16))
    assert raised.value.nearest == {Resource.LATENCY: 17}
    assert str(raised.value) == (
        "no allocation keeps 25 bytes and 16 ps: 16 ps is below the smallest feasible one of 17 ps, the other limits kept"
    )
    with pytest.raises(InfeasibleError, match="19 bytes is below the smallest feasible one of 20 bytes, even without other limits"):
        solve(pair(), Limits(weight_bytes=19, latency_ps=16))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(excluded=("c",)), "a rule names c"),
        (Rules(allowed={"b": (ToyQuantizer(7),)}), "b: the rules leave no quantizer"),
        (Rules(alike=(("a", "b"),), allowed={"a": (ToyQuantizer(1),), "b": (ToyQuantizer(2),)}), "must be alike"),
    ],
)
def test_rules_that_cannot_be_kept_name_the_linear(rules: Rules, message: str) -> None:
    with pytest.raises(SolverError, match=message):
        solve(pair(), Limits(), rules=rules)


def test_malformed_items_are_refused() -> None:
    choice = Choice(ToyQuantizer(1), Cost(1, 1.0))
    for sites, table in [((), (choice,)), (("a", "a"), (choice,)), (("a",), ()), (("a",), (Choice(None, Cost(-1, 0.0)),))]:
        with pytest.raises(SolverError):
            Item(sites, table)
    with pytest.raises(SolverError, match="nothing"):
        solve([], Limits())
    with pytest.raises(SolverError, match="occurs twice"):
        solve([Item(("a",), (choice, choice))], Limits())
    with pytest.raises(SolverError, match="2\\^53"):
        solve([Item(("a",), (Choice(None, Cost(1 << 53, 0.0)),))], Limits())
