"""Draw the gap to the bound against the rate: `python -m benchmarks distortion --plot FILE`, or from a committed result by itself."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.rows import RESULTS, read_rows

BLUES = {"fast": "#9ec5ff", "default": "#0f62fe", "high": "#0043ce", "max": "#001d6c"}
OTHERS = {
    "scalar": ("#8d8d8d", ":"),
    "vector, dimension 2": ("#8d8d8d", "--"),
    "vector, dimension 4": ("#8d8d8d", "-"),
    "paper TCQ": ("#da1e28", "-"),
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One curve for each preset of the trellis and each other family; the bound is the axis."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for preset, colour in BLUES.items():
        _curve(axes, [r for r in rows if r["quantizer"] == "trellis" and r["preset"] == preset], f"qpc trellis, {preset}", colour, "-")
    for name, (colour, style) in OTHERS.items():
        _curve(axes, [r for r in rows if r["quantizer"] == name], name.replace("paper TCQ", "paper's TCQ"), colour, style)
    axes.set(xlabel="bits per weight", ylabel="distortion above the bound 2$^{-2R}$ [dB]", ylim=(0, 4.6), xlim=(0.9, 6.1))
    axes.set_title("Mean squared error of a Gaussian, at half bits and of pure families", loc="left", fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _curve(axes: Any, rows: list[dict[str, Any]], label: str, colour: str, style: str) -> None:
    points = sorted((row["rate"], row["gap_db"]) for row in rows if (2 * row["rate"]) % 1 == 0)
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=label)


def main() -> None:
    """Draw a committed result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=RESULTS / "nvidia-h100" / "distortion.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "nvidia-h100" / "distortion.png")
    options = parser.parse_args()
    draw(read_rows(options.measured), options.out)


if __name__ == "__main__":
    main()
