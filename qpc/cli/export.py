"""The command `qpc export`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import AsJson
from qpc.cli.output import print_json
from qpc.terminal import silent_stdout

EXAMPLES = (
    "qpc export OUT --onnx model.onnx",
    "qpc export OUT --onnx model.onnx --no-cache",
)


def export_model(
    compiled: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.", show_default=False)],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="File to write: model.onnx.", show_default=False)],
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="With keys and values as inputs and outputs.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write OUT as an ONNX file for stock ONNX Runtime, its codes still packed."""
    from qpc.integrations.onnx import export

    start_s = time.monotonic()
    with silent_stdout():
        files = export(compiled, onnx, cache=cache, overwrite=overwrite)
    size, elapsed_s = sum(file.stat().st_size for file in files), time.monotonic() - start_s
    if as_json:
        print_json({"files": [str(file) for file in files], "bytes": size, "cache": cache, "elapsed_s": round(elapsed_s, 3)})
    else:
        print(f"{', '.join(map(str, files))}: {size / 1e6:.1f} MB, written after {elapsed_s:.0f} s")
