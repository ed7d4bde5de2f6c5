"""What the GPU benchmarks share: the quantizers that they measure, compiling ahead, and how a run ends."""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters import DEFAULT, Variant, multiplications
from benchmarks.rows import BenchmarkError, write_rows
from benchmarks.timing import Card, measure_card, require_gpu
from benchmarks.weights import Shape, activations, random_weights
from qpc.kernels.fused import Copies, Finish
from qpc.kernels.warpgroup import Product
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.quantizer import Quantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.vector import VectorQuantizer

MAX_WORKERS = 12


@dataclass(frozen=True)
class Subject:
    """A quantizer under its names in a row of results. family: that of the operator; preset: the effort of a trellis, else empty."""

    family: str
    preset: str
    quantizer: Quantizer

    @property
    def rate(self) -> float:
        """Nominal bits per weight."""
        return float(self.quantizer.rate)

    @property
    def row(self) -> dict[str, Any]:
        """The first columns of a row."""
        return {"family": self.family, "preset": self.preset, "rate": self.rate}


def trellis(*rates: Fraction) -> tuple[Subject, ...]:
    """Trellis quantizers of the default effort at some rates."""
    return tuple(Subject("trellis", str(Effort.DEFAULT), trellis_at(rate, Effort.DEFAULT)) for rate in rates)


def scalar(*bits: int) -> tuple[Subject, ...]:
    """Scalar quantizers."""
    return tuple(Subject("scalar", "", ScalarQuantizer(each)) for each in bits)


def vector(*rates: int) -> tuple[Subject, ...]:
    """Vector quantizers of dimension 2 at some whole rates."""
    return tuple(Subject("vector", "", VectorQuantizer(2, 2 * each)) for each in rates)


def options_of(
    name: str,
    text: str | None,
    arguments: list[str],
    budget_s: float,
    quick_budget_s: float,
    draws: bool = False,
    predicts: bool = False,
    varies: bool = False,
) -> argparse.Namespace:
    """The options that every GPU benchmark takes.

    budget_s, quick_budget_s: what --budget-s is unless it is given. draws: whether there is a --plot; predicts: a --profile; varies:
    what `add_variant` adds.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, after each of them")
    if draws:
        parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the rows into this folder")
    if predicts:
        parser.add_argument("--profile", type=Path, metavar="FILE", help="latency table that predicts (what qpc knows of this GPU)")
        parser.add_argument("--again", type=Path, metavar="FILE", help="predict what this file has measured, without a GPU")
    if varies:
        add_variant(parser)
    parser.add_argument("--quick", action="store_true", help="only the rows that tell most")
    default = f"start no measurement after this many seconds ({budget_s:g}, quick: {quick_budget_s:g})"
    parser.add_argument("--budget-s", type=float, metavar="S", help=default)
    options = parser.parse_args(arguments)
    if options.budget_s is None:
        options.budget_s = quick_budget_s if options.quick else budget_s
    return options


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Options of what multiplies on integer tensor cores."""
    products, finishes = [str(each) for each in Product], [str(each) for each in Finish]
    parser.add_argument("--product", choices=products, default=str(DEFAULT.product), help="instruction that multiplies (%(default)s)")
    parser.add_argument("--copies", type=Copies, choices=list(Copies), default=DEFAULT.copies, help="how bytes come in (%(default)s)")
    parser.add_argument("--finish", choices=finishes, help="how sums are put together (as plans say)")


def variant_of(options: argparse.Namespace) -> Variant:
    """What the options of `add_variant` ask for."""
    finishes = {str(each): each for each in Finish}
    return Variant(Product(options.product), finishes[options.finish] if options.finish else None, copies=options.copies)


@dataclass(frozen=True)
class Run:
    """One run of a benchmark on one GPU: its clock, and its file."""

    name: str
    device: torch.device
    card: Card
    path: Path | None
    budget_s: float
    started_s: float

    @staticmethod
    def begin(name: str, path: Path | None, budget_s: float) -> "Run":
        """Find the GPU and measure it. Raises `BenchmarkError`."""
        started_s = time.monotonic()
        device = require_gpu()
        torch.manual_seed(0)
        card = measure_card(device)
        print(*(f"{key} {value}" for key, value in card.row.items()), sep=", ", flush=True)
        return Run(name, device, card, path, budget_s, started_s)

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.started_s

    def record(self, measured: Iterable[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
        """Take rows until the time is spent; print and write each at once."""
        rows: list[dict[str, Any]] = []
        for row in measured:
            rows.append(row)
            print(show(row) if "error" not in row else f"FAILED {row}", flush=True)
            write_rows(self.path, self.name, rows, self.card.row)
            if self.elapsed_s > self.budget_s:
                print(f"stopped: {self.budget_s:g} s are spent; the file holds what was measured", flush=True)
                break
        print(f"{len(rows)} rows in {self.elapsed_s:.0f} s", flush=True)
        return rows


def compile_ahead(jobs: Sequence[tuple[Quantizer, tuple[Shape, ...], int]], *variants: Variant) -> None:
    """Run each job once in processes of their own, so that Triton's cache on disk holds their kernels. jobs: quantizer, shapes, batch; of
    each of the variants, by default of what the operators take.

    Jobs that fail here fail again where it is reported.
    """
    started_s = time.monotonic()
    tasks = list(product(jobs, variants or (DEFAULT,)))
    workers = max(1, min(MAX_WORKERS, len(tasks), (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_once, *job, variant) for job, variant in tasks]
        failed = [error for future in futures if (error := future.exception()) is not None]
    print(f"{len(tasks)} kinds of launches compiled in {time.monotonic() - started_s:.0f} s, {len(failed)} failed", flush=True)
    for error in failed[:3]:
        print(f"  {type(error).__name__}: {str(error)[-300:]}", file=sys.stderr, flush=True)


def run_once(quantizer: Quantizer, shapes: tuple[Shape, ...], batch: int, variant: Variant = DEFAULT) -> None:
    """Multiply once by a weight of each shape."""
    device = torch.device("cuda")
    for shape in shapes:
        weights = random_weights(quantizer, shape, 1, device)
        multiplications(weights, activations(batch, shape[1], device), variant)[0]()
    torch.cuda.synchronize()


def require_all(rows: Sequence[dict[str, Any]]) -> None:
    """The end of a run. Raises `BenchmarkError` if a row has an `error`."""
    failed = [row for row in rows if "error" in row]
    if failed:
        raise BenchmarkError(f"{len(failed)} of {len(rows)} rows failed; the first: {failed[0]['error']}")


def failure(error: Exception) -> dict[str, str]:
    """The column of a row that has no time, and why."""
    return {"error": f"{type(error).__name__}: {str(error)[-400:]}"}
