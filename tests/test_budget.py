"""Budgets: parsing and printing are inverse, and a feasible budget named by an error is feasible."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpc.budget import BYTE_UNITS, MOST_RATES, Budget, rates
from qpc.errors import BudgetError

RATES = st.fractions(min_value=Fraction(1, 1000), max_value=64)
LOSSES = st.one_of(st.fractions(min_value=Fraction(1, 10**9), max_value=10), st.floats(1e-9, 10).map(Fraction))
SIZES = st.integers(min_value=1, max_value=1 << 50)
REFUSED = ("", "abc", "nan", "inf", "0", "-3", "0MB", "3.25.1", "1/0", "3,", "3bit,4bit", "1e999999999", "\N{SUPERSCRIPT THREE}", "0.5B")


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
    ],
)
def test_parse(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == Budget.of(text) == budget


@given(st.one_of(st.none(), RATES), st.one_of(st.none(), SIZES), st.one_of(st.none(), LOSSES))
def test_print_then_parse_is_the_identity(rate: Fraction | None, size: int | None, kl: Fraction | None) -> None:
    if rate is None and size is None and kl is None:
        with pytest.raises(BudgetError, match="at least one limit"):
            Budget()
        return
    budget = Budget(rate, size, kl)
    assert Budget.parse(str(budget)) == budget


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
    assert all(unit in str(error.value) for unit in (*BYTE_UNITS, "bit", "nats"))


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
    assert f"within {replace(budget, kl_nats=None)} " in text and "with 0.0000000001nats " in text


@given(RATES, RATES, st.fractions(min_value=Fraction(1, 100), max_value=4))
def test_a_range_steps_from_end_to_end(first: Fraction, last: Fraction, step: Fraction) -> None:
    text = f"{first}..{last}"
    if first > last or (last - first) / step > MOST_RATES - 1:
        with pytest.raises(BudgetError, match=r"range|larger steps"):
            rates(text, str(step))
        return
    found = rates(text, str(step))
    assert (found[0], found[-1]) == (first, last)
    widths = [high - low for low, high in pairwise(found)]
    assert all(width == step for width in widths[:-1]) and all(0 < width <= step for width in widths)


def test_ranges() -> None:
    assert rates("2.5..4.5", "0.5") == tuple(Fraction(half, 2) for half in range(5, 10))
    assert rates("3", "0.5") == (Fraction(3),)
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
