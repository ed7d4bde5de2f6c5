"""Compare every Triton kernel with its oracle on the GPU of this machine: `python -m benchmarks check [--quick]`. No pytest needed."""

import argparse
import time

import torch

from benchmarks.rows import BenchmarkError
from benchmarks.timing import require_gpu
from tests.kernels.cases import FULL, SMALL, cases


def main(arguments: list[str]) -> None:
    """Run the comparisons; print those that failed. Raises `BenchmarkError` if there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes")
    quick = parser.parse_args(arguments).quick
    require_gpu()
    torch.manual_seed(0)
    started_s, count, failed = time.monotonic(), 0, 0
    for name, comparison in cases(SMALL if quick else FULL):
        count += 1
        try:
            comparison("cuda")
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"{count} comparisons, {failed} failed, {time.monotonic() - started_s:.0f} s", flush=True)
    if failed:
        raise BenchmarkError(f"{failed} of {count} comparisons failed")
