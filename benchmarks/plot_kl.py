"""Draw KL against bits per weight from committed results: `python -m benchmarks.plot_kl`.

Reads what `benchmarks.quality` wrote, and the simulated figures of the paper on the same protocol; it draws nothing else.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=RESULTS / "nvidia-h200" / "smollm2-default.json")
    parser.add_argument("--others", type=Path, default=RESULTS / "simulated" / "paper-smollm2.json")
    parser.add_argument("--tokens", type=int, default=5120, help="the protocol on which the others were measured")
    parser.add_argument("--out", type=Path, default=Path("docs/kl-vs-bits.png"))
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    curves = dict(json.loads(options.others.read_text())["curves"])
    curves["qpc, measured"] = [{"bits": row["bits"], "kl": row[f"at_{options.tokens}"]["kl"]} for row in measured["rows"]]
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (name, points), colour in zip(curves.items(), ("#b8b8b8", "#7a7a7a", "#0f62fe"), strict=True):
        ordered = sorted(points, key=lambda point: point["bits"])
        axes.plot(
            [p["bits"] for p in ordered], [p["kl"] for p in ordered], marker="o", markersize=4.5, linewidth=1.8, color=colour, label=name
        )
    axes.set(yscale="log", xlabel="bits per weight, everything counted", ylabel="mean KL, nats per token")
    axes.set_title("SmolLM2-135M-Instruct on WikiText-2, without calibration data", loc="left", fontsize=10.5)
    axes.grid(which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
