"""Lagrangian decomposition: prices of the limited resources, at which every cluster can be covered on its own.

For prices p >= 0 the sum over clusters of the cheapest cover at these prices, less p times the limits, is a lower bound of the objective;
it is concave and piecewise linear in the prices, and its maximum equals the relaxation over the convex hulls of the clusters' covers
(Geoffrion, 1974). With one price the maximum is found by intersecting the two supporting lines on either side of it until no cover lies
under their crossing; with more, the same in the first price, each value of it by a search over the others. The search is finite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qpc.solver.tables import Floats, Picks, Row, Tables

MAX_STEPS = 60
ROUNDING = 1e-13
"""Relative; mixed solutions carry the rounding of a few sums. No limit is judged by it: it only ends searches."""


@dataclass(frozen=True)
class Problem:
    """Minimise one row of the tables under limits of others, and of the number of distinct quantizers (None: any)."""

    tables: Tables
    objective: Row
    limits: Mapping[Row, float]
    most_quantizers: int | None = None

    @property
    def weights(self) -> Floats:
        """The objective's weights: 1 for what is minimised, else 0."""
        return unit(self.objective)

    def keeps(self, totals: Floats) -> bool:
        """Whether these totals keep all limits."""
        return all(float(totals[row.value]) <= limit for row, limit in self.limits.items())

    def bound(self, weights: Floats) -> float:
        """The lower bound at the weights (the objective's, plus prices)."""
        paid = math.fsum(float(weights[row.value]) * limit for row, limit in self.limits.items())
        return self.tables.least(weights) - paid


@dataclass(frozen=True)
class Relaxation:
    """weights: the objective's plus the best prices: float64 [row]. totals: of the fractional solution that proves them best."""

    weights: Floats
    totals: Floats


@dataclass
class Best:
    """The best allocation found so far; every cover that the search meets is offered to it."""

    problem: Problem
    picks: Picks | None = None
    totals: Floats | None = None

    @property
    def value(self) -> float:
        """What it costs; infinity if there is none."""
        return float("inf") if self.totals is None else float(self.totals[self.problem.objective.value])

    def offer(self, picks: Picks, totals: Floats) -> None:
        """Take an allocation if it is better and keeps all limits."""
        if totals[self.problem.objective.value] < self.value and self.problem.keeps(totals):
            most = self.problem.most_quantizers
            if most is None or self.problem.tables.distinct(picks).sum() <= most:
                self.picks, self.totals = picks, totals


def unit(row: Row) -> Floats:
    """1 for this row, 0 for the others."""
    return np.array([float(each is row) for each in Row])


def relax(problem: Problem, best: Best) -> Relaxation | None:
    """The best prices, whatever the number of quantizers; None if even fractions of covers cannot keep the limits.

    Allocations met on the way are offered to `best`. All clusters must have a cover.
    """
    return _relax(problem, best, problem.weights, list(problem.limits.items()))


def _relax(problem: Problem, best: Best, weights: Floats, limits: Sequence[tuple[Row, float]]) -> Relaxation | None:
    if not limits:
        picks = problem.tables.best(weights)
        assert picks is not None, "every cluster has a cover"
        totals = problem.tables.totals(picks)
        best.offer(picks, totals)
        return Relaxation(weights, totals)
    (row, limit), others = limits[0], limits[1:]
    low = _relax(problem, best, weights, others)
    if low is None or low.totals[row.value] <= limit:
        return low
    high = _relax(problem, best, unit(row), others)
    if high is None or high.totals[row.value] > limit + ROUNDING * abs(limit):
        return None
    over, under, found = low.totals, high.totals, low
    under[row.value] = min(under[row.value], limit)
    for _ in range(MAX_STEPS):
        price = max(0.0, float(weights @ (under - over)) / float(over[row.value] - under[row.value]))
        line = weights + price * unit(row)
        middle = _relax(problem, best, line, others)
        assert middle is not None, "the other limits can be kept, for they were"
        found = middle
        if line @ middle.totals >= line @ over - ROUNDING * abs(line @ over):
            break
        if middle.totals[row.value] > limit:
            over = middle.totals
        else:
            under = middle.totals
    share = (limit - under[row.value]) / (over[row.value] - under[row.value])
    mixed = share * over + (1 - share) * under
    mixed[row.value] = limit
    return Relaxation(found.weights, mixed)
