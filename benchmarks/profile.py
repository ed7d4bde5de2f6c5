"""The latency table of a GPU: `python -m benchmarks profile --json qpc/profiles/GPU.json [--quick]`, in under five minutes.

What a budget in seconds is computed with. The file is one JSON object:

    format          1
    measured_with   gpu, capability, processors, read_gb_s, copy_gb_s, launch_us (of one kernel in a CUDA graph), versions, commit
    rows            objects with family ('trellis', 'scalar', or 'bf16' for `F.linear`), rate [bits per weight], batch, out_features,
                    in_features, and us: median time of one multiplication of bfloat16 activations, the weight read from memory

Rates that are not in it lie between two that are, and so do shapes: time is close to linear in the number of weights beyond `launch_us`.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from benchmarks.adapters import multiplications
from benchmarks.baselines import BF16, time_baseline
from benchmarks.plan import Run, Subject, compile_ahead, failure, options_of, require_all, scalar, trellis
from benchmarks.summary import shape_of
from benchmarks.timing import EXACT, check, copies_for, time_calls
from benchmarks.weights import Shape, activations, label, random_weights, weight_bytes

RATES = tuple(Fraction(text) for text in ("3", "2", "4", "3.25", "2.5", "3.5", "5", "6"))
"""The most telling first; 3.25 stands for the mixtures of two rates."""

SHAPES: tuple[Shape, ...] = tuple((o, i) for o in (512, 1024, 2048, 4096, 8192, 16384, 28672) for i in (1024, 2048, 4096, 8192, 14336))
QUICK_SHAPES: tuple[Shape, ...] = tuple((o, i) for o in (1024, 4096, 16384) for i in (1024, 4096, 14336))
BATCHES = (1, 8)
REPLAYS = 7
LARGEST_WEIGHT = 28672 * 8192
"""Shapes with more weights are left out: time is proportional there."""


def main(arguments: list[str]) -> None:
    """Compile, check, time, write the table."""
    options = options_of("profile", __doc__, arguments, budget_s=285, quick_budget_s=85)
    run = Run.begin("profile", options.json, options.budget_s)
    shapes = tuple(s for s in (QUICK_SHAPES if options.quick else SHAPES) if s[0] * s[1] <= LARGEST_WEIGHT)
    subjects = trellis(*RATES[:4]) if options.quick else (*trellis(*RATES), *scalar(8))
    compile_ahead([(subject.quantizer, shapes, batch) for batch in BATCHES for subject in subjects])
    rows = run.record(measure(run, subjects, shapes), show)
    print(f"to be shipped as qpc/profiles/{file_name(run.card.name)}")
    require_all(rows)


def measure(run: Run, subjects: Sequence[Subject], shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """bf16 at every shape and batch, then every quantizer; a failure is a row too."""
    for shape in shapes:
        for batch in BATCHES:
            what = {"family": "bf16", "rate": 16.0, "batch": batch, "out_features": shape[0], "in_features": shape[1]}
            yield {**what, "us": round(time_baseline(BF16, shape, batch, run.device)[0].us, 3)}
    for subject in subjects:
        for shape in shapes:
            weights = random_weights(subject.quantizer, shape, copies_for(weight_bytes(subject.quantizer, shape)), run.device)
            inputs = activations(max(BATCHES), shape[1], run.device)
            expected = weights[0].product(inputs)
            for batch in BATCHES:
                row = {"family": subject.family, "rate": subject.rate, "batch": batch, "out_features": shape[0], "in_features": shape[1]}
                try:
                    calls = multiplications(weights, inputs[:batch])
                    row["us"] = round(time_calls(calls, check(calls[0], expected[:batch], EXACT), REPLAYS).us, 3)
                except Exception as error:
                    row |= failure(error)
                yield row


def file_name(gpu: str) -> str:
    """Where the table of a GPU lies in `qpc/profiles`: 'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3.json'."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()) + ".json"


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    return f"{row['family']:8} {row['rate']:5} bits  {label(shape_of(row)):12} batch {row['batch']}  {row['us']:8.2f} us"
