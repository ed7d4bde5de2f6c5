"""Which codes no other beats in both cost and loss, and their picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates (both coordinates no greater, one less), by growing first coordinate."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    return sorted((index for index, point in enumerate(points) if not dominated(point)), key=lambda index: points[index])


def draw(rows: Sequence[dict[str, Any]], rates: Sequence[float], path: Path) -> None:
    """One panel per rate: gap in dB against clocks per weight, with the front and the Gaussian table's gap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(rates), figsize=(3.8 * len(rates), 4.8), layout="constrained", squeeze=False)
    numbers = {name: str(number) for number, name in enumerate(dict.fromkeys(row["code"] for row in rows if _counted(row)), start=1)}
    for axes, rate in zip(panels[0], rates, strict=True):
        here = [row for row in rows if row["rate"] == rate and _counted(row)]
        points = [(row["clocks_per_weight"], row["gap_db"]) for row in here]
        front = pareto_front(points)
        axes.plot(*zip(*(points[index] for index in front), strict=True), drawstyle="steps-post", color="#0f62fe", linewidth=1.2)
        for index, (point, row) in enumerate(zip(points, here, strict=True)):
            axes.plot(*point, "o", color="#0f62fe" if index in front else "#9a9a9a", markersize=5)
            side = -9 if int(numbers[row["code"]]) % 2 else 5
            axes.annotate(numbers[row["code"]], point, xytext=(side, 3), textcoords="offset points", fontsize=8)
        for row in rows:
            if row["rate"] == rate and not _counted(row):
                axes.axhline(row["gap_db"], color="#555555", linestyle="--", linewidth=0.8)
        axes.set(xlabel="clocks per weight (sm_90)", ylabel="gap to the bound, dB", title=f"{rate:g} bits")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    legend = [plt.Line2D([], [], linestyle="", label=f"{number}  {name}") for name, number in numbers.items()]
    legend.append(plt.Line2D([], [], linestyle="--", color="#555555", linewidth=0.8, label="Gaussian table"))
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _counted(row: dict[str, Any]) -> bool:
    return row["instructions_per_weight"] is not None
