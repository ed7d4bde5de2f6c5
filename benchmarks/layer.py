"""The linears of a decoder layer of Llama 3.1 8B, predicted and measured: `python -m benchmarks layer --profile FILE --json FILE`.

On the GPU that the latency table is of. One call is all launches of a layer in their order: transforms, and multiplications by weights that
come from memory. Columns of a row: bits of query, key and value / output / gate and up / down; fused, whether linears of one input run as
one; batch; us, us_p20, us_p80 of the layer; predicted_us, the sum that a budget in seconds counts; off, by how much that is longer than the
measured time; estimates, how many of its parts do not lie between measured ones. Fails if a table is off by more than 5 %.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import multiplications, transform_of
from benchmarks.plan import Run, compile_ahead, failure, options_of, require_all
from benchmarks.rows import BenchmarkError, read_rows
from benchmarks.timing import EXACT, Checked, check, copies_for, time_calls
from benchmarks.weights import GROUPS, Shape, activations, random_weights, stacked, weight_bytes
from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency import Latency, LatencyModel, Profile, latency_of
from qpc.quant.palette import trellis_at
from qpc.quant.quantizer import Quantizer

MIXTURES: tuple[tuple[str, ...], ...] = (
    ("3",) * 4, ("3.25", "4", "2.5", "3.5"), ("2.75",) * 4, ("2",) * 4, ("4",) * 4, ("2.25", "3", "4.5", "3.75")
)  # fmt: skip
"""Bits per weight of each group: rates that a table holds, and rates between."""

QUICK_MIXTURES = MIXTURES[:3]
BATCHES = (1, 8)
MOST_OFF = 0.05


@dataclass(frozen=True)
class Linear:
    """A linear to run, behind a transform of its own."""

    shape: Shape
    quantizer: Quantizer

    @property
    def nbytes(self) -> int:
        """Codes and scales."""
        return weight_bytes(self.quantizer, self.shape)


@dataclass(frozen=True)
class Work:
    """Calls of one linear. multiply: over so many different weights. expected: of the first, float64 [batch, out_features]."""

    transform: Callable[[], object]
    multiply: Sequence[Callable[[], Tensor]]
    expected: Tensor


def main(arguments: list[str]) -> None:
    """Predict, check, time, and say how far off the worst prediction is."""
    options = options_of("layer", __doc__, arguments, budget_s=120, quick_budget_s=60, predicts=True)
    run = None if options.again else Run.begin("layer", options.json, options.budget_s)
    try:
        model = latency_of(options.profile)
    except ProfileError as error:
        raise BenchmarkError(str(error)) from error
    print(f"predicted for {model.title}", flush=True)
    if run is None:
        rows = [row | compared(model, row) for row in read_rows(options.again)]
        for row in rows:
            print(show(row))
    else:
        mixtures = QUICK_MIXTURES if options.quick else MIXTURES
        compile_ahead(jobs_of(mixtures))
        rows = run.record(measure(run, model, mixtures), show)
    require_all(rows)
    worst = max(rows, key=lambda row: abs(row["off"]))
    print(f"the worst of {len(rows)} predictions is off by {worst['off']:+.1%}")
    if isinstance(model, Profile) and abs(worst["off"]) > MOST_OFF:
        raise BenchmarkError(f"{show(worst)}: a table must be within {MOST_OFF:.0%}; measure more of its lines")


def measure(run: Run, model: LatencyModel, mixtures: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """One row for each mixture, fused and not, at each batch; a failure is a row too."""
    for mixture in mixtures:
        for fused in (True, False):
            linears = linears_of(mixture, fused)
            for batch in BATCHES:
                row = {"bits": "/".join(mixture), "fused": fused, "batch": batch}
                try:
                    row |= time_calls(*layer(linears, batch, run.device)).row
                    row |= compared(model, row)
                except Exception as error:
                    row |= failure(error)
                yield row


def compared(model: LatencyModel, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that say what is predicted of it."""
    predicted = predict(model, linears_of(row["bits"].split("/"), row["fused"]), row["batch"])
    predicted_us = round(predicted.ps / 1e6, 3)
    return {"predicted_us": predicted_us, "off": round(predicted_us / row["us"] - 1, 4), "estimates": len(predicted.estimates)}


def jobs_of(mixtures: Sequence[Sequence[str]]) -> list[tuple[Quantizer, tuple[Shape, ...], int]]:
    """Everything that is multiplied, for `compile_ahead`."""
    shapes: dict[Quantizer, dict[Shape, None]] = {}
    for mixture in mixtures:
        for linear in (*linears_of(mixture, fused=True), *linears_of(mixture, fused=False)):
            shapes.setdefault(linear.quantizer, {})[linear.shape] = None
    return [(quantizer, tuple(found), batch) for quantizer, found in shapes.items() for batch in BATCHES]


def linears_of(mixture: Sequence[str], fused: bool) -> list[Linear]:
    """The linears of a layer in their order, with one rate for each group."""
    found = []
    for rate, members in zip(mixture, GROUPS, strict=True):
        quantizer = trellis_at(Fraction(rate))
        found += [Linear(shape, quantizer) for shape in ((stacked(members),) if fused else members)]
    return found


def predict(model: LatencyModel, linears: Sequence[Linear], batch: int) -> Latency:
    """The sum of their times."""
    times = [model.latency(LinearShape(*linear.shape), linear.quantizer, batch) for linear in linears]
    return sum(times[1:], start=times[0])


def layer(linears: Sequence[Linear], batch: int, device: torch.device) -> tuple[list[Callable[[], None]], Checked]:
    """Calls of whole layers over different weights, and the proof that the first computes what it should."""
    copies = copies_for(sum(linear.nbytes for linear in linears))
    works = [work_of(linear, batch, copies, device) for linear in linears]
    expected = torch.cat([work.expected for work in works], dim=1)
    proof = check(lambda: torch.cat([work.multiply[0]() for work in works], dim=1), expected, EXACT)

    def run(copy: int) -> None:
        for work in works:
            work.transform()
            work.multiply[copy]()

    return [partial(run, copy) for copy in range(copies)], proof


def work_of(linear: Linear, batch: int, copies: int, device: torch.device) -> Work:
    """A linear over random weights. The transform writes an operand of its own: that of the product was made before, of the same size."""
    _, in_features = linear.shape
    x = activations(batch, in_features, device)
    weights = random_weights(linear.quantizer, linear.shape, copies, device)
    return Work(transform_of(weights[0], x), multiplications(weights, x), weights[0].product(x))


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    what = f"{row['bits']:18} bits, {'fused' if row['fused'] else 'alone'}, batch {row['batch']}"
    return f"{what}  {row['us']:8.2f} us, predicted {row['predicted_us']:8.2f}  {row['off']:+6.1%}, {row['estimates']} estimates"
