"""Budgets: parsing and printing are inverse, and a feasible budget named by an error is feasible."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpc.budget import BYTE_UNITS, MOST_IN_RANGE, SPEED_UNITS, TIME_UNITS, Budget, rates, times
from qpc.errors import BudgetError

RATES = st.fractions(min_value=Fraction(1, 1000), max_value=64)
LOSSES = st.one_of(st.fractions(min_value=Fraction(1, 10**9), max_value=10), st.floats(1e-9, 10).map(Fraction))
TIMES = st.one_of(
    st.fractions(min_value=Fraction(1, 10**9), max_value=10),
    st.integers(1, 10**13).map(lambda ps: Fraction(ps, 10**12)),
    st.integers(1, 10**6).map(lambda speed: Fraction(1, speed)),
)
SIZES = st.integers(min_value=1, max_value=1 << 50)
REFUSED = ("", "abc", "nan", "inf", "0", "-3", "0MB", "3.25.1", "1/0", "3,", "3bit,4bit", "1e999999999", "\N{SUPERSCRIPT THREE}", "0.5B")
REFUSED += ("0ms", "-3ms", "0tok/s", "3ms@0", "3ms@-1", "3ms@", "@8", "3ms@8.5", "3bit@8", "80MB@8", "3ms, 300tok/s", "3bit/s", "3ms/s")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("3.25", Budget(bits_per_weight=Fraction(13, 4))),
        ("3.25bit", Budget(bits_per_weight=Fraction(13, 4))),
        ("4 bits", Budget(bits_per_weight=Fraction(4))),
        ("13/4", Budget(bits_per_weight=Fraction(13, 4))),
        (" .5 ", Budget(bits_per_weight=Fraction(1, 2))),
        ("4.2GiB", Budget(total_bytes=4509715660)),
        ("80MB", Budget(total_bytes=80_000_000)),
        ("90000000B", Budget(total_bytes=90_000_000)),
        ("3bit, 1 GiB", Budget(bits_per_weight=Fraction(3), total_bytes=1 << 30)),
        ("0.1 nats", Budget(kl_nats=Fraction(1, 10))),
        ("1/3nat, 4bit", Budget(bits_per_weight=Fraction(4), kl_nats=Fraction(1, 3))),
        ("3ms", Budget(seconds_per_token=Fraction(3, 1000))),
        ("250 us", Budget(seconds_per_token=Fraction(1, 4000))),
        ("3ms@8", Budget(seconds_per_token=Fraction(3, 1000), batch=8)),
        ("300tok/s", Budget(seconds_per_token=Fraction(1, 300))),
        ("2000 tokens/s @ 8", Budget(seconds_per_token=Fraction(1, 250), batch=8)),
        ("4bit, 1/3s@2, 80MB", Budget(Fraction(4), 80_000_000, seconds_per_token=Fraction(1, 3), batch=2)),
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == Budget.of(text) == budget


@given(*(st.one_of(st.none(), limits) for limits in (RATES, SIZES, LOSSES, TIMES)), st.integers(1, 1000))
def test_print_then_parse_is_the_identity(
    rate: Fraction | None, size: int | None, kl: Fraction | None, time: Fraction | None, batch: int
) -> None:
    if rate is None and size is None and kl is None and time is None:
        with pytest.raises(BudgetError, match="at least one limit"):
            Budget()
        return
    budget = Budget(rate, size, kl, time, 1 if time is None else batch)
    assert Budget.parse(str(budget)) == budget
    assert len(budget.limits) == 4 - [rate, size, kl, time].count(None)


@pytest.mark.parametrize("text", ["3ms", "0.25ms@8", "300tok/s", "7tok/s@3", "7/3ms", "4bit, 80MB, 0.1nats, 3ms@8"])
def test_what_is_printed_reads_as_it_was_written(text: str) -> None:
    assert str(Budget.parse(text)) == text


@given(TIMES)
def test_the_limit_on_time_is_the_largest_picosecond_within_it(seconds: Fraction) -> None:
    limit = Budget(seconds_per_token=seconds).latency_ps
    assert limit is not None and limit <= seconds * 10**12 < limit + 1
    assert Budget(bits_per_weight=Fraction(3)).latency_ps is None


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_a_float_means_the_decimal_that_it_prints(value: float) -> None:
    assert Budget.of(value).bits_per_weight == Fraction(repr(value))


def test_of_takes_numbers_of_every_kind() -> None:
    expected = Budget(bits_per_weight=Fraction(3))
    assert Budget.of(3) == Budget.of(3.0) == Budget.of("3") == Budget.of(Fraction(3)) == Budget.of(expected) == expected
    assert Budget.of(3.3).bits_per_weight == Fraction(33, 10)


@pytest.mark.parametrize(
    "value",
    (True, False, None, [3], 0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf, Fraction(0), 3j, *REFUSED),
)
def test_what_is_no_budget_is_refused(value: Any) -> None:
    with pytest.raises(BudgetError):
        Budget.of(value)


def test_an_unknown_unit_lists_the_known_ones() -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse("3 parsecs")
    assert "parsecs" in str(error.value)
    assert all(unit in str(error.value) for unit in (*BYTE_UNITS, "bit", "nats", *TIME_UNITS, *SPEED_UNITS))


def test_a_batch_belongs_to_a_time() -> None:
    with pytest.raises(BudgetError, match="'3ms@8'"):
        Budget(bits_per_weight=Fraction(3), batch=8)
    with pytest.raises(BudgetError, match="batch=0"):
        Budget(seconds_per_token=Fraction(1), batch=0)


@given(RATES, SIZES, st.integers(1, 10**9), st.integers(0, 10**9))
def test_limits_hold_together_and_are_never_exceeded(rate: Fraction, size: int, weights: int, other: int) -> None:
    room = Budget(rate, size).weight_bytes(weights, other)
    assert room == min(Budget(bits_per_weight=rate).weight_bytes(weights, other), Budget(total_bytes=size).weight_bytes(weights, other))
    assert Fraction(8 * room, weights) <= rate
    assert room + other <= size


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(0, 10**9))
def test_the_smallest_feasible_budget_is_feasible_and_named(smallest: int, weights: int, other: int) -> None:
    just_below = Budget(bits_per_weight=Fraction(8 * smallest, weights) * Fraction(99, 100)), Budget(total_bytes=smallest + other - 1 or 1)
    for budget in just_below:
        if smallest <= budget.weight_bytes(weights, other):
            continue
        named = str(budget.refusal(weights, other, least_bytes=smallest)).split("smallest feasible one is ")[1]
        rate, total = named.split(" (")[0], named.split(" or ")[1].split(" (")[0]
        for feasible in (Budget.parse(rate), Budget.parse(total)):
            assert smallest <= feasible.weight_bytes(weights, other)  # type: ignore[operator]
        assert Budget.parse(total).total_bytes == smallest + other
        assert Budget.parse(rate).bits_per_weight <= Fraction(8 * smallest, weights) + Fraction(1, 10_000)  # type: ignore[operator]


@given(LOSSES)
def test_the_limit_on_loss_is_the_largest_float_within_it(kl: Fraction) -> None:
    limit = Budget(kl_nats=kl).loss
    assert limit is not None
    assert Fraction(limit) <= kl < Fraction(math.nextafter(limit, math.inf))


@given(st.floats(1e-9, 10), st.integers(1, 10**9), st.integers(0, 10**9))
def test_a_refused_loss_names_feasible_budgets(kl: float, smallest: int, other: int) -> None:
    budget = Budget(bits_per_weight=Fraction(1, 100), kl_nats=Fraction(1, 10**10))
    text = str(budget.refusal(1000, other, least_bytes=smallest, least_kl=kl))
    named = Budget.parse(text.split("least feasible KL is ")[1])
    assert named.loss is not None and kl <= named.loss <= 1.0011 * kl
    sizes = text.split("smallest feasible size is ")[1].split("; ")[0]
    for part in sizes.split(" or "):
        room = Budget.parse(part.split(" (")[0]).weight_bytes(1000, other)
        assert room is not None and smallest <= room
    assert f"with {replace(budget, kl_nats=None)} " in text and "with 0.0000000001nats " in text


@given(st.integers(1, 10**13), st.integers(1, 64))
def test_a_refused_time_names_a_feasible_one(least_ps: int, batch: int) -> None:
    budget = Budget.parse(f"0.000000001ms@{batch}")
    text = str(budget.refusal(1000, 0, least_ps=least_ps))
    named = Budget.parse(text.split("least feasible time of the linears is ")[1])
    assert named.latency_ps is not None and least_ps <= named.latency_ps <= 1.0011 * least_ps + 1
    assert named.batch == batch and "with" not in text


def test_every_limit_that_bites_is_named_with_the_others() -> None:
    budget = Budget.parse("3bit, 0.1nats, 2ms@8")
    text = str(budget.refusal(1000, 24, least_bytes=400, least_kl=0.2, least_ps=2_123_456_789))
    assert "with 0.1nats, 2ms@8 the smallest feasible size is 3.2bit (linears alone, 400 bytes) or 424B" in text
    assert "with 3bit, 2ms@8 the least feasible KL is 0.2001nats" in text
    assert "with 3bit, 0.1nats the least feasible time of the linears is 2.124ms@8" in text
    apart = str(budget.refusal(1000, 24, least_bytes=400, least_ps=2_123_456_789, apart=True))
    assert "each limit is out of reach on its own: the smallest feasible size is" in apart and "with" not in apart
    assert "no limit can be mended alone" in str(budget.refusal(1000, 24))


@given(RATES, RATES, st.fractions(min_value=Fraction(1, 100), max_value=4))
def test_a_range_steps_from_end_to_end(first: Fraction, last: Fraction, step: Fraction) -> None:
    text = f"{first}..{last}"
    if first > last or (last - first) / step > MOST_IN_RANGE - 1:
        with pytest.raises(BudgetError, match=r"range|larger steps"):
            rates(text, str(step))
        return
    found = [budget.bits_per_weight for budget in rates(text, str(step))]
    assert (found[0], found[-1]) == (first, last)
    widths = [high - low for low, high in pairwise(found)]  # type: ignore[operator]
    assert all(width == step for width in widths[:-1]) and all(0 < width <= step for width in widths)


def test_ranges() -> None:
    assert rates("2.5..4.5", "0.5") == tuple(Budget.of(Fraction(half, 2)) for half in range(5, 10))
    assert rates("3", "0.5") == (Budget.of(3),)
    for text, step in (
        ("2..", "1"),
        ("..", "1"),
        ("2..3..4", "1"),
        ("2..80MB", "1"),
        ("2..3", "0"),
        ("2..3", "-1"),
        ("2..3", "1MB"),
        ("4..2", "1"),
    ):
        with pytest.raises(BudgetError):
            rates(text, step)


def test_ranges_of_times() -> None:
    assert [str(budget) for budget in times("2ms..4ms@8", "0.5ms")] == ["2ms@8", "2.5ms@8", "3ms@8", "3.5ms@8", "4ms@8"]
    assert len(times("2ms..4ms", None)) == 9
    assert times("3ms@2", None) == (Budget.parse("3ms@2"),)
    assert times("500tok/s..250tok/s", "1ms") == times("2ms..4ms", "1ms") == times("4ms..2ms", "1ms")
    for text, step in (
        ("2ms..", None),
        ("2ms..3ms..4ms", None),
        ("2ms..3bit", None),
        ("2..3", None),
        ("2ms..3ms", "1"),
        ("2ms..3ms", "1us"),
    ):
        with pytest.raises(BudgetError):
            times(text, step)
