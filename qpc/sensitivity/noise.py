"""Sensitivities from injected noise.

a_l = KL(model || model with noise of size t in weight l) / t. The noise is white over the inputs of the linear, and as large in each row as
the row is long, as the error of a quantizer is after a rotation.
"""

import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from qpc.errors import ModelError
from qpc.ir.annotation import LinearSite, site_of
from qpc.ir.linear import stored_matrix
from qpc.ir.program import Program
from qpc.ir.random_inputs import random_inputs
from qpc.ir.walk import Walk
from qpc.journal import Journal, Step
from qpc.progress import Progress, silent, track
from qpc.sensitivity.output_loss import Reference, reference_of
from qpc.sensitivity.sites import by_weight
from qpc.sensitivity.values import Method, Sensitivities

MOST_WORKERS = 8
"""Walks that run at once on a CPU; each needs memory for the outputs of the model."""


def estimate(
    program: Program,
    *,
    inputs: Sequence[Tensor] | None = None,
    batch: int = 3,
    length: int = 64,
    rounds: int = 3,
    noise: float = 0.02,
    seed: int = 0,
    method: Method | None = None,
    journal: Journal[float] | None = None,
    progress: Progress = silent,
) -> Sensitivities:
    """Inject noise into one weight after another and measure what it does to the output.

    The graph is walked once a round; at each linear a copy of the walk goes on to the end with the perturbed weight, so nothing upstream
    runs again and only live values are kept. The model is not modified. Computes in the dtypes and on the device of the model.

    program: CANONICAL or later. inputs: the model's inputs; by default tokens drawn uniformly from the vocabulary for those that an
    embedding reads, ones for other integers, and a standard normal for floating-point ones. batch, length: sizes of their symbolic axes.
    rounds: parts into which the inputs are cut along their first axis, each with noise of its own. noise: relative squared error to
    inject, in each row. method: what the inputs are called. journal: what was measured by an estimate that was interrupted.

    The defaults are a trade. On 26 linears of SmolLM2-135M, the logarithm of a coefficient has a standard error of 0.28, 0.22, 0.20 and
    0.19 for 1, 2, 3 and 4 rounds of 64 tokens, and 0.29 for one round of 128: the draw of the noise matters as much as that of the tokens.
    An allocation loses about half the square of that error, so a fourth round would gain less than a thousandth part.

    Raises `ModelError` if there are no linears, or an output is not finite; the message names the linear.
    """
    groups = by_weight(program)
    if not groups:
        raise ModelError("the model has no linear that may be quantized")
    given = tuple(inputs) if inputs is not None else random_inputs(program, batch=batch, length=length, seed=seed)
    parts = rounds_of(given, rounds)
    method = method or (Method.RANDOM if inputs is None else Method.GIVEN)
    totals = dict.fromkeys((site_of(nodes[0]).weight for nodes in groups), 0.0)
    positions = 0
    for trial, loss in injected(program, parts, groups, (noise,), seed, "sensitivities", journal or Journal(), progress):
        totals[trial.site.weight] += loss * trial.reference.positions
        positions += trial.reference.positions if trial.nodes is groups[0] else 0
    values = {site_of(node).name: totals[site_of(node).weight] / (positions * noise) for node in program.linears()}
    return Sensitivities(values, trial.reference.kind, noise, seed, positions, method)


def injected(
    program: Program,
    parts: Sequence[tuple[Tensor, ...]],
    groups: list[list[fx.Node]],
    sizes: Sequence[float],
    seed: int,
    task: str,
    journal: Journal[float],
    progress: Progress,
) -> "Iterator[tuple[Trial, float]]":
    """The loss of every trial: of noise of each size in each weight, on each part of the inputs. The draw is the same for all sizes.

    Raises `ModelError` that names the linear where an output is not finite.
    """
    trials = (trial for number, part in enumerate(parts) for trial in _trials(program, part, groups, sizes, (seed, number)))
    with _workers(program) as (pool, count):
        for trial, loss in track(_in_order(pool, count, trials, journal), task, len(parts) * len(groups) * len(sizes), progress):
            if not math.isfinite(loss):
                reason = f"the output is not finite when its weight has a relative squared error of {trial.noise}"
                raise ModelError(f"{trial.site.name}: {reason}")
            journal[trial.step] = loss
            yield trial, loss


@dataclass(frozen=True)
class Trial:
    """A walk that stands before the first linear of one weight, and what it takes to finish it with noise in that weight."""

    walk: Walk
    nodes: list[fx.Node]
    weight: Tensor
    noise: float
    key: tuple[object, ...]
    reference: Reference

    @property
    def site(self) -> LinearSite:
        """The first linear that applies the weight."""
        return site_of(self.nodes[0])

    @property
    def step(self) -> Step:
        """Its name in a journal."""
        return ("noise", self.noise, *self.key, self.site.weight)

    def run(self) -> float:
        """The loss; NaN or infinity if the output is not finite."""
        with torch.no_grad():
            noisy = perturbed(self.weight, self.noise, (*self.key, self.site.weight))
            return self.reference.loss(self.walk.finish(dict.fromkeys(self.nodes, noisy)))


def _trials(
    program: Program, inputs: tuple[Tensor, ...], groups: list[list[fx.Node]], sizes: Sequence[float], key: tuple[object, ...]
) -> Iterator[Trial]:
    """One trial for each weight and size of the noise, on one part of the inputs."""
    walk = Walk(program, tuple(value.to(program.device) for value in inputs))
    with torch.no_grad():
        reference = reference_of(program, walk.finish({}))
    for nodes in groups:
        with torch.no_grad():
            walk.advance(nodes[0])
        weight = stored_matrix(program, site_of(nodes[0]))
        yield from (Trial(walk.fork(), nodes, weight, noise, key, reference) for noise in sizes)


@contextmanager
def _workers(program: Program) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool, and the number of its threads: those of PyTorch shared out on a CPU (small products gain little from many), one elsewhere."""
    threads = torch.get_num_threads()
    on_cpu = all(value.device.type == "cpu" for value in program.module.parameters())
    count = min(threads, MOST_WORKERS) if on_cpu else 1
    torch.set_num_threads(threads // count)
    pool = ThreadPoolExecutor(count)
    try:
        yield pool, count
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _in_order(pool: ThreadPoolExecutor, ahead: int, trials: Iterable[Trial], journal: Journal[float]) -> Iterator[tuple[Trial, float]]:
    """Each trial with its loss, as the journal has it; trials are drawn only so far ahead, for they hold memory."""
    pending: deque[tuple[Trial, Future[float]]] = deque()
    for trial in trials:
        known = journal[trial.step]
        pending.append((trial, pool.submit(trial.run if known is None else partial(float, known))))
        if len(pending) > ahead:
            first, loss = pending.popleft()
            yield first, loss.result()
    for first, loss in pending:
        yield first, loss.result()


def perturbed(weight: Tensor, noise: float, key: tuple[object, ...]) -> Tensor:
    """The weight [out_features, in_features] plus Gaussian noise E with ||E||^2 = noise ||W||^2 in every row.

    The noise depends on nothing but the key (as printed), the shape and the device.
    """
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(repr(key).encode()))
    draw = torch.randn(weight.shape, generator=generator, device=weight.device)
    full = weight.float()
    scale = noise**0.5 * torch.linalg.vector_norm(full, dim=1, keepdim=True) / torch.linalg.vector_norm(draw, dim=1, keepdim=True)
    return torch.addcmul(full, scale, draw).to(weight.dtype)


def rounds_of(inputs: tuple[Tensor, ...], rounds: int) -> list[tuple[Tensor, ...]]:
    """The inputs cut along their common first axis into so many parts of like size; one part if they have none."""
    first = {len(value) if value.ndim else 0 for value in inputs}
    if len(first) != 1 or 0 in first:
        return [inputs]
    pieces = [torch.tensor_split(value, min(rounds, len(value))) for value in inputs]
    return list(zip(*pieces, strict=True))
