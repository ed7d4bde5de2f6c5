"""The picture of a plan: predicted loss against the size of the checkpoint, and against the time of the linears."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpc.budget import Budget
from qpc.errors import UsageError
from qpc.planner import Plan, Point
from qpc.sensitivity import Loss

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise `UsageError` if no picture can be drawn to this file, before anything takes time."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} has no known format of pictures; known: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a directory; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a picture needs matplotlib: pip install 'qpc[plot]'") from error


def draw_plan(plan: Plan, path: Path, title: str) -> None:
    """Draw the points of a plan, with one quantizer for all linears and ideal Gaussian quantizers beside them.

    If the plan has times, a second picture beside it is drawn against them.

    Raises `UsageError` if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7 if plan.gpu is None else 11.5, 4.2), layout="constrained")
    size_axes, *time_axes = figure.subplots(1, 1 if plan.gpu is None else 2, sharey=True, squeeze=False)[0]
    by_size = _unit(plan.model_bytes_before, "size of the checkpoint", {"GB": 1e9, "MB": 1e6, "kB": 1e3}, lambda point: point.model_bytes)
    for_time = all(Budget.parse(point.budget).latency_ps is not None for point in plan.points)
    _draw(size_axes, plan, by_size, "plan, chosen for its time" if for_time else "plan")
    for axes in time_axes:
        longest = max(point.latency_s or 0.0 for point in plan.points)
        batch = plan.points[0].batch
        by_time = _unit(
            longest, f"time of the linears at batch {batch}, {plan.gpu}", {"ms": 1e-3, "us": 1e-6}, lambda point: point.latency_s or 0.0
        )
        _draw(axes, plan, by_time, "plan" if for_time else "plan, chosen for its size", bound=False)
    loss = "predicted KL, nats per token" if plan.loss is Loss.KL else "predicted relative error of the output"
    size_axes.set(yscale="log", ylabel=loss)
    size_axes.set_title(f"{title}, without error feedback", loc="left", fontsize=10.5)

    def to_bits(size: Any) -> Any:
        return 8 * (size * by_size.unit - plan.other_bytes) / plan.weights

    def to_size(rate: Any) -> Any:
        return (plan.other_bytes + rate * plan.weights / 8) / by_size.unit

    bits = size_axes.secondary_xaxis("top", functions=(to_bits, to_size))
    bits.set_xlabel("bits per weight of the linears", fontsize=9)
    bits.xaxis.set_major_formatter(ScalarFormatter())
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Abscissa:
    """What points are drawn against, in units of so many bytes or seconds."""

    label: str
    unit: float
    of: Callable[[Point], float]

    def curve(self, points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """Coordinates of points."""
        return [self.of(point) / self.unit for point in points], [point.predicted_loss for point in points]


def _unit(largest: float, what: str, units: Mapping[str, float], of: Callable[[Point], float]) -> _Abscissa:
    """In the largest unit, of descending ones, of which there are two or more; else in the last."""
    name = next((name for name, unit in units.items() if largest >= 2 * unit), list(units)[-1])
    return _Abscissa(f"{what}, {name}", units[name], of)


def _draw(axes: Any, plan: Plan, x: _Abscissa, label: str, bound: bool = True) -> None:
    """The curves of a plan. bound: with that of ideal quantizers, which have a size but no time.

    Points that were not chosen along this axis need not fall along it; they are not joined then.
    """
    points = sorted((point for point in plan.points if point.predicted_loss > 0), key=x.of)
    places, losses = x.curve(points)
    if bound:
        axes.plot(places, [point.bound for point in points], "--", color="#8d8d8d", linewidth=1.4, label="bound: ideal Gaussian quantizers")
    axes.plot(*x.curve(_within(plan.singles, points, x)), "s", color="#78a9ff", markersize=5, label="one quantizer for all linears")
    line = "o-" if losses == sorted(losses, reverse=True) else "o"
    axes.plot(places, losses, line, color="#0f62fe", markersize=4.5, linewidth=1.8, label=label)
    axes.set_xlabel(x.label)
    axes.grid(which="major", alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False)


def _within(singles: Sequence[Point], points: Sequence[Point], x: _Abscissa) -> list[Point]:
    """The single quantizers in the place that the points span, with a little on either side."""
    if not points:
        return []
    low, high = x.of(points[0]), x.of(points[-1])
    margin = 0.03 * (high - low)
    return [point for point in singles if low - margin <= x.of(point) <= high + margin]
