"""The picture of a plan: predicted loss against the size of the checkpoint."""

from pathlib import Path
from typing import Any

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

    Raises `UsageError` if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    unit, name = (1e9, "GB") if plan.model_bytes_before >= 2e9 else (1e6, "MB") if plan.model_bytes_before >= 2e6 else (1e3, "kB")
    points = sorted((point for point in plan.points if point.predicted_loss > 0), key=lambda point: point.model_bytes)
    singles = _within(plan.singles, points)
    sizes = [point.model_bytes / unit for point in points]
    axes.plot(sizes, [point.bound for point in points], "--", color="#8d8d8d", linewidth=1.4, label="bound: ideal Gaussian quantizers")
    axes.plot(*_curve(singles, unit), "s", color="#78a9ff", markersize=5, label="one quantizer for all linears")
    axes.plot(*_curve(points, unit), "o-", color="#0f62fe", markersize=4.5, linewidth=1.8, label="plan")
    loss = "predicted KL, nats per token" if plan.loss is Loss.KL else "predicted relative error of the output"
    axes.set(yscale="log", xlabel=f"size of the checkpoint, {name}", ylabel=loss)
    axes.set_title(f"{title}, without error feedback", loc="left", fontsize=10.5)

    def to_bits(size: Any) -> Any:
        return 8 * (size * unit - plan.other_bytes) / plan.weights

    def to_size(rate: Any) -> Any:
        return (plan.other_bytes + rate * plan.weights / 8) / unit

    bits = axes.secondary_xaxis("top", functions=(to_bits, to_size))
    bits.set_xlabel("bits per weight of the linears", fontsize=9)
    bits.xaxis.set_major_formatter(ScalarFormatter())
    axes.grid(which="major", alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _within(singles: tuple[Point, ...], points: list[Point]) -> list[Point]:
    """The single quantizers of sizes that the points span, with a little on either side."""
    if not points:
        return []
    low, high = points[0].model_bytes, points[-1].model_bytes
    margin = 0.03 * (high - low)
    return [point for point in singles if low - margin <= point.model_bytes <= high + margin]


def _curve(points: list[Point], unit: float) -> tuple[list[float], list[Any]]:
    return [point.model_bytes / unit for point in points], [point.predicted_loss for point in points]
