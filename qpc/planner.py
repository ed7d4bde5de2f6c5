"""`qpc.plan`: what a model would become at each of several budgets, without compiling it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpc.budget import PS_PER_S, Budget
from qpc.compiler import captured, group, make_report, model_bytes, prepare
from qpc.cost import Cost, Weight
from qpc.errors import BudgetError, QuantizerError
from qpc.ir.annotation import annotation
from qpc.ir.program import Program
from qpc.latency import LatencyModel
from qpc.options import Options, latency_for
from qpc.passes.allocate import Allocate, other_bytes
from qpc.passes.pipeline import Pipeline
from qpc.passes.timed_items import Timing
from qpc.progress import Progress, silent, track
from qpc.quant.palette import Effort, default_palette
from qpc.quant.quantizer import Quantizer
from qpc.report import Report
from qpc.sensitivity import Linearity, Loss, Method, Sensitivities
from qpc.solver import Allocation, decibels, water_filling


@dataclass(frozen=True)
class Use:
    """How much one quantizer is used; quantizer and rate [bits per weight] are None for what stays as it is."""

    quantizer: str | None
    rate: float | None
    linears: int
    weights: int


@dataclass(frozen=True)
class Point:
    """What the model would be at one budget.

    bits_per_weight: stored bits, over all linears that may be quantized. weight_bytes: of these linears. model_bytes: of all tensors of the
        checkpoint.
    predicted_loss: of `Plan.loss`, with the error feedback of `Plan.calibration`. bound: what ideal Gaussian quantizers would leave at as
        many bits (`qpc.solver.water_filling`); decibels: how far above it the prediction lies, None if it is 0.
    solver_gap: relative distance to the proven optimum. latency_s: predicted time of the linears that may be quantized, in a step of so
        many sequences (`batch`); None if no GPU is named. uses: by rising rate, what stays as it is last.
    """

    budget: str
    bits_per_weight: float
    weight_bytes: int
    model_bytes: int
    predicted_loss: float
    bound: float
    decibels: float | None
    solver_gap: float
    latency_s: float | None
    batch: int | None
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Plan:
    """Points in the order of the budgets.

    singles: the model with one quantizer of the palette for all linears, by rising rate. weights: of the linears that may be quantized.
    model_bytes_before, other_bytes: of all tensors as given, and of those that no budget changes. loss: what is predicted.
    calibration: the inputs behind error feedback, in words, or None. sensitivity: how what each linear matters was estimated. linearity:
        whether the loss was found to grow as predictions assume; None: it was not checked. gpu: whose times are predicted, or None.
    report: layer by layer, if there is one budget.
    """

    points: tuple[Point, ...]
    singles: tuple[Point, ...]
    weights: int
    model_bytes_before: int
    other_bytes: int
    loss: Loss
    effort: str
    seed: int
    calibration: str | None
    sensitivity: Method
    linearity: Linearity | None
    gpu: str | None
    report: Report | None

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes."""
        return asdict(self)


def plan(
    model: nn.Module,
    budgets: Iterable[Budget | Fraction | float | str],
    *,
    effort: Effort | str = Effort.DEFAULT,
    exclude: Iterable[str] = (),
    seed: int = 0,
    same_quantizer_in_group: bool = False,
    rotation_block: int | None = None,
    fold: bool = False,
    embeddings: Fraction | float | str | None = None,
    calibration: object = "self",
    tokenizer: Any | None = None,
    row_feedback: object = "auto",
    example_inputs: tuple[Tensor, ...] | None = None,
    sensitivity: object = Method.GRADIENT,
    sensitivities: Sensitivities | None = None,
    gpu: LatencyModel | Path | str | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Plan:
    """Predict size and loss of a model at each budget, and its time if a GPU is named; the model is left as it is.

    Arguments are those of `qpc.compile`, which allocates the same with the same ones. Embeddings, if asked for, are packed to know their
    size; the linears are not. What the predictions rest on is measured once and kept (QPC_CACHE).

    Raises `QpcError` if the model or an option cannot be used, or a budget cannot be kept; the message names the nearest feasible ones.
    """
    wanted = [Budget.of(budget) for budget in budgets]
    if not wanted:
        raise BudgetError("a plan needs one budget or more")
    options = Options.of(
        wanted[0],
        effort=effort,
        exclude=exclude,
        seed=seed,
        same_quantizer_in_group=same_quantizer_in_group,
        rotation_block=rotation_block,
        fold=fold,
        embeddings=embeddings,
        calibration=calibration,
        tokenizer=tokenizer,
        row_feedback=row_feedback,
        sensitivity=sensitivity,
        gpu=latency_for(gpu, *wanted),
        batch=batch,
    )
    program = captured(model, options, example_inputs)
    group(program, options)
    given = prepare(program, options, sensitivities, progress, rounds=False).sensitivities
    weights = options.allocate(wanted[0], given).weights(program)
    subject = _Subject(tuple(weights.values()), other_bytes(program, weights))
    report = None
    if len(wanted) == 1:
        Pipeline((options.allocate(wanted[0], given),)).run(program)
        assert isinstance(program.allocation, Allocation), "the pass leaves it"
        found = [program.allocation]
        report = make_report(program, options)
    else:
        found = [options.allocate(budget, given).solve(program) for budget in track(wanted, "plan", len(wanted), progress)]
    points = [
        subject.point(str(budget), each.cost, each.gap, _by_weight(program, each), options.timing_within(budget))
        for budget, each in zip(wanted, found, strict=True)
    ]
    return Plan(
        points=tuple(points),
        singles=tuple(_singles(program, options, given, subject)),
        weights=subject.count,
        model_bytes_before=model_bytes(program.module),
        other_bytes=subject.other_bytes,
        loss=given.loss,
        effort=str(options.effort),
        seed=seed,
        calibration=program.calibration,
        sensitivity=given.method,
        linearity=given.linearity,
        gpu=None if options.latency is None else options.latency.title,
        report=report,
    )


@dataclass(frozen=True)
class _Subject:
    """The weights to allocate, and the bytes of everything else."""

    weights: tuple[Weight, ...]
    other_bytes: int

    @property
    def count(self) -> int:
        """Weights in all."""
        return sum(weight.shape.weights for weight in self.weights)

    def point(self, budget: str, cost: Cost, gap: float, quantizers: Sequence[Quantizer | None], timing: Timing | None) -> Point:
        """quantizers: of each weight. timing: how the time of the cost was counted, if it was."""
        counts = [weight.shape.weights for weight in self.weights]
        bound = water_filling([weight.sensitivity for weight in self.weights], counts, 8 * cost.weight_bytes).loss
        uses = []
        for quantizer in sorted(set(quantizers), key=lambda each: math.inf if each is None else each.rate):
            sizes = [count for count, other in zip(counts, quantizers, strict=True) if other == quantizer]
            name, rate = (None, None) if quantizer is None else (str(quantizer), float(quantizer.rate))
            uses.append(Use(name, rate, len(sizes), sum(sizes)))
        return Point(
            budget=budget,
            bits_per_weight=8 * cost.weight_bytes / sum(counts),
            weight_bytes=cost.weight_bytes,
            model_bytes=cost.weight_bytes + self.other_bytes,
            predicted_loss=cost.distortion,
            bound=bound,
            decibels=decibels(cost.distortion, bound) if cost.distortion > 0 and bound > 0 else None,
            solver_gap=gap,
            latency_s=None if timing is None else cost.latency_ps / PS_PER_S,
            batch=None if timing is None else timing.batch,
            uses=tuple(uses),
        )


def _singles(program: Program, options: Options, given: Sensitivities, subject: _Subject) -> Iterator[Point]:
    """The points of each quantizer that supports every weight, with all legal groups fused."""
    timing = options.timing_within(options.budget)
    for quantizer in default_palette(options.effort).quantizers:
        if all(_supports(quantizer, weight) for weight in subject.weights):
            found = Allocate.uniform(quantizer, given, timing).solve(program)
            yield subject.point(f"all {quantizer}", found.cost, 0.0, [quantizer] * len(subject.weights), timing)


def _supports(quantizer: Quantizer, weight: Weight) -> bool:
    try:
        weight.cost(quantizer)
    except QuantizerError:
        return False
    return True


def _by_weight(program: Program, found: Allocation) -> list[Quantizer | None]:
    """The quantizer of each weight, in the order of `Allocate.weights`."""
    chosen = {site.weight: found.choices[site.name] for node in program.linears() if (site := annotation(node).site) is not None}
    return list(chosen.values())
