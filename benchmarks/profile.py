"""The latency table of a GPU: `python -m benchmarks profile --json FILE [--quick]`, in under five minutes.

What a budget in seconds is computed with. The file is one JSON object:

    format          1
    measured_with   gpu, capability, processors, read_gb_s, copy_gb_s, launch_us (of one kernel in a CUDA graph), versions, commit
    rows            objects with family ('trellis', 'scalar', or 'bf16' for `F.linear`), rate [bits per weight], batch, out_features,
                    in_features, us: median time of one multiplication of bfloat16 activations, the weight read from memory, and
                    mixture, true where a weight has two rates along its input axis;
                    or with transform (what makes activations the operand of a multiplication), features, batch and us

A quantized multiplication is timed behind its transform, as in a model, and us is what it adds to that: alone, each would start while the
one before still runs, and a layer takes 8 to 18 % longer than such times together (`layer.json` of the H100, whose table is of that kind).

Rates that are not in it lie between two that are, and so do shapes: time is close to linear in the number of weights beyond `launch_us`.
All linears of a decoder layer of Llama 3.1 8B, alone and fused, have shapes that are in it. `python -m benchmarks layer` compares what it
predicts of such a layer with what is measured. Quick: three rates of the trellis, and the shapes of at least 4096 input features.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from benchmarks.adapters import multiplications, transform_of
from benchmarks.baselines import BF16, time_baseline
from benchmarks.plan import Run, Subject, compile_ahead, failure, options_of, require_all, scalar, trellis
from benchmarks.summary import shape_of
from benchmarks.timing import EXACT, check, copies_for, time_calls
from benchmarks.transform import CALLS, transforms
from benchmarks.weights import Shape, activations, label, random_weights, weight_bytes
from qpc.latency import GPUS
from qpc.latency.profile import TRANSFORMS
from qpc.quant.mixed import MixedRateQuantizer

RATES = tuple(map(Fraction, ["3", "2", "4", "2.5", "3.5", "3.25", "2.75", "3.75", "2.25", "1", "6", "5", "4.5", "1.5", "1.25", "5.75"]))
"""The most telling first; quarters of a bit are mixtures of two rates, which take longer than either."""

SCALAR_BITS = (8, 6)
QUICK_RATES = RATES[:3]
ROWS = (512, 1024, 2048, 4096, 5120, 6144, 14336, 28672)
COLUMNS = (4096, 14336, 1024)
LARGEST_WEIGHT = 28672 * 8192
"""Shapes with more weights are left out: time is proportional there."""

SHAPES: tuple[Shape, ...] = tuple((o, i) for i in COLUMNS for o in ROWS if o * i <= LARGEST_WEIGHT)
QUICK_SHAPES: tuple[Shape, ...] = tuple((o, i) for o, i in SHAPES if i >= 4096)
BATCHES = (1, 8)
REPLAYS = 7


def main(arguments: list[str]) -> None:
    """Compile, check, time, write the table."""
    options = options_of("profile", __doc__, arguments, budget_s=285, quick_budget_s=85)
    run = Run.begin("profile", options.json, options.budget_s)
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rates, bits = (QUICK_RATES, SCALAR_BITS[:1]) if options.quick else (RATES, SCALAR_BITS)
    subjects = (*trellis(*rates), *scalar(*bits))
    compile_ahead([(subject.quantizer, shapes, batch) for batch in BATCHES for subject in subjects])
    rows = run.record(measure(run, subjects, shapes), show)
    print(f"to be shipped as qpc/latency/profiles/{file_name(run.card.name)}")
    require_all(rows)


def measure(run: Run, subjects: Sequence[Subject], shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """Transforms, bf16 at every shape and batch, then every quantizer; a failure is a row too."""
    before_us: dict[tuple[int, int], float] = {}
    for row in measure_transforms(run, sorted({columns for _, columns in shapes})):
        if row["transform"] == TRANSFORMS[0] and "us" in row:
            before_us[row["features"], row["batch"]] = row["us"]
        yield row
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
                row |= {"mixture": True} if isinstance(subject.quantizer, MixedRateQuantizer) else {}
                try:
                    calls = multiplications(weights, inputs[:batch])
                    proof = check(calls[0], expected[:batch], EXACT)
                    transform = transform_of(weights[0], inputs[:batch])
                    both = [partial(_in_turn, transform, call) for call in calls]
                    row["us"] = round(time_calls(both, proof, REPLAYS).us - before_us[shape[1], batch], 3)
                except Exception as error:
                    row |= failure(error)
                yield row


def _in_turn(*calls: Callable[[], object]) -> None:
    for call in calls:
        call()


def measure_transforms(run: Run, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What makes the operand of a multiplication, at each width and batch."""
    for features in widths:
        for batch in BATCHES:
            for each in transforms(features, batch, run.device):
                if each.name in TRANSFORMS:
                    row = {"transform": each.name, "features": features, "batch": batch}
                    try:
                        proof = check(lambda each=each: each.values(each.call()), each.expected, each.tolerance)  # type: ignore[misc]
                        row["us"] = round(time_calls([each.call], proof, REPLAYS, CALLS).us, 3)
                    except Exception as error:
                        row |= failure(error)
                    yield row


def file_name(gpu: str) -> str:
    """Where the table of a GPU lies in `qpc/latency/profiles`: under its name there if it has one, else 'nvidia-geforce-rtx-4090.json'."""
    for known in GPUS:
        if gpu in known.devices:
            return known.table.name
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()) + ".json"


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    if "transform" in row:
        return f"{row['transform']:14} {row['features']:6} features  batch {row['batch']}  {row['us']:8.2f} us"
    return f"{row['family']:8} {row['rate']:5} bits  {label(shape_of(row)):12} batch {row['batch']}  {row['us']:8.2f} us"
