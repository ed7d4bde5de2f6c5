"""At most n distinct quantizers: which ones, by descent at fixed prices.

With prices fixed, what a set of quantizers costs is one evaluation of all clusters. From the quantizers that an allocation without this
rule uses, those that are missed least are dropped one by one; then single ones are exchanged while that helps, and the prices are found
anew for the set. This proves nothing: the bound is that of the integer program, or of the problem without the rule.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qpc.solver.dual import Best, Problem, relax
from qpc.solver.tables import Floats, Tables

ROUNDS = 4
FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0, 1e4)
"""Prices are raised by these until the set that is best at them can keep the limits: few quantizers make limits harder to keep."""

Set = npt.NDArray[np.bool_]
"""Quantizers: bool [quantizer]."""


def choose(problem: Problem, weights: Floats, most: int) -> Iterator[Set]:
    """Sets of at most `most` counted quantizers with which fractions of covers keep the limits, the better ones later.

    weights: the objective's weights plus the prices of the problem without the rule.
    """
    prices = weights - problem.weights
    for factor in FACTORS:
        chosen = _descend(problem.tables, problem.weights + factor * prices, None, most)
        for _ in range(ROUNDS):
            if chosen is None:
                break
            restricted = Problem(problem.tables.only(chosen), problem.objective, problem.limits)
            relaxed = relax(restricted, Best(restricted))
            if relaxed is None:
                break
            yield chosen
            better = _descend(problem.tables, relaxed.weights, chosen, most)
            if better is None or bool((better == chosen).all()):
                return
            chosen = better
        else:
            return


def _descend(tables: Tables, weights: Floats, chosen: Set | None, most: int) -> Set | None:
    """A set that no single drop (while it is too large) or exchange betters at these weights; None if none serves all clusters."""
    reduced = [block.reduced(weights) for block in tables.blocks]

    def value(used: Set) -> float:
        total = 0.0
        for block, priced in zip(tables.blocks, reduced, strict=True):
            total += float(block.cover(priced[:, :, used].min(axis=2, initial=np.inf)).least.sum())
        return total

    if chosen is None:
        picks = tables.best(weights)
        chosen = tables.counted.copy() if picks is None else tables.distinct(picks)
    chosen = chosen | ~tables.counted
    while (chosen & tables.counted).sum() > most:
        after = {index: value(_without(chosen, index)) for index in np.flatnonzero(chosen & tables.counted).tolist()}
        dropped = min(after, key=lambda index: (after[index], index))
        if not math.isfinite(after[dropped]):
            return None
        chosen = _without(chosen, dropped)
    now = value(chosen)
    while True:
        exchanges = [
            _without(chosen, out) | _alone(into, len(chosen))
            for out in np.flatnonzero(chosen & tables.counted).tolist()
            for into in np.flatnonzero(~chosen).tolist()
        ]
        values = [value(exchange) for exchange in exchanges]
        if not values or min(values) >= now - 1e-12 * abs(now):
            return chosen
        now, chosen = min(values), exchanges[int(np.argmin(values))]


def _without(used: Set, index: int) -> Set:
    return used & ~_alone(index, len(used))


def _alone(index: int, count: int) -> Set:
    alone = np.zeros(count, dtype=np.bool_)
    alone[index] = True
    return alone
