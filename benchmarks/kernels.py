"""The fused multiplication beside bf16 and int4: `python -m benchmarks kernels --json FILE [--plot DIR] [--quick]`, on an NVIDIA GPU.

Every launch is compared with the float64 product of the decoded weight before it is timed, and once more after. Columns of a row: family,
preset, rate, batch, out_features, in_features; us, us_p20, us_p80 of one multiplication of rotated bfloat16 activations (of their operand
where integer tensor cores multiply); bytes of codes and scales; bandwidth_share, these bytes over the time and the read bandwidth;
max_rel_error, as `timing.relative_error` defines it; bf16_us of `F.linear`, int4_us of PyTorch's int4 product, and one column for each
other library that is installed (`benchmarks.baselines`). At the end the sums over the four linears of a decoder layer, and how many times
faster than bf16 they are. Under four minutes; --quick (four rates, batches up to 8, two baselines) under two. --product and --finish
measure another variant of the multiplication at the four rates, and have columns of their own then.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from benchmarks.adapters import DEFAULT, Variant, multiplications
from benchmarks.baselines import BF16, INT4, OTHERS, Baseline, baseline_columns
from benchmarks.plan import Run, Subject, compile_ahead, failure, options_of, require_all, scalar, trellis, variant_of, vector
from benchmarks.summary import layer_table, shape_of
from benchmarks.timing import EXACT, check, copies_for, time_calls
from benchmarks.weights import SHAPES, Shape, activations, label, random_weights, weight_bytes

RATES = tuple(Fraction(text) for text in ("3", "2", "4", "3.25", "2.5", "3.5", "5", "1.5"))
"""The most telling first, since a run may end before the last."""

QUICK_RATES = RATES[:4]
BATCHES, QUICK_BATCHES = (1, 2, 4, 8, 16), (1, 2, 4, 8)
OTHER_RATES = (3, 4, 2)
"""Of the families besides the trellis."""


def main(arguments: list[str]) -> None:
    """Compile, check, time, print the sums of a decoder layer."""
    options = options_of("kernels", __doc__, arguments, budget_s=225, quick_budget_s=110, draws=True, varies=True)
    variant = variant_of(options)
    run = Run.begin("kernels", options.json, options.budget_s)
    every = (*trellis(*RATES), *scalar(*OTHER_RATES), *vector(*OTHER_RATES))
    subjects = trellis(*QUICK_RATES) if options.quick or variant != DEFAULT else every
    batches = tuple(batch for batch in (QUICK_BATCHES if options.quick else BATCHES) if variant.takes(batch))
    baselines = (BF16, INT4) if options.quick else (BF16, INT4, *OTHERS)
    compile_ahead([(subject.quantizer, SHAPES, batch) for batch in batches for subject in subjects], variant)
    rows = run.record(measure(run, subjects, SHAPES, batches, baselines, variant), show)
    print("\n".join(layer_table(rows)), flush=True)
    if options.plot is not None:
        from benchmarks.plot_kernels import draw

        draw(rows, run.card.name, run.card.read_gb_s, options.plot)
    require_all(rows)


def measure(
    run: Run,
    subjects: Sequence[Subject],
    shapes: Sequence[Shape],
    batches: Sequence[int],
    baselines: Sequence[Baseline],
    variant: Variant = DEFAULT,
) -> Iterator[dict[str, Any]]:
    """One row for each quantizer, shape and batch, in this order; a failure is a row too."""
    for subject in subjects:
        for shape in shapes:
            nbytes = weight_bytes(subject.quantizer, shape)
            weights = random_weights(subject.quantizer, shape, copies_for(nbytes), run.device)
            inputs = activations(max(batches), shape[1], run.device)
            expected = weights[0].product(inputs)
            for batch in batches:
                row = {**subject.row, **variant.columns, "batch": batch, "out_features": shape[0], "in_features": shape[1], "bytes": nbytes}
                try:
                    calls = multiplications(weights, inputs[:batch], variant)
                    proof = check(calls[0], expected[:batch], EXACT)
                    timing = time_calls(calls, proof)
                    again = check(calls[0], expected[:batch], EXACT)  # thousands of launches later
                    row |= {**timing.row, "bandwidth_share": round(nbytes / timing.us / 1e3 / run.card.read_gb_s, 4)}
                    row |= {"max_rel_error": max(proof.max_rel_error, again.max_rel_error)}
                    row |= baseline_columns(shape, batch, run.device, baselines)
                except Exception as error:
                    row |= failure(error)
                yield row


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    what = f"{row['family']:8} {row['rate']:5} bits  {label(shape_of(row)):12} batch {row['batch']:2}"
    int4 = f"{row['int4_us']:7.2f}" if row.get("int4_us") else "      -"
    times = f"{row['us']:7.2f} us  bf16 {row['bf16_us']:7.2f} ({row['bf16_us'] / row['us']:4.2f}x)  int4 {int4}"
    return f"{what}  {times}  {row['bandwidth_share']:4.0%} of the bandwidth, error {row['max_rel_error']:.1e}"
