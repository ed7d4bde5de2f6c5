"""Allocation against the clock: groups and quantizers chosen together, the limit kept, and no worse than choosing them apart."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.budget import Budget
from qpc.errors import BudgetError
from qpc.ir.annotation import FusionGroup, LinearShape
from qpc.ir.program import Program
from qpc.latency import Latency, LatencyModel, Roofline
from qpc.passes.allocate import Allocate
from qpc.passes.timed_items import Timing, fusible
from qpc.quant.quantizer import Quantizer
from qpc.solver import Allocation
from tests.families import PLAIN, plain_inputs
from tests.latency.tables import full, profile
from tests.passes.test_allocate import PALETTE, Attention, allocated, grouped, sensitivities
from tests.toy import ToyQuantizer

ROOFLINE = Roofline("toy", read_bytes_per_s=10**9, launch_ps=1_000_000)
SHAPES = {"q": LinearShape(128, 32), "k": LinearShape(64, 32), "v": LinearShape(64, 32), "o": LinearShape(64, 256)}


def program() -> Program:
    return grouped(Attention((128, 64, 64)), *plain_inputs())


def partitions() -> Iterator[list[tuple[str, ...]]]:
    """All ways to fuse q, k and v, and o by itself."""
    for parts in (["q", "k", "v"], ["qk", "v"], ["qv", "k"], ["kv", "q"], ["qkv"]):
        yield [*map(tuple, parts), ("o",)]


def time(model: LatencyModel, groups: list[tuple[str, ...]], chosen: dict[str, Quantizer]) -> int:
    return sum(model.group([SHAPES[site] for site in group], chosen[group[0]], 1).ps for group in groups)


@given(st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 100), st.booleans())
@settings(deadline=None, max_examples=25)
def test_no_plan_within_the_limit_is_better(weights: list[int], percent: int, same: bool) -> None:
    """Against all quantizers in all groupings."""
    given_ = sensitivities(**{name: float(weight) for name, weight in zip(SHAPES, weights, strict=True)})
    plans = []
    for quantizers in itertools.product(PALETTE.quantizers, repeat=4):
        chosen = dict(zip(SHAPES, quantizers, strict=True))
        if same and len({chosen[name] for name in "qkv"}) > 1:
            continue
        loss = sum(given_.values[name] * quantizer.distortion for name, quantizer in chosen.items())
        for groups in partitions():
            if all(len({chosen[site] for site in group}) == 1 for group in groups):
                plans.append((time(ROOFLINE, groups, chosen), loss))
    shortest, longest = min(plans)[0], max(plans)[0]
    limit_ps = shortest + (longest - shortest) * percent // 100
    step = Allocate(None, PALETTE, given_, same, may_keep=False, timing=Timing(ROOFLINE, limit_ps=limit_ps))
    made = program()
    sites = allocated(made, step)
    assert isinstance(made.allocation, Allocation)
    best = min(loss for ps, loss in plans if ps <= limit_ps)
    assert made.allocation.cost.distortion == pytest.approx(best, rel=1e-5)
    groups = list(dict.fromkeys(found.group.members for found in sites.values() if found.group))
    chosen = {name: found.quantizer for name, found in sites.items() if found.quantizer}
    assert time(ROOFLINE, groups, chosen) == made.allocation.cost.latency_ps <= limit_ps


@given(st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_fusing_with_the_choice_is_never_worse_than_after_it(weights: list[int], percent: int) -> None:
    given_ = sensitivities(**{name: float(weight) for name, weight in zip(SHAPES, weights, strict=True)})
    singles = [(name,) for name in SHAPES]
    bounds = [time(ROOFLINE, singles, dict.fromkeys(SHAPES, PALETTE.quantizers[index])) for index in (0, -1)]
    limit_ps = bounds[0] + (bounds[1] - bounds[0]) * percent // 100
    losses = []
    for fuse in (True, False):
        made = program()
        timing = Timing(ROOFLINE, limit_ps=limit_ps, fuse=fuse)
        allocated(made, Allocate(None, PALETTE, given_, may_keep=False, timing=timing))
        assert isinstance(made.allocation, Allocation) and made.allocation.cost.latency_ps <= limit_ps
        losses.append(made.allocation.cost.distortion)
    assert losses[0] <= losses[1] * (1 + 1e-6)


def test_launches_alone_can_decide() -> None:
    """Where there is no time for three launches, the group runs as one."""
    limit_ps = time(ROOFLINE, [("q", "k", "v"), ("o",)], dict.fromkeys(SHAPES, ToyQuantizer(3)))
    sites = allocated(program(), Allocate(None, PALETTE, None, may_keep=False, timing=Timing(ROOFLINE, limit_ps=limit_ps)))
    assert sites["q"].group is not None and sites["q"].group.members == ("q", "k", "v")


def test_bytes_and_time_hold_together() -> None:
    budget, limit_ps = Budget.of(4), time(ROOFLINE, [("q", "k", "v"), ("o",)], dict.fromkeys(SHAPES, ToyQuantizer(3)))
    made = program()
    allocated(made, Allocate(budget, PALETTE, may_keep=False, timing=Timing(ROOFLINE, limit_ps=limit_ps)))
    assert isinstance(made.allocation, Allocation)
    assert made.allocation.cost.latency_ps <= limit_ps
    assert made.allocation.cost.weight_bytes * 8 <= 4 * sum(shape.weights for shape in SHAPES.values())
    with pytest.raises(BudgetError, match="ps"):
        allocated(program(), Allocate(budget, PALETTE, may_keep=False, timing=Timing(ROOFLINE, limit_ps=1)))


@pytest.mark.parametrize("name", ["twice", "shared"])
def test_a_weight_that_is_applied_twice_takes_twice_the_time(name: str) -> None:
    made = grouped(PLAIN[name](), *plain_inputs())
    sites = allocated(made, Allocate(None, PALETTE, may_keep=False, timing=Timing(ROOFLINE)))
    assert isinstance(made.allocation, Allocation)
    (shape,) = {found.site.shape for found in sites.values() if found.site}
    assert made.allocation.cost.latency_ps == len(list(made.linears())) * ROOFLINE.latency(shape, ToyQuantizer(5), 1).ps


def test_estimates_are_remarked_once_for_each_reason() -> None:
    made = program()
    allocated(made, Allocate(None, PALETTE, may_keep=False, timing=Timing(ROOFLINE)))
    (remark,) = [remark for remark in made.remarks if "estimate" in remark.reason]
    assert "roofline of toy" in remark.reason and remark.subject.endswith("and 1 more")


def test_a_table_is_a_model_too() -> None:
    made = program()
    allocated(made, Allocate(None, PALETTE, may_keep=False, timing=Timing(profile(full()))))
    assert isinstance(made.allocation, Allocation) and made.allocation.cost.latency_ps > 0
    assert any("not between times measured on NVIDIA Toy" in remark.reason for remark in made.remarks)


def test_only_the_last_of_a_group_may_end_within_a_block() -> None:
    group = FusionGroup(("a", "b", "c"), "x", (LinearShape(64, 8), LinearShape(40, 8), LinearShape(128, 8)))
    assert {found.members for found in fusible(group)} == {("a", "b"), ("a", "c")}


def test_latencies_add_with_their_reasons() -> None:
    assert Latency(1, ("a", "b")) + Latency(2, ("b", "c")) == Latency(3, ("a", "b", "c"))
