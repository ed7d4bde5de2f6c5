"""The table of choices: exact bytes, the undominated ones and only those."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qpc.cost import Choice, Cost, choices, quantized_cost, undominated
from qpc.ir.annotation import LinearShape
from tests.toy import ToyQuantizer

COSTS = st.builds(Cost, st.integers(0, 9), st.integers(0, 9).map(float))


@given(st.lists(COSTS, max_size=12))
def test_what_is_left_out_is_matched_by_what_is_kept(costs: list[Cost]) -> None:
    kept = [choice.cost for choice in undominated(Choice(ToyQuantizer(i + 1), cost) for i, cost in enumerate(costs))]
    for cost in costs:
        assert any(other.weight_bytes <= cost.weight_bytes and other.distortion <= cost.distortion for other in kept)
    for smaller, larger in itertools.pairwise(kept):
        assert smaller.weight_bytes < larger.weight_bytes and smaller.distortion > larger.distortion


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 8))
def test_cost_counts_what_is_stored(rows: int, columns: int, bits: int) -> None:
    cost = quantized_cost(ToyQuantizer(bits), LinearShape(rows, columns))
    assert 8 * cost.weight_bytes >= bits * rows * columns
    assert cost.distortion == 2.0 ** (-2 * bits)


def test_a_weight_too_small_to_gain_stays_as_it_is() -> None:
    assert [choice.quantizer for choice in choices(LinearShape(3, 5), [ToyQuantizer(4)], kept_bytes=30)] == [None]
    assert [choice.quantizer for choice in choices(LinearShape(64, 64), [ToyQuantizer(4)], kept_bytes=8192)] == [ToyQuantizer(4), None]
    assert [choice.quantizer for choice in choices(LinearShape(3, 5), [ToyQuantizer(4)])] == [ToyQuantizer(4)]


def test_a_wasteful_quantizer_is_never_offered() -> None:
    table = choices(LinearShape(64, 64), [ToyQuantizer(4), ToyQuantizer(4, waste=2.0), ToyQuantizer(3, waste=0.001)])
    assert [choice.quantizer for choice in table] == [ToyQuantizer(3, waste=0.001)]


@given(COSTS, COSTS, st.floats(0, 100))
def test_costs_add_and_weigh(first: Cost, second: Cost, sensitivity: float) -> None:
    total = (first + second).weighted(sensitivity)
    assert total.weight_bytes == first.weight_bytes + second.weight_bytes
    assert total.distortion == sensitivity * (first.distortion + second.distortion)
