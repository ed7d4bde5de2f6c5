"""Result files: rows of figures, with what they were measured on."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Version of the form of result files."""

RESULTS = Path(__file__).parent / "results"


class BenchmarkError(RuntimeError):
    """A benchmark cannot measure here, or what it should measure is wrong. The message is one line for the person who ran it."""


def machine(device: torch.device) -> str:
    """The processor that a row was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def write_rows(path: Path | None, benchmark: str, rows: Sequence[dict[str, Any]], card: Mapping[str, Any] | None = None) -> None:
    """Write rows as JSON, one a line, under the versions and the commit of the code; nothing if there is no path.

    card: what is known of the GPU, for the head of the file.
    """
    if path is None:
        return
    head = {"benchmark": benchmark, "commit": _commit(), "torch": torch.__version__, "triton": _version("triton")}
    head |= {"python": platform.python_version(), **(card or {})}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "format": {FORMAT},\n "measured_with": {json.dumps(head)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def read_head(path: Path) -> dict[str, Any]:
    """What such a file was measured with."""
    head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["measured_with"]
    return head


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
