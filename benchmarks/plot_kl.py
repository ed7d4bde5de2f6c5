"""Draw KL against bits per weight from a result file.

The file holds {"title": …, "curves": {name: [{"bits": …, "kl": …}, …]}}; nothing is drawn that is not in it.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/kl-vs-bits.png"))
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in results["curves"].items():
        ordered = sorted(points, key=lambda point: point["bits"])
        axes.plot([point["bits"] for point in ordered], [point["kl"] for point in ordered], marker="o", markersize=4, label=name)
    axes.set(xlabel="bits per weight, everything counted", ylabel="mean KL, nats per token", yscale="log", title=results["title"])
    axes.grid(which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=160)


if __name__ == "__main__":
    main()
