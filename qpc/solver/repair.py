"""From the covers at the best prices to an allocation that keeps all limits, and from there to better ones, by small changes.

A change forces one choice on a cluster and covers the rest of it as the prices say. While a limit is broken, the change is made that costs
least, at the prices, for what it mends. Then the change that gains most of those that fit is made, alone or in pairs of two clusters (one
gives what the other takes), until none gains.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qpc.solver.dual import Best, Problem
from qpc.solver.tables import Floats, Picks

MOST_CHANGES = 20_000
"""Changes that are looked at: those of the least excess at the prices."""
MOST_IN_PAIRS = 1000
"""Changes that are tried in pairs: those that cost least at the prices."""
MOST_STEPS = 300
MOST_PAIR_STEPS = 60


def repair(problem: Problem, best: Best, weights: Floats) -> None:
    """Offer to `best` what comes of the covers at the best prices, and of `best` itself. weights: the objective's plus the prices."""
    changes = _Changes.of(problem, weights)
    starts = [problem.tables.best(weights), best.picks]
    for start in starts:
        if start is not None and (made := changes.improve(start)) is not None:
            best.offer(made, problem.tables.totals(made))


@dataclass(frozen=True, eq=False)
class _Changes:
    """The changes of a problem at given prices.

    totals: float64 [row, change], of the whole cluster after the change. at: int64 [4, change], block, cluster, part, quantizer.
    cluster: int64 [change], clusters of all blocks numbered through. rest: for each block int64 [cluster, part, part], the quantizers of
    the parts that cover what a part leaves, -1 where there is none.
    """

    problem: Problem
    weights: Floats
    totals: Floats
    at: npt.NDArray[np.int64]
    cluster: npt.NDArray[np.int64]
    rest: list[npt.NDArray[np.int64]]

    @staticmethod
    def of(problem: Problem, weights: Floats) -> "_Changes":
        """Those of the least excess, in the order of it."""
        totals, at, excess, cluster, rests = [], [], [], [], []
        first = 0
        for index, (block, over) in enumerate(zip(problem.tables.blocks, problem.tables.excess(weights), strict=True)):
            priced = block.reduced(weights)
            choice = priced.argmin(axis=2)
            covers = block.cover(priced.min(axis=2))
            cheapest = np.take_along_axis(block.values, choice[None, :, :, None], axis=3)[..., 0]
            rest = np.stack([covers.parts(block.plan.full & ~mask) for mask in block.plan.masks], axis=1)
            rests.append(np.where(rest, choice[:, None, :], -1))
            beside = np.einsum("cpo,rco->rcp", rest.astype(np.float64), cheapest)
            c, p, q = np.nonzero(np.isfinite(over))
            totals.append(block.values[:, c, p, q] + beside[:, c, p])
            at.append(np.stack([np.full(len(c), index), c, p, q]))
            excess.append(over[c, p, q])
            cluster.append(first + c)
            first += len(block.clusters)
        order = np.argsort(np.concatenate(excess), kind="stable")[:MOST_CHANGES]
        joined, places = np.concatenate(totals, axis=1)[:, order], np.concatenate(at, axis=1)[:, order]
        return _Changes(problem, weights, joined, places, np.concatenate(cluster)[order], rests)

    def improve(self, start: Picks) -> Picks | None:
        """The last of a chain of changes; None if it cannot keep the limits."""
        problem, objective = self.problem, self.problem.objective.value
        resources = [resource.value for resource in problem.limits]
        limits = np.array(list(problem.limits.values()))[:, None]
        picks = tuple(chosen.copy() for chosen in start)
        current = self._current(picks)
        pair_steps = 0
        for _ in range(MOST_STEPS):
            change = self.totals - current[:, self.cluster]
            room = limits - current[resources].sum(axis=1, keepdims=True)
            if (room < 0).any():
                scale = 1 / np.maximum(np.abs(limits), 1)
                mended = (np.maximum(-room, 0) * scale - np.maximum(change[resources] - room, 0) * scale).sum(axis=0)
                priced = np.maximum(self.weights @ change, 1e-12 * np.abs(self.weights @ self.totals))
                useful = np.flatnonzero(mended > 0)
                if len(useful) == 0:
                    return None
                chosen = [useful[np.argmin(priced[useful] / mended[useful])]]
            else:
                fits = np.flatnonzero((change[resources] <= room).all(axis=0) & (change[objective] < 0))
                if len(fits):
                    chosen = [fits[np.argmin(change[objective][fits])]]
                else:
                    pair_steps += 1
                    pair = None if pair_steps > MOST_PAIR_STEPS else self._pair(change, room, resources, objective)
                    if pair is None:
                        break
                    chosen = list(pair)
            for index in chosen:
                self._apply(int(index), picks, current)
        return picks if problem.keeps(problem.tables.totals(picks)) else None

    def _pair(self, change: Floats, room: Floats, resources: list[int], objective: int) -> tuple[int, int] | None:
        """Two changes of different clusters that together fit and gain most."""
        priced = self.weights @ change
        moving = np.flatnonzero((change != 0).any(axis=0))
        least = moving[np.argsort(priced[moving], kind="stable")[:MOST_IN_PAIRS]]
        if len(least) == 0:
            return None
        gain = change[objective][least]
        together = gain[:, None] + gain[None, :]
        cluster = self.cluster[least]
        wrong = cluster[:, None] == cluster[None, :]
        for resource, left in zip(resources, room[:, 0], strict=True):
            used = change[resource][least]
            wrong |= used[:, None] + used[None, :] > left
        together[wrong] = 0
        first, second = np.unravel_index(int(together.argmin()), together.shape)
        if together[first, second] >= -1e-12 * abs(float(self.weights @ np.abs(self.totals[:, least[0]]))):
            return None
        return int(least[first]), int(least[second])

    def _current(self, picks: Picks) -> Floats:
        """What each cluster spends: float64 [row, cluster]."""
        spent = []
        for block, chosen in zip(self.problem.tables.blocks, picks, strict=True):
            taken = np.take_along_axis(block.values, np.maximum(chosen, 0)[None, :, :, None], axis=3)[..., 0]
            spent.append(np.where(chosen >= 0, taken, 0).sum(axis=2))
        return np.concatenate(spent, axis=1)

    def _apply(self, index: int, picks: Picks, current: Floats) -> None:
        block, cluster, part, quantizer = self.at[:, index]
        picks[block][cluster] = self.rest[block][cluster, part]
        picks[block][cluster, part] = quantizer
        current[:, self.cluster[index]] = self.totals[:, index]
