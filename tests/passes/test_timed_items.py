"""Allocation against the clock: groups and quantizers chosen together, the limit kept, and no worse than choosing them apart."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.budget import Budget
from qpc.cost import Weight
from qpc.errors import BudgetError
from qpc.ir.annotation import Annotation, FusionGroup, LinearShape, annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.latency import Latency, LatencyModel, Roofline
from qpc.passes.allocate import TIMED_GAP, Allocate
from qpc.passes.timed_items import Timing, fusible
from qpc.quant.quantizer import Quantizer
from qpc.solver import Allocation
from tests.families import PLAIN, plain_inputs
from tests.latency.tables import full, profile
from tests.passes.test_allocate import PALETTE, Attention, allocated, grouped, sensitivities
from tests.toy import ToyQuantizer

ROOFLINE = Roofline("toy", read_bytes_per_s=10**9, launch_ps=1_000_000)
SHAPES = {"q": LinearShape(128, 32), "k": LinearShape(64, 32), "v": LinearShape(64, 32), "o": LinearShape(64, 256)}


def within(limit_ps: int, **limits: Any) -> Budget:
    """A limit on time to the picosecond, and others."""
    return Budget(**limits, seconds_per_token=Fraction(limit_ps, 10**12))


def program() -> Program:
    return grouped(Attention((128, 64, 64)), *plain_inputs())


def partitions() -> Iterator[list[tuple[str, ...]]]:
    """All ways to fuse q, k and v, and o by itself."""
    for parts in (["q", "k", "v"], ["qk", "v"], ["qv", "k"], ["kv", "q"], ["qkv"]):
        yield [*map(tuple, parts), ("o",)]


def time(model: LatencyModel, groups: list[tuple[str, ...]], chosen: dict[str, Quantizer]) -> int:
    return sum(model.group([SHAPES[site] for site in group], chosen[group[0]], 1).ps for group in groups)


@given(st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 100), st.booleans())
@settings(max_examples=25)
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
    step = Allocate(within(limit_ps), PALETTE, given_, same, may_keep=False, timing=Timing(ROOFLINE))
    made = program()
    sites = allocated(made, step)
    assert isinstance(made.allocation, Allocation)
    best = min(loss for ps, loss in plans if ps <= limit_ps)
    assert best <= made.allocation.cost.distortion * (1 + 1e-9) <= best * (1 + 2 * TIMED_GAP)
    groups = list(dict.fromkeys(found.group.members for found in sites.values() if found.group))
    chosen = {name: found.quantizer for name, found in sites.items() if found.quantizer}
    assert time(ROOFLINE, groups, chosen) == made.allocation.cost.latency_ps <= limit_ps


@given(st.lists(st.integers(1, 20), min_size=4, max_size=4), st.integers(0, 100))
@settings(max_examples=25)
def test_fusing_with_the_choice_is_never_worse_than_after_it(weights: list[int], percent: int) -> None:
    given_ = sensitivities(**{name: float(weight) for name, weight in zip(SHAPES, weights, strict=True)})
    singles = [(name,) for name in SHAPES]
    bounds = [time(ROOFLINE, singles, dict.fromkeys(SHAPES, PALETTE.quantizers[index])) for index in (0, -1)]
    limit_ps = bounds[0] + (bounds[1] - bounds[0]) * percent // 100
    losses = []
    for fuse in (True, False):
        made = program()
        allocated(made, Allocate(within(limit_ps), PALETTE, given_, may_keep=False, timing=Timing(ROOFLINE, fuse=fuse)))
        assert isinstance(made.allocation, Allocation) and made.allocation.cost.latency_ps <= limit_ps
        losses.append(made.allocation.cost.distortion)
    assert losses[0] <= losses[1] * (1 + TIMED_GAP)


@pytest.mark.parametrize("same", [False, True])
def test_times_do_not_change_an_allocation_that_they_do_not_limit(same: bool) -> None:
    given_ = sensitivities(q=0.3, k=0.3, v=9.0, o=1.0)
    for budget in (None, Budget.of(4), Budget.parse("4bit, 2nats")):
        timed, untimed = program(), program()
        sites = allocated(timed, Allocate(budget, PALETTE, given_, same, timing=Timing(ROOFLINE)))
        assert {name: found.quantizer for name, found in sites.items()} == {
            name: found.quantizer for name, found in allocated(untimed, Allocate(budget, PALETTE, given_, same)).items()
        }
        assert isinstance(timed.allocation, Allocation)
        chosen = {name: found.quantizer for name, found in sites.items() if found.quantizer}
        if len(chosen) == len(SHAPES):
            least = min(time(ROOFLINE, groups, chosen) for groups in partitions() if all(len({chosen[s] for s in g}) == 1 for g in groups))
            assert timed.allocation.cost.latency_ps == least


@pytest.mark.parametrize("timing", [None, Timing(ROOFLINE)], ids=["untimed", "timed"])
def test_what_feedback_leaves_counts_like_sensitivity(timing: Timing | None) -> None:
    given_, shares = sensitivities(q=1.0, k=1.0, v=1.0, o=4.0), {"q": 0.9, "k": 0.9, "v": 0.9, "o": 0.01}
    limits = {"bits_per_weight": Fraction(7, 2)} if timing is None else {"seconds_per_token": Fraction(16, 10**6)}
    shared, scaled = program(), program()
    for node in shared.linears():
        annotate(node, annotation(node).but(share=shares[site_of(node).name]))
    felt = sensitivities(**{name: value * shares[name] for name, value in given_.values.items()})
    chosen = [
        {name: found.quantizer for name, found in allocated(made, Allocate(Budget(**limits), PALETTE, values, timing=timing)).items()}
        for made, values in ((shared, given_), (scaled, felt), (program(), given_))
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert shared.allocation == scaled.allocation


def test_what_stays_takes_as_much_longer_as_it_has_more_bytes() -> None:
    shape = LinearShape(64, 256)
    times = {each: Timing(ROOFLINE).latency([Weight(shape, kept_bytes=each * shape.weights)], None) for each in (1, 2, 4)}
    assert times[1] == times[2] == ROOFLINE.latency(shape, None, 1)
    assert times[4].ps == 2 * times[2].ps and len(times[4].estimates) == len(times[2].estimates) + 1
    quantizer = ToyQuantizer(3)
    assert Timing(ROOFLINE).latency([Weight(shape, kept_bytes=4 * shape.weights)], quantizer) == ROOFLINE.latency(shape, quantizer, 1)


def test_launches_alone_can_decide() -> None:
    """Where there is no time for three launches, the group runs as one."""
    limit_ps = time(ROOFLINE, [("q", "k", "v"), ("o",)], dict.fromkeys(SHAPES, ToyQuantizer(3)))
    sites = allocated(program(), Allocate(within(limit_ps), PALETTE, None, may_keep=False, timing=Timing(ROOFLINE)))
    assert sites["q"].group is not None and sites["q"].group.members == ("q", "k", "v")


def test_bytes_and_time_hold_together() -> None:
    limit_ps, rate = time(ROOFLINE, [("q", "k", "v"), ("o",)], dict.fromkeys(SHAPES, ToyQuantizer(3))), Fraction(4)
    made = program()
    allocated(made, Allocate(within(limit_ps, bits_per_weight=rate), PALETTE, may_keep=False, timing=Timing(ROOFLINE)))
    assert isinstance(made.allocation, Allocation)
    assert made.allocation.cost.latency_ps <= limit_ps
    assert made.allocation.cost.weight_bytes * 8 <= 4 * sum(shape.weights for shape in SHAPES.values())


LEAST = Budget(Fraction(1), 1, Fraction(1, 10**6), Fraction(1, 10**9))


@given(
    st.lists(st.sampled_from(list(LEAST.limits)), min_size=1, max_size=4, unique=True), st.lists(st.integers(1, 60), min_size=4, max_size=4)
)
@settings(max_examples=25)
def test_every_budget_that_a_refusal_names_can_be_kept(names: list[str], factors: list[int]) -> None:
    """Each with the limits that the message puts before it."""
    scaled = {name: factor * value for (name, value), factor in zip(LEAST.limits.items(), factors, strict=True)}
    budget = Budget(**{name: scaled[name] for name in names})  # type: ignore[arg-type]

    def attempt(each: Budget) -> None:
        allocated(program(), Allocate(each, PALETTE, sensitivities(**dict.fromkeys(SHAPES, 1.0)), may_keep=False, timing=Timing(ROOFLINE)))

    try:
        attempt(budget)
    except BudgetError as error:
        text = str(error).split("\n")[0]
        apart = "on its own" in text
        named = re.findall(r"(?:with ([^;]*?) )?the (?:least|smallest) feasible [a-zA-Z ]* is ([^;]*)", text)
        assert named, text
        for rest, values in named:
            assert bool(rest) == (not apart and len({name.replace("total_bytes", "bits_per_weight") for name in names}) > 1)
            for value in values.split(" or "):
                attempt(Budget.parse(", ".join(filter(None, (rest, value.split(" (")[0])))))


def test_a_time_needs_a_model_of_its_batch() -> None:
    for timing in (None, Timing(ROOFLINE, batch=2)):
        with pytest.raises(BudgetError, match="at batch 1 predicts"):
            allocated(program(), Allocate(Budget.parse("1s"), PALETTE, timing=timing))


@pytest.mark.parametrize("name", ["twice", "shared"])
def test_a_weight_that_is_applied_twice_takes_twice_the_time(name: str) -> None:
    made = grouped(PLAIN[name](), *plain_inputs())
    sites = allocated(made, Allocate(None, PALETTE, may_keep=False, timing=Timing(ROOFLINE)))
    assert isinstance(made.allocation, Allocation)
    (shape,) = {found.site.shape for found in sites.values() if found.site}
    assert made.allocation.cost.latency_ps == len(list(made.linears())) * ROOFLINE.latency(shape, ToyQuantizer(5), 1).ps


@pytest.mark.parametrize("name", ["twice", "shared", "siblings", "mlp"])
def test_times_of_linears_add_up(name: str) -> None:
    made = grouped(PLAIN[name](), *plain_inputs())
    sites = allocated(made, Allocate(None, PALETTE, may_keep=False, timing=Timing(ROOFLINE, batch=2)))
    assert isinstance(made.allocation, Allocation)
    assert sum(found.latency_ps or 0.0 for found in sites.values()) == pytest.approx(made.allocation.cost.latency_ps, rel=1e-12)
    applied = Counter(site_of(node).name for node in made.linears())
    for site, found in sites.items():
        assert found.site is not None
        alone = Timing(ROOFLINE, batch=2).latency([Weight(found.site.shape, kept_bytes=4 * found.site.shape.weights)], None).ps
        assert found.kept_latency_ps == applied[site] * alone
        assert found.group is not None and (len(found.group.members) > 1 or found.latency_ps == applied[site] * latency(found))
    untimed = grouped(PLAIN[name](), *plain_inputs())
    assert all(found.latency_ps is None for found in allocated(untimed, Allocate(None, PALETTE, may_keep=False)).values())


def latency(found: Annotation) -> int:
    assert found.site is not None and found.quantizer is not None
    return ROOFLINE.latency(found.site.shape, found.quantizer, 2).ps


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
