"""A lower bound where the number of distinct quantizers is limited: the n-median problem at fixed prices, relaxed.

At fixed prices the best n quantizers are those with which all clusters are covered most cheaply: an n-median problem. Its relaxation pays a
reward for each site that is covered (whatever the number of times) and takes the n quantizers that earn most by it; rewards are adjusted
until sites are covered about once (Cornuejols, Fisher and Nemhauser, Location of bank accounts to optimize float, 1977). Every value on
the way is a lower bound.
"""

import math

import numpy as np
import numpy.typing as npt

from qpc.solver.dual import Problem
from qpc.solver.tables import Block, Floats, Picks

STEPS = 200
PATIENCE = 10
"""Steps without a better bound after which steps are halved."""


def median_bound(problem: Problem, weights: Floats, picks: Picks, most: int, target: float) -> tuple[float, npt.NDArray[np.bool_]]:
    """The bound at these weights (the objective's plus prices), and the quantizers that a better allocation may use: bool [quantizer].

    picks: a good allocation of `most` quantizers, from which the rewards start. target: its value; at a bound of it the search ends.
    """
    tables = problem.tables
    reduced = [block.reduced(weights) for block in tables.blocks]
    paid = math.fsum(float(weights[row.value]) * limit for row, limit in problem.limits.items())
    rewards = [_start(block, priced, chosen) for block, priced, chosen in zip(tables.blocks, reduced, picks, strict=True)]
    free = np.flatnonzero(~tables.counted)
    counted = np.flatnonzero(tables.counted)
    bound, pace, idle = -math.inf, 1.0, 0
    best_rewards, possible = rewards, np.ones(len(tables.counted), dtype=np.bool_)
    for _ in range(STEPS):
        earned = [_pack(block, priced, reward) for block, priced, reward in zip(tables.blocks, reduced, rewards, strict=True)]
        total = np.sum([costs.sum(axis=0) for costs, _ in earned], axis=0)
        order = counted[np.argsort(total[counted], kind="stable")[:most]]
        taken = np.concatenate([free, order[total[order] < 0]])
        value = math.fsum(float(reward.sum()) for reward in rewards) + float(total[taken].sum()) - paid
        if len(order) == most:
            # To take another quantizer instead of the last one raises the bound by what it earns less.
            possible &= ~tables.counted | (value + np.maximum(total - min(float(total[order[-1]]), 0.0), 0) <= target + 1e-9 * abs(target))
        if value > bound:
            bound, idle, best_rewards = value, 0, rewards
        elif (idle := idle + 1) == PATIENCE:
            pace, idle, rewards = pace / 2, 0, best_rewards
            continue
        slopes = [1.0 - covered[:, :, taken].sum(axis=2) for _, covered in earned]
        length = sum(float((slope**2).sum()) for slope in slopes)
        if bound >= target or length == 0:
            break
        step = pace * (target - value) / length
        rewards = [reward + step * slope for reward, slope in zip(rewards, slopes, strict=True)]
    return bound, possible


def _start(block: Block, priced: Floats, chosen: npt.NDArray[np.int64]) -> Floats:
    """Rewards that pay for the parts of an allocation, shared equally by their sites: float64 [cluster, site]."""
    rewards = np.zeros((len(chosen), block.plan.full.bit_count()))
    for part, mask in enumerate(block.plan.masks):
        clusters = np.flatnonzero(chosen[:, part] >= 0)
        rewards[np.ix_(clusters, np.array(_bits(mask)))] = (priced[clusters, part, chosen[clusters, part]] / mask.bit_count())[:, None]
    return rewards


def _pack(block: Block, priced: Floats, rewards: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """What each quantizer costs, less what it earns, if it covers what pays best and leaves the rest.

    Returns float64 [cluster, quantizer], never positive, and the sites that it covers: bool [cluster, site, quantizer].
    """
    plan = block.plan
    gains = [priced[:, part] - rewards[:, _bits(mask)].sum(axis=1)[:, None] for part, mask in enumerate(plan.masks)]
    zero = np.zeros_like(gains[0])
    costs: dict[int, Floats] = {0: zero}
    taken: dict[int, npt.NDArray[np.int64]] = {}
    for state, options in plan.packings:
        stacked = np.stack([costs[rest] + (gains[part] if part >= 0 else zero) for part, rest in options])
        taken[state] = stacked.argmin(axis=0)
        costs[state] = np.take_along_axis(stacked, taken[state][None], axis=0)[0]
    covered = np.zeros((rewards.shape[0], rewards.shape[1], priced.shape[2]), dtype=np.bool_)
    reached = {plan.full: np.ones(zero.shape, dtype=np.bool_)}
    for state, options in reversed(plan.packings):
        for option, (part, rest) in enumerate(options):
            here = reached[state] & (taken[state] == option)
            reached[rest] = reached[rest] | here if rest in reached else here
            if part >= 0:
                covered[:, _bits(plan.masks[part])] |= here[:, None]
    return costs[plan.full], covered


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
