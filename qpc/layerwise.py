"""Sensitivities of a model that is never in memory: how much an error of a weight disturbs what its layer passes on.

    a_l = mean over positions p of ||s_p(W_l + E) - s_p(W_l)||^2 / (t ||s_p(W_l)||^2),

s being the value that the segment of the linear leaves (in a decoder the residual stream), E noise of relative squared error t in each
row. Segments are taken to pass such disturbances on alike, so no KL is predicted, only how linears compare. Each position counts by itself,
for a few have values hundreds of times as large as the others: on the 210 linears of SmolLM2-135M-Instruct the rank correlation with
sensitivities by gradients is 0.92, and 0.46 if the squares of all positions are added up first.
"""

import math

import torch
from torch import Tensor

from qpc.errors import ModelError
from qpc.held_source import HeldSource
from qpc.ir.annotation import site_of
from qpc.ir.linear import stored_matrix
from qpc.ir.program import Program
from qpc.ir.segments import segments
from qpc.partial_run import PartialRun
from qpc.progress import Progress, silent, track
from qpc.sensitivity import Loss, Method, Sensitivities, perturbed
from qpc.sensitivity.sites import by_weight
from qpc.spill import Spill
from qpc.work_in_progress import WorkInProgress

NOISE = 0.01
"""Relative squared error that is injected."""

SWEEP = "estimate"
"""What the activations on the disk are called."""


@torch.no_grad()
def estimate_by_layers(
    program: Program, tokens: Tensor, source: HeldSource, work: WorkInProgress, *, seed: int = 0, progress: Progress = silent
) -> Sensitivities:
    """Estimate them on one batch of inputs, segment by segment; what the journal knows already is not estimated again.

    program: GROUPED or later. tokens: of its only input. Raises `ModelError` if the program cannot be run in parts, or what a segment
    leaves is not finite.
    """
    found = {entry["weight"]: entry["sensitivity"] for entry in work.entries if "sensitivity" in entry}
    parts, groups = segments(program), by_weight(program)
    place = {node: number for number, segment in enumerate(parts) for node in segment.nodes}
    spill, current = Spill(work, SWEEP), -1
    run: PartialRun | None = None
    start = left = None
    for nodes in track(groups, "sensitivities", len(groups), progress):
        site, number = site_of(nodes[0]), place[nodes[0]]
        if site.weight in found:
            continue
        if number != current:
            for before in range(spill.newest(number), number + 1):
                spill.drop_before(before)
                run = PartialRun(program, parts[before], source)
                start = spill.read(before, 0) if before else None
                left = run(tokens, start)
                assert left is not None
                if before + 1 < len(parts) and not spill.has(before + 1):
                    with spill.writing(before + 1) as writer:
                        writer.append(left)
            current = number
        assert run is not None and left is not None
        noisy = perturbed(stored_matrix(program, site), NOISE, (seed, site.weight))
        disturbed = run(tokens, start, weights=dict.fromkeys(nodes, noisy))
        assert disturbed is not None
        energy, error = (x.double().square().sum(dim=-1) for x in (left, disturbed.double() - left.double()))
        value = float(torch.where(energy > 0, error / energy, 0).mean()) / NOISE
        if not math.isfinite(value):
            raise ModelError(f"{site.name}: its layer leaves values that are not finite when its weight has noise of {NOISE}")
        work.record(step=f"sensitivity {site.weight}", weight=site.weight, sensitivity=value)
        found[site.weight] = value
    if run is not None:  # else a later sweep may be on its way, whose activations are to stay
        spill.clear()
        source.hold(())
    values = {site_of(node).name: found[site_of(node).weight] for node in program.linears()}
    return Sensitivities(values, Loss.RELATIVE_ERROR, NOISE, seed, tokens.numel(), Method.LAYERS)
