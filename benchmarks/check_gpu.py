"""Check every Triton kernel on the GPU of this machine, then time the multiplication: `python benchmarks/check_gpu.py`.

Needs no test framework. Prints one JSON object per measurement, in microseconds (median of the replays, with p20 and p80); a red check ends
the run before anything is timed. Weights rotate through more memory than the second-level cache holds,
and bf16 `F.linear` is timed in the same process.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpc.kernels import ops
from tests.kernels.cases import FULL, SMALL, cases
from tests.kernels.packed import Packed, packed, quantizers

SHAPES = ((4096, 4096), (28672, 4096))
CACHE_BYTES = 256 << 20
REPLAYS = 15


def check(quick: bool) -> bool:
    """Run the comparisons; print what failed and how many there were."""
    torch.manual_seed(0)
    started, count, failed = time.perf_counter(), 0, 0
    for name, comparison in cases(SMALL if quick else FULL):
        count += 1
        try:
            comparison("cuda")
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"{count} comparisons, {failed} failed, {time.perf_counter() - started:.0f} s", flush=True)
    return failed == 0


def microseconds(calls: list[Callable[[], object]]) -> dict[str, float]:
    """Time of one call: all calls are captured into one CUDA graph, which is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    times = sorted(times[2:])
    return {f"p{p}_us": round(times[len(times) * p // 100], 2) for p in (20, 50, 80)}


def rows(batches: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Times of both sides for each shape, rate and batch."""
    for out_features, in_features in SHAPES:
        dense_bytes = 2 * out_features * in_features
        copies = max(2, -(-CACHE_BYTES // dense_bytes))
        dense = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for batch in batches:
            x = torch.randn(batch, in_features, device="cuda", dtype=torch.bfloat16)
            what = {"shape": f"{out_features}x{in_features}", "batch": batch}
            baseline = microseconds([partial(functional.linear, x, w) for w in dense] * 4)
            yield {**what, "method": "bf16 linear", **baseline}
            for family, bits in (("trellis", 4), ("trellis", 6), ("trellis", 8), ("scalar", 3), ("pairs", 6), ("quadruples", 12)):
                rate = float(quantizers(family, [bits])[0].rate)
                copies = max(2, int(-(-CACHE_BYTES // (dense_bytes * rate / 16))))
                weights = [packed(family, out_features, in_features, [bits], device="cuda") for _ in range(copies)]
                measured = microseconds([partial(multiply, w, x) for w in weights])
                yield {**what, "method": family, "bits": rate, **measured, "speedup": round(baseline["p50_us"] / measured["p50_us"], 2)}


def rotation_rows() -> Iterator[dict[str, object]]:
    """Times of the rotation of one row."""
    for features in (4096, 14336):
        signs = torch.randint(0, 256, (features // 8,), device="cuda", dtype=torch.uint8)
        x = torch.randn(1, features, device="cuda", dtype=torch.bfloat16)
        call = partial(ops.rotate, x, signs, features)
        yield {"features": features, "batch": 1, "method": "rotate", **microseconds([call] * 64)}


def multiply(weight: Packed, x: Tensor) -> Tensor:
    """Run the operator of the weight's family."""
    result: Tensor = getattr(ops, f"{weight.family}_linear")(x, weight.codes, weight.scales, None, *weight.format, weight.out_features)
    return result


def main() -> int:
    """Check, then time."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="few comparisons, then the times")
    arguments.add_argument("--skip-checks", action="store_true", help="only the times")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    import triton

    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}), flush=True)
    if not options.skip_checks and not check(options.quick):
        return 1
    for row in chain(rows(tuple(options.batches)), rotation_rows()):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
