"""What no allocation can beat: ideal Gaussian quantizers of any rate, and this palette's rates mixed in any fraction.

A plan's loss lies above both. What lies between the two is the palette's; what lies above the second is that rates are whole choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qpc.cost import Cost
from qpc.errors import BudgetError, SolverError


@dataclass(frozen=True)
class WaterFilling:
    """What ideal quantizers reach.

    loss: the sum of sensitivity * 2^(-2 rate). rates: bits per weight of each linear. level: loss per weight where the rate is positive.
    """

    loss: float
    rates: tuple[float, ...]
    level: float


def water_filling(sensitivities: Sequence[float], weights: Sequence[int], total_bits: float) -> WaterFilling:
    """The least loss of linears whose weights are Gaussian, with `total_bits` for all codes together and nothing else stored.

    At R bits per weight no quantizer leaves less than 2^(-2R) of a Gaussian's energy (Shannon, 1959). Minimising the sum of a_l 2^(-2 b_l)
    under the sum of n_l b_l gives b_l = max(0, log2(a_l / (n_l level)) / 2): reverse water-filling (Cover and Thomas, Elements of
    Information Theory, theorem 10.3.3). Rounding with error feedback can do better than its quantizer, by what the sensitivities then say.

    sensitivities: loss per unit of relative squared error of each linear [nats]. weights: how many each has.

    Raises `SolverError` if the lengths differ or are 0, a sensitivity is negative or not finite, or a count is not positive;
    `BudgetError` if total_bits is negative.
    """
    if len(sensitivities) != len(weights) or not weights:
        raise SolverError(f"{len(sensitivities)} sensitivities for {len(weights)} linears; give one for each, and at least one")
    if not all(0 <= value < math.inf for value in sensitivities) or not all(count > 0 for count in weights):
        raise SolverError("sensitivities must be finite and not negative, numbers of weights positive")
    if not total_bits >= 0:
        raise BudgetError(f"{total_bits=} must not be negative")
    density = [value / count for value, count in zip(sensitivities, weights, strict=True)]
    order = sorted((index for index, value in enumerate(density) if value > 0), key=lambda index: -density[index])
    if not order:
        return WaterFilling(0.0, (0.0,) * len(weights), 0.0)
    # With the k largest densities above water the level follows from the bits; it is right if it lies above the next density.
    log_level, logs, count = 0.0, 0.0, 0
    for position, index in enumerate(order):
        logs += weights[index] * math.log2(density[index])
        count += weights[index]
        log_level = (logs - 2 * total_bits) / count
        if position + 1 == len(order) or log_level >= math.log2(density[order[position + 1]]):
            break
    rates = tuple(max(0.0, (math.log2(value) - log_level) / 2) if value > 0 else 0.0 for value in density)
    loss = math.fsum(value * 2.0 ** (-2 * rate) for value, rate in zip(sensitivities, rates, strict=True))
    return WaterFilling(loss, rates, 2.0**log_level)


def palette_bound(tables: Sequence[Sequence[Cost]], weight_bytes: int) -> float:
    """The least loss within `weight_bytes` if every linear could mix its choices in any fraction.

    tables: the costs of each linear's choices, losses weighted by its sensitivity. The mixture lies on the lower convex hull of each table,
    and hulls are walked from the best price of a byte down (Sinha and Zoltners, The multiple-choice knapsack problem, 1979).

    Raises `SolverError` if a linear has no choice, `BudgetError` that names the smallest feasible size.
    """
    if not all(tables):
        raise SolverError("a linear has no choice")
    hulls = [_hull(table) for table in tables]
    room = weight_bytes - sum(hull[0].weight_bytes for hull in hulls)
    if room < 0:
        raise BudgetError(f"a budget of {weight_bytes} bytes is below the smallest feasible one of {weight_bytes - room} bytes")
    steps = sorted(((_slope(*step), step) for hull in hulls for step in pairwise(hull)), key=lambda each: each[0])
    losses = [hull[0].distortion for hull in hulls]
    for slope, (low, high) in steps:
        size = high.weight_bytes - low.weight_bytes
        if size <= room:  # both ends, so that nothing is rounded
            losses += [-low.distortion, high.distortion]
        elif room > 0:
            losses.append(slope * room)
        room -= min(size, room)
    return math.fsum(losses)


def decibels(loss: float, bound: float) -> float:
    """How far a loss lies above a bound [dB]; 6.02 dB are one bit per weight. Infinity above a bound of 0."""
    return 10 * math.log10(loss / bound) if bound > 0 else (math.inf if loss > 0 else 0.0)


def _hull(table: Sequence[Cost]) -> list[Cost]:
    """The lower convex hull from the fewest bytes on, as long as the loss falls."""
    hull: list[Cost] = []
    for cost in sorted(table, key=lambda cost: (cost.weight_bytes, cost.distortion)):
        if hull and cost.distortion >= hull[-1].distortion:
            continue
        while len(hull) > 1 and _slope(hull[-2], cost) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(cost)
    return hull


def _slope(low: Cost, high: Cost) -> float:
    return (high.distortion - low.distortion) / (high.weight_bytes - low.weight_bytes)
