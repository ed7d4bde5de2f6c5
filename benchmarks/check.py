"""Compare the Triton kernels with their oracles on the GPU of this machine: `python -m benchmarks check [--quick] [--only TEXT]`.

With `--product wgmma` those are compared instead that no plan chooses yet.

Nearly all of the time goes into compiling kernels, so the comparisons are dealt out to several processes. No pytest needed.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain, islice
from multiprocessing import get_context

import torch

from benchmarks.rows import BenchmarkError
from benchmarks.timing import require_gpu
from qpc.kernels.warpgroup import Product
from tests.kernels import attention_cases, large_batch_cases, warpgroup_cases
from tests.kernels.cases import FULL, SMALL, Check, cases

MOST_WORKERS = 12
"""Each holds a context of its own on the GPU, about half a gigabyte."""

SHARES = 8
"""Parts of the work for each process, so that one which is slow holds nobody up."""


def main(arguments: list[str]) -> None:
    """Run the comparisons; print those that failed. Raises `BenchmarkError` if there are any, or none to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--only", default="", metavar="TEXT", help="comparisons with this in their name, e.g. 'bit for bit'")
    products = [str(each) for each in Product]
    parser.add_argument("--product", choices=products, default=str(Product.MMA), help="wgmma: only variants that no plan chooses")
    parser.add_argument(
        "--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1), help="processes (default: one for each core, at most 12)"
    )
    options = parser.parse_args(arguments)
    require_gpu()
    started_s, count, failed = time.monotonic(), 0, 0
    shares, product = SHARES * options.workers, Product(options.product)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(_run_share, product, options.quick, options.only, first, shares) for first in range(shares)]
        for done, task in enumerate(as_completed(tasks), 1):
            ran, failures = task.result()
            count, failed = count + ran, failed + len(failures)
            for failure in failures:
                print(f"FAILED {failure}", flush=True)
            if ran and done % options.workers == 0:
                print(f"{count} compared after {time.monotonic() - started_s:.0f} s", flush=True)
    print(f"{count} comparisons, {failed} failed, {time.monotonic() - started_s:.0f} s", flush=True)
    if failed:
        raise BenchmarkError(f"{failed} of {count} comparisons failed")
    if not count:
        raise BenchmarkError(f"no comparison has {options.only!r} in its name")


def _selected(product: Product, quick: bool, only: str) -> Iterator[tuple[str, Check]]:
    """The comparisons that were asked for."""
    if product is Product.WGMMA:
        return ((name, comparison) for name, comparison in warpgroup_cases.cases(quick) if only in name)
    every = chain(cases(SMALL if quick else FULL), large_batch_cases.cases(quick), attention_cases.cases(quick))
    return ((name, comparison) for name, comparison in every if only in name)


def _run_share(product: Product, quick: bool, only: str, first: int, step: int) -> tuple[int, list[str]]:
    """Every `step`-th comparison from `first` on: how many there were, and a line for each that failed."""
    torch.manual_seed(0)
    count, failures = 0, []
    for name, comparison in islice(_selected(product, quick, only), first, None, step):
        count += 1
        try:
            comparison("cuda")
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")
    return count, failures
