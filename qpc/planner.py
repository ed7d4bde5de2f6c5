"""`qpc.plan`: what a model would become at each of several budgets, without compiling it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from qpc.budget import Budget
from qpc.compiler import Options, captured, group, make_report, model_bytes, parse_rate, prepare
from qpc.cost import Cost, Weight
from qpc.errors import BudgetError, QuantizerError
from qpc.ir.annotation import annotation
from qpc.ir.program import Program
from qpc.passes.allocate import other_bytes
from qpc.passes.pipeline import Pipeline
from qpc.progress import Progress, silent, track
from qpc.quant.palette import Effort, Palette, default_palette
from qpc.quant.quantizer import Quantizer
from qpc.report import Report
from qpc.sensitivity import Loss, Sensitivities
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
    predicted_loss: of `Plan.loss`, without error feedback. bound: what ideal Gaussian quantizers would leave at as many bits
        (`qpc.solver.water_filling`); decibels: how far above it the prediction lies, None if it is 0.
    solver_gap: relative distance to the proven optimum. uses: by rising rate, what stays as it is last.
    """

    budget: str
    bits_per_weight: float
    weight_bytes: int
    model_bytes: int
    predicted_loss: float
    bound: float
    decibels: float | None
    solver_gap: float
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Plan:
    """Points in the order of the budgets.

    singles: the model with one quantizer of the palette for all linears, by rising rate. weights: of the linears that may be quantized.
    model_bytes_before, other_bytes: of all tensors as given, and of those that no budget changes. loss: what is predicted.
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
    embeddings: Fraction | float | str | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
    sensitivities: Sensitivities | None = None,
    progress: Progress = silent,
) -> Plan:
    """Predict size and loss of a model at each budget; the model is left as it is.

    Arguments are those of `qpc.compile`, which allocates the same with the same ones. Embeddings, if asked for, are packed to know their
    size; the linears are not.

    Raises `QpcError` if the model or an option cannot be used, or a budget cannot be kept; the message names the nearest feasible ones.
    """
    wanted = [Budget.of(budget) for budget in budgets]
    if not wanted:
        raise BudgetError("a plan needs one budget or more")
    rate, exclusions = parse_rate(embeddings), tuple(exclude)
    options = Options(wanted[0], Effort.parse(effort), exclusions, seed, same_quantizer_in_group, rotation_block, rate, None)
    program = captured(model, options, example_inputs)
    group(program, options)
    given = prepare(program, options, sensitivities, progress)
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
        subject.point(str(budget), each.cost, each.gap, _by_weight(program, each)) for budget, each in zip(wanted, found, strict=True)
    ]
    return Plan(
        points=tuple(points),
        singles=tuple(subject.singles(default_palette(options.effort))),
        weights=subject.count,
        model_bytes_before=model_bytes(program.module),
        other_bytes=subject.other_bytes,
        loss=given.loss,
        effort=str(options.effort),
        seed=seed,
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

    def point(self, budget: str, cost: Cost, gap: float, quantizers: Sequence[Quantizer | None]) -> Point:
        """quantizers: of each weight."""
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
            uses=tuple(uses),
        )

    def singles(self, palette: Palette) -> Iterator[Point]:
        """The points of each quantizer that supports every weight."""
        for quantizer in palette.quantizers:
            with suppress(QuantizerError):
                costs = [weight.cost(quantizer).weighted(weight.sensitivity) for weight in self.weights]
                yield self.point(f"all {quantizer}", sum(costs, start=Cost(0, 0.0)), 0.0, [quantizer] * len(costs))


def _by_weight(program: Program, found: Allocation) -> list[Quantizer | None]:
    """The quantizer of each weight, in the order of `Allocate.weights`."""
    chosen = {site.weight: found.choices[site.name] for node in program.linears() if (site := annotation(node).site) is not None}
    return list(chosen.values())
