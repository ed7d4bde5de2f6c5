"""How much each linear matters: the loss per unit of relative squared error of its weight, estimated without data.

For small errors the loss grows by the sum of a_l t_l over the linears, t_l being the relative squared error of weight l (the linearity
theorem of HIGGS, arXiv 2411.17525, theorem 1). So a_l = KL(model || model with noise of size t in weight l) / t, on random tokens.
"""

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qpc.errors import ModelError
from qpc.ir.annotation import LinearSite, annotation
from qpc.ir.program import Program
from qpc.ir.random_inputs import random_inputs, vocabulary
from qpc.ir.walk import Walk
from qpc.progress import Progress, silent, track

FORMAT = 1
"""Version of the JSON form of `Sensitivities`."""

MOST_WORKERS = 8
"""Walks that run at once on a CPU; each needs memory for the outputs of the model."""


class Loss(StrEnum):
    """What the noise is measured by.

    KL: nats per token between the outputs of a language model, averaged over all positions.
    RELATIVE_ERROR: squared error of any other output over its squared norm.
    """

    KL = "kl"
    RELATIVE_ERROR = "relative error"


@dataclass(frozen=True)
class Sensitivities:
    """Coefficients a_l, and how they were estimated.

    values: loss per unit of relative squared error, by name of the site; sites that share a weight share the value, and it counts once.
    noise: the relative squared error that was injected. tokens: number of positions (rows of the input) averaged over.
    """

    values: Mapping[str, float]
    loss: Loss
    noise: float
    seed: int
    tokens: int

    def to_json(self) -> str:
        """The JSON form, equal for equal values."""
        return json.dumps({"format": FORMAT, **asdict(self), "values": dict(self.values)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Sensitivities":
        """Inverse of `to_json`. Raises `ModelError` if the text is not that."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ModelError(f"sensitivities must have format {FORMAT}")
            values = {str(name): float(value) for name, value in data.pop("values").items()}
            return Sensitivities(values=values, loss=Loss(data.pop("loss")), **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"these are no sensitivities: {type(error).__name__}: {error}") from error


def check_finite(program: Program) -> None:
    """Raise `ModelError` that names the first parameter with a NaN or an infinity."""
    for name, value in program.module.named_parameters():
        if value.numel() and value.is_floating_point() and not torch.stack(torch.aminmax(value.detach())).isfinite().all():
            bad = (~value.detach().isfinite()).nonzero()
            raise ModelError(f"{name} has {len(bad)} values that are not finite, the first at {bad[0].tolist()}; repair the model first")


def estimate(
    program: Program,
    *,
    inputs: Sequence[Tensor] | None = None,
    batch: int = 3,
    length: int = 64,
    rounds: int = 3,
    noise: float = 0.02,
    seed: int = 0,
    progress: Progress = silent,
) -> Sensitivities:
    """Inject noise into one weight after another and measure what it does to the output.

    The graph is walked once a round; at each linear a copy of the walk goes on to the end with the perturbed weight, so nothing upstream
    runs again and only live values are kept. The model is not modified. Computes in the dtypes and on the device of the model.

    program: CANONICAL or later. inputs: the model's inputs; by default tokens drawn uniformly from the vocabulary for those that an
    embedding reads, ones for other integers, and a standard normal for floating-point ones. batch, length: sizes of their symbolic axes.
    rounds: parts into which the inputs are cut along their first axis, each with noise of its own. noise: relative squared error to
    inject, in each row.

    The defaults are a trade. On 26 linears of SmolLM2-135M, the logarithm of a coefficient has a standard error of 0.28, 0.22, 0.20 and
    0.19 for 1, 2, 3 and 4 rounds of 64 tokens, and 0.29 for one round of 128: the draw of the noise matters as much as that of the tokens.
    An allocation loses about half the square of that error, so a fourth round would gain less than a thousandth part.

    Raises `ModelError` if there are no linears, or an output is not finite; the message names the linear.
    """
    groups = _by_weight(program)
    if not groups:
        raise ModelError("the model has no linear that may be quantized")
    given = tuple(inputs) if inputs is not None else random_inputs(program, batch=batch, length=length, seed=seed)
    parts = _rounds(given, rounds)
    totals = dict.fromkeys((_site(nodes[0]).weight for nodes in groups), 0.0)
    positions = 0
    trials = (trial for number, part in enumerate(parts) for trial in _trials(program, part, groups, noise, (seed, number)))
    with _workers(program) as (pool, count):
        for trial, loss in track(_in_order(pool, count, trials), "sensitivities", len(parts) * len(groups), progress):
            if not math.isfinite(loss):
                raise ModelError(f"{trial.site.name}: the output is not finite when its weight has a relative squared error of {noise}")
            totals[trial.site.weight] += loss * trial.reference.positions
            positions += trial.reference.positions if trial.nodes is groups[0] else 0
    values = {_site(node).name: totals[_site(node).weight] / (positions * noise) for node in program.linears()}
    return Sensitivities(values, trial.reference.kind, noise, seed, positions)


@dataclass(frozen=True)
class _Trial:
    """A walk that stands before the first linear of one weight, and what it takes to finish it with noise in that weight."""

    walk: Walk
    nodes: list[fx.Node]
    weight: Tensor
    noise: float
    key: tuple[object, ...]
    reference: "_Reference"

    @property
    def site(self) -> LinearSite:
        return _site(self.nodes[0])

    def run(self) -> float:
        """The loss; NaN or infinity if the output is not finite."""
        with torch.no_grad():
            noisy = perturbed(self.weight, self.noise, (*self.key, self.site.weight))
            return self.reference.loss(self.walk.finish(dict.fromkeys(self.nodes, noisy)))


def _trials(
    program: Program, inputs: tuple[Tensor, ...], groups: list[list[fx.Node]], noise: float, key: tuple[object, ...]
) -> Iterator[_Trial]:
    """One trial for each weight, on one part of the inputs."""
    walk = Walk(program, inputs)
    with torch.no_grad():
        reference = _reference(program, walk.finish({}))
    for nodes in groups:
        with torch.no_grad():
            walk.advance(nodes[0])
        site = _site(nodes[0])
        stored = program.tensor(site.weight).detach()
        yield _Trial(walk.fork(), nodes, stored.t() if site.transposed else stored, noise, key, reference)


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


def _in_order(pool: ThreadPoolExecutor, ahead: int, trials: Iterable[_Trial]) -> Iterator[tuple[_Trial, float]]:
    """Each trial with its loss; trials are drawn only so far ahead, for they hold memory."""
    pending: deque[tuple[_Trial, Future[float]]] = deque()
    for trial in trials:
        pending.append((trial, pool.submit(trial.run)))
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


def _rounds(inputs: tuple[Tensor, ...], rounds: int) -> list[tuple[Tensor, ...]]:
    """The inputs cut along their common first axis into so many parts of like size; one part if they have none."""
    first = {len(value) if value.ndim else 0 for value in inputs}
    if len(first) != 1 or 0 in first:
        return [inputs]
    pieces = [torch.tensor_split(value, min(rounds, len(value))) for value in inputs]
    return list(zip(*pieces, strict=True))


def _site(node: fx.Node) -> LinearSite:
    site = annotation(node).site
    assert site is not None
    return site


def _by_weight(program: Program) -> list[list[fx.Node]]:
    """The linear nodes of each distinct weight, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.linears():
        found.setdefault(_site(node).weight, []).append(node)
    return list(found.values())


class _Reference(ABC):
    """The output of the unchanged model, and the loss of another one against it."""

    kind: ClassVar[Loss]

    def __init__(self, output: Tensor) -> None:
        if not output.isfinite().all():
            raise ModelError("the output of the unchanged model is not finite on the given inputs")
        self.positions = output.numel() // output.shape[-1] if output.ndim else 1

    @abstractmethod
    def loss(self, outputs: Sequence[Any]) -> float:
        """Loss of these outputs of the graph; NaN or infinity if they are not finite."""


class _RelativeError(_Reference):
    kind = Loss.RELATIVE_ERROR

    def __init__(self, output: Tensor) -> None:
        super().__init__(output)
        self._output = output
        self._energy = float(output.double().square().sum())
        if self._energy == 0:
            raise ModelError("the output of the model is zero on the given inputs, so no error can be compared with it")

    def loss(self, outputs: Sequence[Any]) -> float:
        return float((_main_output(outputs) - self._output).double().square().sum()) / self._energy


class _Divergence(_Reference):
    kind = Loss.KL
    rows_at_once: ClassVar[int] = 32

    def __init__(self, output: Tensor) -> None:
        super().__init__(output)
        self._log_p = output.float().flatten(0, -2).log_softmax(dim=-1)

    def loss(self, outputs: Sequence[Any]) -> float:
        """KL(p || q) with q proportional to p exp(d) is log E_p[exp(d)] for d of mean zero under p, so no digits cancel for small d."""
        total = 0.0
        output = _main_output(outputs).flatten(0, -2)
        for log_p, logits in zip(torch.split(self._log_p, self.rows_at_once), torch.split(output, self.rows_at_once), strict=True):
            p, d = log_p.exp(), logits.float() - log_p
            d -= (p * d).sum(dim=-1, keepdim=True)
            rows = torch.log1p((p * (torch.expm1(d) - d)).sum(dim=-1))
            rows = torch.where(rows.isfinite(), rows, torch.logsumexp(log_p + d, dim=-1))
            total += float(rows.clamp_min(0).double().sum())
        return total / len(self._log_p)


def _reference(program: Program, outputs: Sequence[Any]) -> _Reference:
    """KL if the output has one value for each token that the model reads, else the relative error."""
    output = _main_output(outputs)
    placeholders = program.graph.find_nodes(op="placeholder")
    tables = {vocabulary(program, node) for node in placeholders if node.name in program.inputs}
    tables.add(getattr(getattr(program.module, "config", None), "vocab_size", None))
    return _Divergence(output) if output.ndim > 1 and output.shape[-1] in tables else _RelativeError(output)


def _main_output(outputs: Sequence[Any]) -> Tensor:
    for value in outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("the model has no floating-point output to compare")
