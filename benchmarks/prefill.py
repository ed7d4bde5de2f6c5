"""Many tokens at once beside bf16: `python -m benchmarks prefill --json FILE [--quick]`, on an NVIDIA GPU.

A linear of 2,048 tokens with a packed weight against bf16 `F.linear`, and the decoding of the weight to bfloat16 by itself. Columns of a
row: family, preset, rate, tokens, out_features, in_features; us, us_p20, us_p80, bf16_us and their ratio; dequantize_us, dequantize_gb_s of
codes read and weights written, copy_share of the measured copy bandwidth; max_rel_error of the product, dequantize_error of the weight.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch

from benchmarks.adapters import dequantizations, multiplications
from benchmarks.baselines import BF16, ROUNDING, time_baseline
from benchmarks.plan import Run, Subject, compile_ahead, failure, options_of, require_all, scalar, trellis, vector
from benchmarks.summary import shape_of
from benchmarks.timing import EXACT, check, copies_for, time_calls
from benchmarks.weights import SHAPES, Shape, activations, label, random_weights, weight_bytes

TOKENS = 2048
RATES = tuple(Fraction(text) for text in ("2", "3", "3.25", "4", "5"))
MIN_CALLS = 4
"""Calls of one graph: these are long enough that its start is nothing."""


def main(arguments: list[str]) -> None:
    """Compile, check, time."""
    options = options_of("prefill", __doc__, arguments, budget_s=240, quick_budget_s=85)
    run = Run.begin("prefill", options.json, options.budget_s)
    subjects = trellis(Fraction(3)) if options.quick else (*trellis(*RATES), *scalar(3, 4), *vector(3, 4))
    compile_ahead([(subject.quantizer, SHAPES, TOKENS) for subject in subjects])
    require_all(run.record(measure(run, subjects, SHAPES), show))


def measure(run: Run, subjects: Sequence[Subject], shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """One row for each quantizer and shape; a failure is a row too."""
    for subject in subjects:
        for shape in shapes:
            nbytes = weight_bytes(subject.quantizer, shape)
            row = {**subject.row, "tokens": TOKENS, "out_features": shape[0], "in_features": shape[1], "bytes": nbytes}
            try:
                weights = random_weights(subject.quantizer, shape, copies_for(nbytes), run.device)
                x = activations(TOKENS, shape[1], run.device)
                calls = multiplications(weights, x)
                proof = check(calls[0], weights[0].product(x), ROUNDING)
                timing = time_calls(calls[: MIN_CALLS * 2], proof, min_calls=MIN_CALLS)
                bf16 = time_baseline(BF16, shape, TOKENS, run.device, MIN_CALLS)[0]
                row |= {
                    **timing.row,
                    "bf16_us": round(bf16.us, 3),
                    "ratio": round(timing.us / bf16.us, 4),
                    "max_rel_error": proof.max_rel_error,
                }
                decodings = dequantizations(weights, torch.bfloat16)
                proof = check(decodings[0], weights[0].decoded(), EXACT)
                decoding = time_calls(decodings, proof, min_calls=MIN_CALLS)
                speed = (nbytes + 2 * shape[0] * shape[1]) / decoding.us / 1e3
                row |= {"dequantize_us": round(decoding.us, 3), "dequantize_gb_s": round(speed, 1)}
                row |= {"copy_share": round(speed / run.card.copy_gb_s, 4), "dequantize_error": proof.max_rel_error}
            except Exception as error:
                row |= failure(error)
            yield row


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    what = f"{row['family']:8} {row['rate']:5} bits  {label(shape_of(row)):12}"
    linear = f"{row['us']:8.1f} us  bf16 {row['bf16_us']:8.1f} ({row['ratio']:4.2f} of it)"
    return f"{what}  {linear}  decoded in {row['dequantize_us']:7.1f} us, {row['copy_share']:4.0%} of the copy bandwidth"
