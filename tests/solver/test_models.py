"""Whole models: the gap that is asked for in seconds, limits kept, gaps honest where the search is stopped."""

import pytest

from benchmarks.allocation import GROUPS, MODELS, items_of
from qpc.solver import Allocation, InfeasibleError, Item, Limits, Resource, Rules, Status, solve
from tests.solver.instances import PATIENCE_S, cost_of, keeps, solved_in

SMALL, LARGE = MODELS


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Llama-3.1-8B: all groups, 80 quantizers."""
    return items_of(SMALL, seed=3)


def limits_of(bits: float, share: float) -> Limits:
    """Bytes of a rate; time of all linears at that rate, fused, times a share."""
    size = bits / 8 * SMALL.layers * sum(out * into for out, into in SMALL.linears.values())
    return Limits(int(size), int(share * (size / 2.85 + SMALL.layers * 4 * 5e6)))


@pytest.mark.parametrize(("bits", "share"), [(2.5, 1.05), (3.25, 0.97), (3.25, 1.0), (4.5, 1.02)])
def test_two_limits_to_a_twentieth_of_a_percent(items: list[Item], bits: float, share: float) -> None:
    limits = limits_of(bits, share)
    found = solved_in(4, items, limits, attempts=3, relative_gap=5e-4)
    assert found.status is Status.OPTIMAL
    assert 0 <= found.gap <= 5e-4
    assert cost_of(items, found) == found.cost
    assert keeps(found.cost, limits)


def test_the_largest_model_takes_seconds() -> None:
    items = items_of(LARGE, seed=3)
    size = int(3.25 / 8 * LARGE.layers * sum(out * into for out, into in LARGE.linears.values()))
    limits = Limits(size, int(size / 2.85 + LARGE.layers * 4 * 5e6))
    found = solved_in(10, items, limits)
    assert found.gap <= 1e-4
    assert cost_of(items, found) == found.cost
    assert keeps(found.cost, limits)


def test_groups_lose_less_at_the_same_time_per_token(items: list[Item]) -> None:
    limits = Limits(latency_ps=limits_of(3.25, 1.05).latency_ps)
    alone = solve([item for item in items if len(item.sites) == 1], limits)
    assert solve(items, limits).cost.distortion < alone.lower_bound


def test_bounds_hold_when_the_search_is_stopped(items: list[Item]) -> None:
    limits = limits_of(3.25, 1.0)
    hurried, better = solve(items, limits, relative_gap=0.0, time_limit_s=0.0), solve(items, limits)
    assert hurried.status is Status.TIME_LIMIT
    assert keeps(hurried.cost, limits)
    assert hurried.lower_bound <= better.cost.distortion <= hurried.cost.distortion
    assert better.lower_bound <= hurried.cost.distortion


def test_rules_cost_what_they_must(items: list[Item]) -> None:
    limits = limits_of(3.25, 1.0)
    groups = [[f"layers.{layer}.{name}" for name in group] for layer in range(SMALL.layers) for group in GROUPS]
    free = solve(items, limits)
    alike = solve(items, limits, rules=Rules(alike=groups), relative_gap=5e-4)
    assert free.lower_bound <= alike.cost.distortion
    assert all(len({alike.choices[site] for site in group}) == 1 for group in groups)
    few = [solve(items, limits, rules=Rules(most_quantizers=most), relative_gap=0.02, time_limit_s=PATIENCE_S) for most in (8, 3)]
    for most, found in zip((8, 3), few, strict=True):
        assert len(set(found.choices.values())) <= most
        assert keeps(found.cost, limits)
        assert free.lower_bound <= found.lower_bound <= found.cost.distortion
        assert found.gap < 0.03
    check_order([free, *few])


def check_order(found: list[Allocation]) -> None:
    """Each bound lies below the losses of all that are more restricted."""
    for index, wide in enumerate(found):
        assert all(wide.lower_bound <= narrow.cost.distortion for narrow in found[index:])


@pytest.mark.parametrize("objective", [Resource.BYTES, Resource.LATENCY])
def test_the_least_model_under_a_loss(items: list[Item], objective: Resource) -> None:
    found = solve(items, Limits(loss=0.01), objective=objective)
    assert found.cost.distortion <= 0.01
    assert found.gap <= 1e-4
    limits = Limits(**{"weight_bytes" if objective is Resource.BYTES else "latency_ps": int(objective.of(found.cost) * 0.999)})
    assert solve(items, limits).lower_bound > 0.01


def test_the_nearest_feasible_limit_is_feasible_and_one_less_is_not(items: list[Item]) -> None:
    size, latency_ps = limits_of(3.25, 1.0).weight_bytes, limits_of(3.25, 1.0).latency_ps
    assert size is not None
    with pytest.raises(InfeasibleError) as raised:
        solve(items, Limits(size // 4, latency_ps))
    assert list(raised.value.nearest) == [Resource.BYTES]
    nearest = int(raised.value.nearest[Resource.BYTES])
    assert solve(items, Limits(nearest, latency_ps)).cost.weight_bytes == nearest
    with pytest.raises(InfeasibleError, match=f"{nearest - 1} bytes is below the smallest feasible one of {nearest} bytes"):
        solve(items, Limits(nearest - 1, latency_ps))


def test_a_nearest_value_that_is_not_proven_says_so(items: list[Item]) -> None:
    limits = limits_of(3.25, 1.0)
    with pytest.raises(InfeasibleError, match="the smallest that was found; it is proven to be at least") as raised:
        solve(items, Limits(limits.weight_bytes, limits.latency_ps, 0.001), time_limit_s=0.0)
    assert keeps(solve(items, limits).cost, Limits(loss=raised.value.nearest[Resource.LOSS]))
