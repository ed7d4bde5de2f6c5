"""The table of choices: exact bytes, the undominated ones and only those."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qpc.cost import Choice, Cost, Weight, choices, undominated
from qpc.ir.annotation import LinearShape
from qpc.quant.quantizer import Quantizer
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
    cost = Weight(LinearShape(rows, columns)).cost(ToyQuantizer(bits))
    assert Weight(LinearShape(rows, columns), rotated=True).cost(ToyQuantizer(bits)).weight_bytes == cost.weight_bytes - -(-columns // 8)
    assert 8 * cost.weight_bytes >= bits * rows * columns
    assert cost.distortion == 2.0 ** (-2 * bits)


def offered(weights: list[Weight], *quantizers: Quantizer) -> list[Quantizer | None]:
    """Quantizers of the table."""
    return [choice.quantizer for choice in choices(weights, quantizers)]


def test_a_weight_too_small_to_gain_stays_as_it_is() -> None:
    assert offered([Weight(LinearShape(3, 5), kept_bytes=30)], ToyQuantizer(4)) == [None]
    assert offered([Weight(LinearShape(64, 64), kept_bytes=8192)], ToyQuantizer(4)) == [ToyQuantizer(4), None]
    assert offered([Weight(LinearShape(3, 5))], ToyQuantizer(4)) == [ToyQuantizer(4)]


def test_a_wasteful_quantizer_is_never_offered() -> None:
    assert offered([Weight(LinearShape(64, 64))], ToyQuantizer(4), ToyQuantizer(4, 2.0), ToyQuantizer(3, 0.001)) == [ToyQuantizer(3, 0.001)]


def test_weights_stored_alike_add_up() -> None:
    weights = [Weight(LinearShape(64, 32), 2.0, 4096), Weight(LinearShape(16, 32), 5.0, 1024)]
    table = choices(weights, [ToyQuantizer(4)])
    assert table[0] == Choice(ToyQuantizer(4), sum((w.cost(ToyQuantizer(4)).weighted(w.sensitivity) for w in weights), start=Cost(0, 0.0)))
    assert table[1] == Choice(None, Cost(5120, 0.0))
    assert offered([*weights, Weight(LinearShape(16, 32))], ToyQuantizer(4)) == [ToyQuantizer(4)]


@given(COSTS, COSTS, st.floats(0, 100))
def test_costs_add_and_weigh(first: Cost, second: Cost, sensitivity: float) -> None:
    total = (first + second).weighted(sensitivity)
    assert total.weight_bytes == first.weight_bytes + second.weight_bytes
    assert total.distortion == sensitivity * (first.distortion + second.distortion)


TIMED = st.builds(Cost, st.integers(0, 5), st.integers(0, 5).map(float), st.integers(0, 5))


@given(st.lists(TIMED, max_size=12))
def test_what_is_left_out_is_matched_in_time_too(costs: list[Cost]) -> None:
    def matches(kept: Cost, cost: Cost) -> bool:
        return kept.weight_bytes <= cost.weight_bytes and kept.distortion <= cost.distortion and kept.latency_ps <= cost.latency_ps

    kept = [choice.cost for choice in undominated(Choice(ToyQuantizer(i + 1), cost) for i, cost in enumerate(costs))]
    assert all(any(matches(each, cost) for each in kept) for cost in costs)
    assert not any(matches(a, b) for a, b in itertools.permutations(kept, 2))
