"""Whether the loss grows in proportion to the error: what every prediction rests on, checked where it matters most."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.journal import Journal
from qpc.progress import Progress, silent
from qpc.sensitivity.noise import injected
from qpc.sensitivity.sites import by_weight
from qpc.sensitivity.values import Linearity, Sensitivities

CHECKED = 48
"""Weights that are checked: those whose coefficient is largest for their number of weights, on which an allocation spends most."""

SIZES = (0.005, 0.08)
"""Noise that is tried: about the distortion at 4 and at 2 bits per weight."""


def checked(
    program: Program,
    found: Sensitivities,
    inputs: Sequence[Tensor],
    *,
    seed: int = 0,
    journal: Journal[float] | None = None,
    progress: Progress = silent,
) -> Sensitivities:
    """The same sensitivities with their `Linearity`, and larger ones for the linears that break it.

    Where the loss grows faster or slower than the noise by more than the tolerance, the coefficient is multiplied by that factor: for
    gradients it becomes the coefficient at the larger noise if that is larger, for noise of a size between an upper bound of both.

    Raises `ModelError` as `estimate` does.
    """
    groups = by_weight(program)
    names = {site_of(nodes[0]).weight: [site_of(node).name for node in nodes] for nodes in groups}

    def urgency(site_name: str, weights: int) -> float:
        return found.values[site_name] / weights

    ranked = sorted(groups, key=lambda nodes: -urgency(site_of(nodes[0]).name, site_of(nodes[0]).shape.weights))[:CHECKED]
    chosen = [nodes for nodes in groups if nodes in ranked]
    losses: dict[str, dict[float, float]] = {}
    trials = injected(program, [tuple(inputs)], chosen, SIZES, seed, "linearity", journal or Journal(), progress)
    for trial, loss in trials:
        losses.setdefault(trial.site.weight, {})[trial.noise] = loss / trial.noise
    smaller, larger = SIZES
    growth: dict[str, float] = {}
    for weight, at in losses.items():
        if at[smaller] > 0:
            growth |= dict.fromkeys(names[weight], at[larger] / at[smaller])
    linearity = Linearity(smaller, larger, growth)
    factors = {name: max(value, 1.0 if found.noise == 0 else 1 / value) for name, value in linearity.broken.items()}
    return replace(found, values={name: value * factors.get(name, 1.0) for name, value in found.values.items()}, linearity=linearity)
