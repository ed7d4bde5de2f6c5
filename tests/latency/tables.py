"""Latency profiles as a GPU might have given them."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from qpc.latency import Profile

ROWS = (512, 1024, 4096, 16384)
COLUMNS = (1024, 4096, 14336)
RATES = (2.0, 3.0, 4.0)
BATCHES = (1, 8)
LAUNCH_US = 1.25

Row = dict[str, Any]


def ideal_us(rate: float, rows: int, columns: int, launch_us: float = LAUNCH_US) -> float:
    """A kernel that reads a byte in a fixed time; a binary fraction, exact in JSON."""
    return launch_us + rate * rows * columns / 2**24


def multiplication(family: str, rate: float, batch: int, rows: int, columns: int, us: float) -> Row:
    """A row of `python -m benchmarks profile`."""
    return {"family": family, "rate": rate, "batch": batch, "out_features": rows, "in_features": columns, "us": us}


def transform(batch: int, features: int, us: float, name: str = "rotate_operand") -> Row:
    """A row of `python -m benchmarks transform`."""
    return {"transform": name, "features": features, "block": features, "batch": batch, "us": us, "us_p20": us, "us_p80": us}


def file(rows: Sequence[Row], gpu: str = "NVIDIA Toy") -> dict[str, Any]:
    """The whole file."""
    return {"format": 1, "measured_with": {"gpu": gpu, "launch_us": LAUNCH_US, "read_gb_s": 3000.0}, "rows": list(rows)}


def profile(rows: Sequence[Row]) -> Profile:
    """A profile of these rows, as it comes out of a file."""
    return Profile.parse({"toy.json": json.loads(json.dumps(file(rows)))})


def full(us: Callable[[float, int, int], float] = ideal_us) -> list[Row]:
    """Rows of every crossing, and of the transforms."""
    crossings = itertools.product(RATES, BATCHES, ROWS, COLUMNS)
    found = [multiplication("toy", rate, batch, rows, columns, us(rate, rows, columns)) for rate, batch, rows, columns in crossings]
    found += [
        multiplication("bf16", 16.0, batch, rows, columns, us(16.0, rows, columns))
        for batch in BATCHES
        for rows in ROWS
        for columns in COLUMNS
    ]
    return found + [transform(batch, columns, 1.5 + columns / 2**16) for batch in BATCHES for columns in COLUMNS]


def of_palette() -> list[Row]:
    """Rows for every family of the default palette and what stays as it is, over the shapes of tiny models."""
    rates = {"trellis": (1.0, 3.0, 6.0), "scalar": (6.0, 8.0), "bf16": (16.0,)}
    found = [
        multiplication(family, rate, batch, rows, columns, 1.0 + rate * rows * columns / 2**14)
        for family in rates
        for rate, batch, rows, columns in itertools.product(rates[family], BATCHES, (32, 128, 512), (64, 128))
    ]
    return found + [transform(batch, columns, 1.0) for batch in BATCHES for columns in (64, 128)]


@st.composite
def noisy(draw: st.DrawFn, gaps: bool = True) -> list[Row]:
    """Rows whose times are off by up to a third, with some rows missing; but never all of a batch in one table, which would refuse it."""
    rows = full()
    noise = draw(st.lists(st.integers(-30, 30), min_size=len(rows), max_size=len(rows)))
    missing = draw(st.sets(st.integers(1, len(rows) - 1), max_size=20)) if gaps else set()
    made = [{**row, "us": row["us"] * (1 + percent / 100)} for row, percent in zip(rows, noise, strict=True)]
    left = {_line(row) for index, row in enumerate(made) if index not in missing}
    return [row for index, row in enumerate(made) if index not in missing or _line(row) not in left]


def _line(row: Row) -> tuple[object, int]:
    """The table of a row, and its batch."""
    return row.get("family"), row["batch"]
