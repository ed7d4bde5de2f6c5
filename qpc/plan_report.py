"""A plan for people: a table of its points, and a summary of one."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qpc.planner import Plan, Point, Use
from qpc.report import duration, quiet_table, size, speed
from qpc.sensitivity import Loss


def points_table(plan: Plan) -> RenderableType:
    """One line for each budget."""
    table = quiet_table()
    table.add_column("budget", no_wrap=True)
    for title in ("bits", "model", loss_title(plan.loss), "above bound", "gap"):
        table.add_column(title, justify="right", no_wrap=True)
    if plan.gpu is not None:
        table.add_column("time", justify="right", no_wrap=True)
    table.add_column("bits of the quantizers")
    for point in plan.points:
        table.add_row(
            Text(point.budget),
            f"{point.bits_per_weight:.3f}",
            size(point.model_bytes),
            f"{point.predicted_loss:.4g}",
            above_bound(point),
            gap(point),
            *([] if point.latency_s is None else [duration(point.latency_s)]),
            Text(mixture(point.uses)),
        )
    return table


def point_summary(plan: Plan, point: Point) -> RenderableType:
    """What is predicted at one budget, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    ratio = plan.model_bytes_before / point.model_bytes if point.model_bytes else 0.0
    table.add_row("budget", Text(f"{point.budget}, effort {plan.effort}, seed {plan.seed}"))
    table.add_row("model", f"{size(plan.model_bytes_before)} -> {size(point.model_bytes)}, {ratio:.2f}x smaller")
    table.add_row("linears", f"{plan.weights / 1e6:.1f} M weights, {point.bits_per_weight:.3f} bits per weight, {size(point.weight_bytes)}")
    table.add_row("predicted", f"{loss_title(plan.loss)} {point.predicted_loss:.4g}{' nats per token' if plan.loss is Loss.KL else ''}")
    if point.latency_s is not None and point.batch is not None:
        table.add_row("time", Text(f"{speed(point.latency_s, point.batch)}: these linears alone, predicted for {plan.gpu}"))
    table.add_row("bound", f"{point.bound:.4g} with ideal Gaussian quantizers; the plan lies {above_bound(point)} above")
    table.add_row("solver", "optimal" if point.solver_gap <= 1e-6 else f"within {point.solver_gap:.2%} of the optimum")
    for use in point.uses:
        share = f"{use.linears} linear{'s' if use.linears > 1 else ''}, {use.weights / plan.weights:.1%} of the weights"
        table.add_row("quantizer", Text(f"{use.quantizer or 'none, as it is'}: {share}"))
    return table


def notes(plan: Plan) -> Iterator[str]:
    """What the predictions rest on, and what they leave out."""
    feedback = f"with error feedback ({plan.calibration})" if plan.calibration is not None else "without error feedback"
    linearity = "" if plan.linearity is None else f"; {plan.linearity}"
    yield f"{loss_title(plan.loss)} predicted {feedback}; sensitivities: {plan.sensitivity}{linearity}"
    if plan.gpu is not None:
        batches = " and ".join(sorted({str(point.batch) for point in plan.points}))
        yield (
            f"times are those of the linears that may be quantized in a step at batch {batches}, predicted for {plan.gpu}; "
            "attention, norms, embeddings, output heads and what is excluded come on top"
        )


def loss_title(loss: Loss) -> str:
    """A short name of what is predicted."""
    return "KL" if loss is Loss.KL else "error"


def above_bound(point: Point) -> str:
    """Decibels above ideal quantizers."""
    return "-" if point.decibels is None else f"{point.decibels:.2f} dB"


def gap(point: Point) -> str:
    """How far from the optimum the allocation may be."""
    return "0" if point.solver_gap <= 1e-6 else f"{point.solver_gap:.2%}"


def mixture(uses: tuple[Use, ...]) -> str:
    """The rates in a few words: "2.5 to 4, mostly 3 (45%)"."""
    kept = sum(use.linears for use in uses if use.rate is None)
    rated = [use for use in uses if use.rate is not None]
    parts = [f"{kept} as they are"] if kept else []
    if rated:
        most, total = max(rated, key=lambda use: use.weights), sum(use.weights for use in uses)
        spread = f"{rated[0].rate:g} to {rated[-1].rate:g}, mostly {most.rate:g} ({most.weights / total:.0%})"
        parts.insert(0, spread if len(rated) > 1 else f"{most.rate:g}")
    return "; ".join(parts)
