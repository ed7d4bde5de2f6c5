"""Small problems, and all of their allocations one by one."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from qpc.cost import Choice, Cost
from qpc.quant.quantizer import Quantizer
from qpc.solver import Allocation, Item, Limits, Resource, solve
from tests.toy import ToyQuantizer

MOST_ALLOCATIONS = 20_000
PATIENCE_S = 60.0
"""A limit of time that is met on a slow machine too."""


@dataclass(frozen=True)
class Possible:
    """One allocation of a problem."""

    cost: Cost
    choices: Mapping[str, Quantizer | None]


def every(items: Sequence[Item]) -> list[Possible]:
    """All allocations: each site covered once."""

    def covers(left: tuple[str, ...]) -> Iterator[tuple[list[Cost], dict[str, Quantizer | None]]]:
        if not left:
            yield [], {}
            return
        for item in items:
            if left[0] in item.sites and set(item.sites) <= set(left):
                rest = tuple(site for site in left if site not in item.sites)
                for costs, chosen in covers(rest):
                    for choice in item.choices:
                        yield [choice.cost, *costs], chosen | dict.fromkeys(item.sites, choice.quantizer)

    found = covers(tuple(dict.fromkeys(site for item in items for site in item.sites)))
    return [Possible(total(costs), chosen) for costs, chosen in found]


def total(costs: Sequence[Cost]) -> Cost:
    """The sum, the loss rounded once."""
    return Cost(sum(c.weight_bytes for c in costs), math.fsum(c.distortion for c in costs), sum(c.latency_ps for c in costs))


def keeps(cost: Cost, limits: Limits) -> bool:
    """Whether all limits are kept."""
    return all(resource.of(cost) <= limit for resource, limit in limits.given.items())


def cost_of(items: Sequence[Item], found: Allocation) -> Cost:
    """What an allocation costs, from the items alone; each site is covered once, and by one quantizer in each group."""
    assert sorted(site for group in found.groups for site in group) == sorted(found.choices)
    assert set(found.choices) == {site for item in items for site in item.sites}
    costs = []
    for group in found.groups:
        (quantizer,) = {found.choices[site] for site in group}
        costs.append(next(c.cost for item in items if item.sites == group for c in item.choices if c.quantizer == quantizer))
    return total(costs)


@st.composite
def cluster(draw: st.DrawFn, name: str, sites: int) -> list[Item]:
    """Linears that may be fused, as singles and in some of their subsets; fusing saves time, and sometimes does not."""
    names = [f"{name}.{index}" for index in range(sites)]
    bits = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
    loss = st.one_of(st.integers(0, 10 << 20).map(lambda n: math.ldexp(n, -20)), st.integers(0, 4).map(float))  # sums are exact
    cost = st.builds(Cost, st.integers(0, 40), loss, st.integers(0, 30))
    single = {site: {b: draw(cost) for b in bits} for site in names}
    items = []
    for count in range(1, sites + 1):
        for subset in itertools.combinations(names, count):
            if count == 1 or draw(st.booleans()):
                saved = 0 if count == 1 else draw(st.integers(-2, 12))
                sums = {b: sum((single[site][b] for site in subset), start=Cost(0, 0.0)) for b in bits}
                table = [Choice(ToyQuantizer(b), Cost(c.weight_bytes, c.distortion, max(0, c.latency_ps - saved))) for b, c in sums.items()]
                items.append(Item(subset, tuple(table)))
    return items


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], list[Possible]]:
    """The items of one to three clusters, and every allocation."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (1, 1, 1), (1, 1, 2), (1, 2, 2)]))
    items = [item for index, sites in enumerate(sizes) for item in draw(cluster(f"c{index}", sites))]
    possible = every(items)
    assert len(possible) <= MOST_ALLOCATIONS
    return items, possible


@st.composite
def limited(draw: st.DrawFn) -> tuple[list[Item], list[Possible], Limits]:
    """A problem with limits near those of one of its allocations: some are kept by few, some by none."""
    items, possible = draw(problems())
    near = draw(st.sampled_from(possible)).cost
    given = draw(st.sets(st.sampled_from(list(Resource))))
    offset = st.integers(-5, 5)
    limits = Limits(
        near.weight_bytes + draw(offset) if Resource.BYTES in given else None,
        near.latency_ps + draw(offset) if Resource.LATENCY in given else None,
        near.distortion * draw(st.sampled_from((0.9, 1.0, 1.1))) if Resource.LOSS in given else None,
    )
    return items, possible, limits


def solved_in(cpu_s: float, items: Sequence[Item], limits: Limits, attempts: int = 1, **options: Any) -> Allocation:
    """The allocation, and that it takes less than these seconds of a core: in the quickest attempt, since a core that others use is slower.

    For the same reason the clock on the wall stops the search late.
    """
    for _ in range(attempts):
        started_s = time.process_time()
        found = solve(items, limits, time_limit_s=PATIENCE_S, **options)
        elapsed_s = time.process_time() - started_s
        if elapsed_s < cpu_s:
            return found
    raise AssertionError(f"{elapsed_s:.1f} s, required less than {cpu_s} s")
