"""A report of one GPU from its result files: `python -m benchmarks report DIR`, for instance `benchmarks/results/nvidia-h100`.

Reads `kernels.json`, `prefill.json`, `transform.json`, `profile.json` and `layer.json` of the folder, those that are there, and writes
`REPORT.md` and the pictures of `benchmarks.plot_kernels` beside them. Measures nothing.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import BenchmarkError, read_head, read_rows
from benchmarks.summary import OTHERS, LayerSum, layer_sums, shape_of
from benchmarks.weights import LAYER, label

FILES = ("kernels", "prefill", "transform", "profile", "layer")


def main(arguments: list[str]) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="results of one GPU")
    folder = parser.parse_args(arguments).folder
    (folder / "REPORT.md").write_text(report(folder), encoding="utf-8")
    print(folder / "REPORT.md")


def report(folder: Path) -> str:
    """The report, and its pictures in the folder. Raises `BenchmarkError` if there is nothing to report on, or files of several GPUs."""
    found = {name: folder / f"{name}.json" for name in FILES if (folder / f"{name}.json").is_file()}
    if not found:
        raise BenchmarkError(f"{folder} holds none of {', '.join(f'{name}.json' for name in FILES)}")
    heads = {name: read_head(path) for name, path in found.items()}
    gpus = sorted({head["gpu"] for head in heads.values()})
    if len(gpus) > 1:
        raise BenchmarkError(f"{folder} holds results of several GPUs ({', '.join(gpus)}); a folder is for one")
    sections = [f"# {gpus[0]}", "\n".join(_measured_with(heads))]
    makers = {"kernels": _kernels, "prefill": _prefill, "transform": _transform, "profile": _profile, "layer": _predictions}
    for name, path in found.items():
        sections.append("\n".join(makers[name](read_rows(path), heads[name], folder)))
    return "\n\n".join(sections) + "\n"


def _measured_with(heads: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "Made by `python -m benchmarks report` from the result files in this folder. Times are medians, in us, of CUDA graphs over"
    yield "weights that come from memory. Each file was measured in one process, after its results were checked."
    yield ""
    columns = ("torch", "triton", "commit", "read_gb_s", "copy_gb_s", "launch_us")
    yield from _table(("file", *columns), ([f"`{name}.json`", *(head.get(column) for column in columns)] for name, head in heads.items()))


def _kernels(rows: Sequence[dict[str, Any]], head: dict[str, Any], folder: Path) -> Iterator[str]:
    from benchmarks.plot_kernels import draw

    yield "## Multiplication"
    if sums := layer_sums(rows):
        yield ""
        yield f"Sum of the four fused linears of a Llama 3.1 8B layer ({', '.join(map(label, LAYER))}) in us; in brackets how many times"
        yield "faster than bf16 `F.linear` in the same process. The activation is already rotated. The floor is codes and scales over the"
        yield "read bandwidth."
        yield ""
        yield from _layer(sums, head["read_gb_s"])
    for picture in draw(rows, head["gpu"], head["read_gb_s"], folder):
        yield ""
        yield f"![{picture.stem}]({picture.name})"
    worst = max((row["max_rel_error"] for row in rows if "error" not in row), default=None)
    yield ""
    yield f"Largest error of an element beyond its rounding to bfloat16, over the root mean square of its row: {_shown(worst)}."
    for batch in sorted({row["batch"] for row in rows} & {1, 8}):
        yield ""
        yield f"Each shape at batch {batch}, us (share of the read bandwidth):"
        yield ""
        yield from _shapes([row for row in rows if row["batch"] == batch])
    yield from _failures(rows)


def _layer(sums: Sequence[LayerSum], read_gb_s: float) -> Iterator[str]:
    batches = sorted({each.batch for each in sums})
    by_batch = {each.batch: each for each in sums}
    body: list[list[Any]] = [["bf16 `F.linear`", *(f"{by_batch[batch].bf16_us:.1f}" for batch in batches), ""]]
    for column, other in OTHERS.items():
        times = [by_batch[batch].others.get(column) for batch in batches]
        if any(times):
            ratios = [t and f"{t:.1f} ({by_batch[batch].bf16_us / t:.2f}x)" for t, batch in zip(times, batches, strict=True)]
            body.append([other.name, *ratios, ""])
    for family, rate in dict.fromkeys((each.family, each.rate) for each in sums):
        alike = {each.batch: each for each in sums if (each.family, each.rate) == (family, rate)}
        cells = [f"{alike[batch].us:.1f} ({alike[batch].ratio:.2f}x)" if batch in alike else None for batch in batches]
        body.append([f"**{family} {rate:g} bits**", *cells, f"{next(iter(alike.values())).floor_us(read_gb_s):.1f}"])
    yield from _table(("", *(f"batch {batch}" for batch in batches), "floor"), body)


def _shapes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    shapes = list(dict.fromkeys(shape_of(row) for row in rows))
    cells = {(row["family"], row["rate"], row["out_features"], row["in_features"]): row for row in rows if "error" not in row}
    bf16 = {shape_of(row): row["bf16_us"] for row in rows if "error" not in row}
    body: list[list[Any]] = [["bf16", *(bf16.get(shape) and f"{bf16[shape]:.1f}" for shape in shapes)]]
    for family, rate in sorted({(row["family"], row["rate"]) for row in rows}, key=lambda key: (key[0] != "trellis", key)):
        found = [cells.get((family, rate, *shape)) for shape in shapes]
        body.append([f"{family} {rate:g} bits", *(row and f"{row['us']:.1f} ({row['bandwidth_share']:.0%})" for row in found)])
    yield from _table(("", *map(label, shapes)), body)


def _prefill(rows: Sequence[dict[str, Any]], head: dict[str, Any], folder: Path) -> Iterator[str]:
    yield "## Many tokens"
    yield ""
    yield "A linear of 2,048 tokens with a packed weight, over the time of bf16; and the decoding of the weight to bfloat16 by itself."
    yield ""
    good = [row for row in rows if "error" not in row]
    columns = ("weight", "shape", "us", "bf16", "over bf16", "decoding us", "GB/s", "of the copy bandwidth")
    yield from _table(columns, (
        [f"{row['family']} {row['rate']:g} bits", label(shape_of(row)), f"{row['us']:.0f}", f"{row['bf16_us']:.0f}",
         f"{row['ratio']:.2f}", f"{row['dequantize_us']:.1f}", f"{row['dequantize_gb_s']:.0f}", f"{row['copy_share']:.0%}"]
        for row in good
    ))  # fmt: skip
    yield from _failures(rows)


def _transform(rows: Sequence[dict[str, Any]], head: dict[str, Any], folder: Path) -> Iterator[str]:
    yield "## Transform of the activation"
    yield ""
    good = [row for row in rows if "error" not in row]
    batches = sorted({row["batch"] for row in good})
    times = {(row["transform"], row["features"], row["batch"]): row["us"] for row in good}
    body = (
        [f"`{name}`", features, *(f"{times[name, features, batch]:.2f}" if (name, features, batch) in times else None for batch in batches)]
        for name, features in dict.fromkeys((row["transform"], row["features"]) for row in good)
    )
    yield from _table(("", "features", *(f"batch {batch} [us]" for batch in batches)), body)
    yield from _failures(rows)


def _profile(rows: Sequence[dict[str, Any]], head: dict[str, Any], folder: Path) -> Iterator[str]:
    yield "## Latency table"
    yield ""
    linears = [row for row in rows if "transform" not in row]
    shapes = {shape_of(row) for row in linears}
    rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in linears}))
    yield f"`profile.json`: {len(rows)} times of {len(shapes)} shapes at {rates} bits. One launch takes {head['launch_us']:.2f} us."
    yield from _failures(rows)


def _predictions(rows: Sequence[dict[str, Any]], head: dict[str, Any], folder: Path) -> Iterator[str]:
    yield "## Predicted and measured"
    yield ""
    yield "All linears of a Llama 3.1 8B layer with their transforms, in us; bits of query, key and value / output / gate and up / down."
    yield ""
    body = (
        [
            row["bits"],
            ("alone", "fused")[row["fused"]],
            row["batch"],
            f"{row['us']:.1f}",
            f"{row['predicted_us']:.1f}",
            f"{row['off']:+.1%}",
        ]
        for row in rows
        if "error" not in row
    )
    yield from _table(("bits", "linears", "batch", "measured", "predicted", "off"), body)
    yield from _failures(rows)


def _failures(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "error" in row:
            yield ""
            yield f"Failed: {', '.join(f'{key} {value}' for key, value in row.items())}"


def _table(columns: Sequence[str], body: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for cells in body:
        yield f"| {' | '.join(_shown(cell) for cell in cells)} |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
