"""Draw KL against bits per weight from committed results: `python -m benchmarks.plot_kl`.

Reads what `benchmarks quality` wrote, and the simulated figures of the paper on the same protocol; it draws nothing else.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.rows import RESULTS, read_rows

CURVES = {"none": ("qpc, one rate, no calibration", "#78a9ff"), "self": ("qpc, one rate, calibrated on its own text (default)", "#0f62fe")}


def main() -> None:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=RESULTS / "nvidia-h100" / "quality.json")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--others", type=Path, default=RESULTS / "simulated" / "paper-smollm2.json")
    parser.add_argument("--out", type=Path, default=Path("docs/kl-vs-bits.png"))
    options = parser.parse_args()
    rows = [row for row in read_rows(options.measured) if row["model"] == options.model and row["method"] == "single rate"]
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (name, points), colour in zip(json.loads(options.others.read_text())["curves"].items(), ("#b8b8b8", "#7a7a7a"), strict=True):
        _curve(axes, [(point["bits"], point["kl"]) for point in points], name, colour)
    for calibration, (label, colour) in CURVES.items():
        _curve(axes, _means([row for row in rows if row["calibration"] == calibration and row["effort"] == "default"]), label, colour)
    axes.set(yscale="log", xlabel="bits per weight, everything counted", ylabel="mean KL, nats per token")
    axes.set_title("SmolLM2-135M-Instruct on WikiText-2, no data needed", loc="left", fontsize=10.5)
    axes.grid(which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)


def _means(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Bits and mean KL over the seeds of each budget."""
    budgets = dict.fromkeys(row["budget"] for row in rows)
    alike = [[row for row in rows if row["budget"] == budget] for budget in budgets]
    return [(fmean(row["bits"] for row in some), fmean(row["kl"] for row in some)) for some in alike]


def _curve(axes: Any, points: list[tuple[float, float]], label: str, colour: str) -> None:
    bits, kl = zip(*sorted(points), strict=True)
    axes.plot(bits, kl, marker="o", markersize=4.5, linewidth=1.8, color=colour, label=label)


if __name__ == "__main__":
    main()
