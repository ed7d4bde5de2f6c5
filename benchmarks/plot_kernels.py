"""Pictures of `benchmarks kernels`: time against bits, time against batch, and share of the bandwidth against bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.summary import OTHERS, LayerSum, layer_sums, shape_of

BLUES = ("#9ec5ff", "#4589ff", "#0f62fe", "#0043ce", "#001d6c")
FAMILIES = {"scalar": ("s", "#8a3ffc"), "vector": ("^", "#009d9a")}
OTHER_COLOURS = ("#6f6f6f", "#b28600", "#da1e28", "#ff832b", "#9f1853")


NAMES = ("bits", "batch", "roofline")


def draw(rows: Sequence[dict[str, Any]], gpu: str, read_gb_s: float, folder: Path) -> list[Path]:
    """All pictures that these rows of `benchmarks kernels` have the figures for; returns their files, `kernels-NAME.png`."""
    bits, batch, roofline = (folder / f"kernels-{name}.png" for name in NAMES)
    made = []
    if sums := layer_sums(rows):
        draw_bits(sums, gpu, read_gb_s, bits)
        draw_batch(sums, gpu, batch)
        made += [bits, batch]
    if any(row["batch"] == 1 and row["family"] == "trellis" and "error" not in row for row in rows):
        draw_roofline(rows, gpu, read_gb_s, roofline)
        made.append(roofline)
    return made


def draw_bits(sums: Sequence[LayerSum], gpu: str, read_gb_s: float, path: Path) -> None:
    """Time of a decoder layer's linears against bits, at batch 1 and 8 or the nearest measured, between bf16 and the memory floor."""
    batches = sorted({each.batch for each in sums if each.batch <= 8})
    shown = [batches[0], batches[-1]] if len(batches) > 1 else batches
    figure, panels = plt.subplots(1, len(shown), figsize=(5.4 * len(shown), 4.8), layout="constrained", squeeze=False, sharey=True)
    for axes, batch in zip(panels[0], shown, strict=True):
        here = [each for each in sums if each.batch == batch]
        trellis = [(each.rate, each.us) for each in here if each.family == "trellis"]
        axes.axhline(here[0].bf16_us, color="#393939", linewidth=1.4, label="bf16 F.linear")
        if trellis:
            axes.plot(*zip(*trellis, strict=True), "o-", color="#0f62fe", markersize=4.5, linewidth=1.8, label="qpc trellis")
        for family, (marker, colour) in FAMILIES.items():
            points = [(each.rate, each.us) for each in here if each.family == family]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5.5, label=f"qpc {family}")
        for colour, (column, other) in zip(OTHER_COLOURS, OTHERS.items(), strict=True):
            if column in here[0].others:
                axes.plot(other.bits, here[0].others[column], "x", color=colour, markersize=6, markeredgewidth=1.8, label=other.name)
        floor = sorted({(each.rate, each.floor_us(read_gb_s)) for each in here})
        axes.fill_between(*zip(*floor, strict=True), color="#e0e0e0", linewidth=0, label="memory floor")
        axes.set(xlabel="bits per weight", ylim=(0, None))
        axes.set_title(f"{gpu}, batch {batch}", loc="left", fontsize=10)
        _tidy(axes)
    panels[0][0].set_ylabel("four linears of a Llama 3.1 8B layer [us]")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


def draw_batch(sums: Sequence[LayerSum], gpu: str, path: Path) -> None:
    """The same against the batch: one curve for each rate of the trellis, bf16 and the other libraries."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    trellis = [each for each in sums if each.family == "trellis"]
    rates = sorted({each.rate for each in trellis})
    colours = plt.get_cmap("Blues")
    for index, rate in enumerate(rates):
        points = [(each.batch, each.us) for each in trellis if each.rate == rate]
        colour = colours(0.35 + 0.6 * index / max(1, len(rates) - 1))
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6, label=f"qpc trellis, {rate:g} bits")
    by_batch = {each.batch: each for each in sums}
    axes.plot(
        *zip(*((b, s.bf16_us) for b, s in sorted(by_batch.items())), strict=True), color="#393939", linewidth=1.4, label="bf16 F.linear"
    )
    for colour, (column, other) in zip(OTHER_COLOURS, OTHERS.items(), strict=True):
        points = [(batch, each.others[column]) for batch, each in sorted(by_batch.items()) if column in each.others]
        if points:
            axes.plot(*zip(*points, strict=True), "--", color=colour, linewidth=1.1, label=other.name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(by_batch), [str(batch) for batch in sorted(by_batch)])
    axes.minorticks_off()
    axes.set(xlabel="batch", ylabel="four linears of a Llama 3.1 8B layer [us]", ylim=(0, None))
    axes.set_title(gpu, loc="left", fontsize=10)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_roofline(rows: Sequence[dict[str, Any]], gpu: str, read_gb_s: float, path: Path) -> None:
    """Share of the measured read bandwidth, which is the roof, against bits at batch 1: one curve for each shape."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    here = [row for row in rows if row["family"] == "trellis" and row["batch"] == 1 and "error" not in row]
    shapes = sorted({shape_of(row) for row in here}, key=lambda shape: shape[0] * shape[1])
    for colour, shape in zip(BLUES, shapes, strict=False):
        points = sorted((row["rate"], 100 * row["bandwidth_share"]) for row in here if shape_of(row) == shape)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6, label=f"{shape[0]} x {shape[1]}")
    axes.axhline(100, color="#393939", linewidth=1.4)
    axes.annotate(f"{read_gb_s:.0f} GB/s", (0.99, 100), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                  ha="right", fontsize=8)  # fmt: skip
    axes.set(xlabel="bits per weight", ylabel="codes and scales read, % of the read bandwidth", ylim=(0, 112))
    axes.set_title(f"{gpu}, qpc trellis, batch 1", loc="left", fontsize=10)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
