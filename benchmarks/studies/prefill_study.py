"""How a large batch is best multiplied: `python -m benchmarks.studies.prefill_study [--bits 3] [--tokens 2048] [--json FILE] [--quick]`.

For each linear of a Llama 3.1 8B layer: bfloat16 `F.linear`; decoding alone, by block columns of a program; and every strategy of a grid,
beside the products of its parts alone, of a weight that is decoded already, and the decoding of its parts alone into one place. Each is
checked before it is timed. Columns of a row: rate, out_features, in_features; of decoding columns, us, copy_share of the copy bandwidth; of
a strategy tokens, part_rows (null: all), overlapped, us, bf16_us, ratio, product_us, decode_us. About a minute for one rate.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import BF16, ROUNDING, time_baseline
from benchmarks.rows import write_rows
from benchmarks.timing import EXACT, Card, check, copies_for, measure_card, require_gpu, time_calls
from benchmarks.weights import LAYER, RandomWeight, Shape, activations, label, random_weights
from qpc.kernels import dequantize, large_batch
from qpc.kernels.large_batch import Strategy
from qpc.quant.palette import Effort, trellis_at

PART_ROWS = (1024, 2048, 4096, 8192, 14336)
COLUMNS = (4, 8, 16)
MOST_CALLS = 4
"""Of one graph: these are long enough that its start is nothing."""

Row = dict[str, Any]


def main() -> None:
    """Measure shape by shape, print and write each row at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=Fraction, nargs="+", default=[Fraction(3)])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the strategy that is chosen by default, and the best guesses beside it")
    options = parser.parse_args()
    started_s = time.monotonic()
    device = require_gpu()
    card = measure_card(device)
    rows: list[Row] = []
    for bits, shape in product(options.bits, LAYER):
        quantizer = trellis_at(bits, Effort.DEFAULT)
        weights = random_weights(quantizer, shape, copies_for(quantizer.weight_bytes(*shape)), device)
        what = {"rate": float(bits), "out_features": shape[0], "in_features": shape[1]}
        for row in decodings(weights, card, COLUMNS[1:2] if options.quick else COLUMNS):
            rows.append(what | row)
            print(f"{float(bits)} bits {label(shape):11} decoded {row['columns']:2} columns at a time: {row['us']:7.1f} us, "
                  f"{row['copy_share']:.0%} of the copy bandwidth", flush=True)  # fmt: skip
        for tokens in options.tokens:
            for row in multiplications(weights, tokens, shape, device, options.quick):
                rows.append(what | row)
                print(f"{float(bits)} bits {label(shape):11} {tokens} tokens, parts of {row['part_rows'] or 'all':>5} rows"
                      f"{', overlapped' if row['overlapped'] else '            '}: {row['us']:7.1f} us, {row['ratio']:.3f} of bf16 "
                      f"{row['bf16_us']:.1f}; products {row['product_us']:.1f}, decoding {row['decode_us']:.1f}", flush=True)  # fmt: skip
                write_rows(options.json, "prefill_study", rows, card.row)
    print(f"{len(rows)} rows in {time.monotonic() - started_s:.0f} s")


def decodings(weights: list[RandomWeight], card: Card, columns: tuple[int, ...]) -> Iterator[Row]:
    """Decoding to bfloat16 with so many block columns a program."""
    moved = weights[0].nbytes + 2 * weights[0].out_features * weights[0].in_features
    expected = weights[0].decoded()
    for each in columns:
        calls = [partial(_decoded, weight, each) for weight in weights]
        timing = time_calls(calls, check(calls[0], expected, EXACT), min_calls=MOST_CALLS)
        yield {"columns": each, **timing.row, "copy_share": round(moved / timing.us / 1e3 / card.copy_gb_s, 4)}


def multiplications(weights: list[RandomWeight], tokens: int, shape: Shape, device: torch.device, quick: bool) -> Iterator[Row]:
    """Every strategy, the default first."""
    x = activations(tokens, shape[1], device)
    bf16 = time_baseline(BF16, shape, tokens, device, MOST_CALLS)[0]
    expected = weights[0].product(x)
    decoded = weights[0].decoded(torch.bfloat16)
    for strategy in strategies(shape, quick):
        calls: list[Callable[[], Tensor]] = [partial(_multiplied, weight, x, strategy) for weight in weights[:MOST_CALLS]]
        timing = time_calls(calls, check(calls[0], expected, ROUNDING), min_calls=MOST_CALLS)
        alone = partial(_products, decoded, x, strategy)
        products = time_calls([alone], check(alone, expected, ROUNDING), min_calls=MOST_CALLS)
        decoding = [partial(_decoded_by_parts, weight, strategy) for weight in weights[:MOST_CALLS]]
        proof = check(decoding[0], decoded[strategy.parts(shape[0])[-1]].double(), ROUNDING)
        yield {
            "tokens": tokens, "part_rows": strategy.rows, "overlapped": strategy.overlapped, **timing.row, "bf16_us": round(bf16.us, 3),
            "ratio": round(timing.us / bf16.us, 4), "product_us": round(products.us, 3),
            "decode_us": round(time_calls(decoding, proof, min_calls=MOST_CALLS).us, 3),
        }  # fmt: skip


def strategies(shape: Shape, quick: bool) -> list[Strategy]:
    """What differs for a weight of such a shape."""
    sizes = [rows for rows in (PART_ROWS[2:3] if quick else PART_ROWS) if rows < shape[0]]
    found = [large_batch.choose(*shape), Strategy(), *(Strategy(*each) for each in product(sizes, (False, True)))]
    return list(dict.fromkeys(found))


def _decoded(weight: RandomWeight, columns: int) -> Tensor:
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.bfloat16, device=weight.scales.device)
    dequantize.decode_rows(weight.codes, weight.scales, weight.parts, out, columns_per_program=columns)
    return out


def _decoded_by_parts(weight: RandomWeight, strategy: Strategy) -> Tensor:
    """The last part."""
    parts = strategy.parts(weight.out_features)
    place = torch.empty(parts[0].stop, weight.in_features, dtype=torch.bfloat16, device=weight.scales.device)
    for part in parts:
        last = place[: part.stop - part.start]
        dequantize.decode_rows(weight.codes, weight.scales, weight.parts, last, part.start)
    return last


def _multiplied(weight: RandomWeight, x: Tensor, strategy: Strategy) -> Tensor:
    return large_batch.multiply(x, weight.codes, weight.scales, None, weight.parts, weight.out_features, strategy)


def _products(weight: Tensor, x: Tensor, strategy: Strategy) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    for part in strategy.parts(len(weight)):
        torch.mm(x, weight[part].T, out=out[:, part])
    return out


if __name__ == "__main__":
    main()
