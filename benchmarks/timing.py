"""The clock of the GPU benchmarks: CUDA graphs over calls whose weights come from memory, started only by a correct result.

Nothing is timed without a `Checked`, which only `check` makes, from a call whose result agreed with an oracle.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import BenchmarkError
from tests.kernels.packed import poisoned

CACHE_BYTES = 256 << 20
"""What the weights of successive calls must exceed together, so that they come from memory: more than any second-level cache."""

REPLAYS = 15
WARM_UP_S = 0.03
"""For so long calls run before they are timed: the clock of an H100 is 510 MHz at rest, 1980 at work, and takes milliseconds to change."""

MIN_CALLS = 16
"""Calls of one graph at least: a graph starts in microseconds that no single call should bear."""

BANDWIDTH_BYTES = 1 << 30

EXACT = 1e-3
"""Tolerance, as `relative_error` measures it, of kernels that round only their result: float32 sums, or activations of 16 bits."""


@dataclass(frozen=True)
class Checked:
    """Proof that a call returned what an oracle says. max_rel_error: as `relative_error` gives it."""

    max_rel_error: float


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median of the replays, and the bounds of their middle three fifths."""

    us: float
    us_p20: float
    us_p80: float

    @property
    def row(self) -> dict[str, float]:
        """Columns of a row of results."""
        return {"us": round(self.us, 3), "us_p20": round(self.us_p20, 3), "us_p80": round(self.us_p80, 3)}


@dataclass(frozen=True)
class Card:
    """What a GPU can do.

    read_gb_s: of a sum over 1 GiB. copy_gb_s: of a copy of as much, reads and writes counted. launch_us: one kernel that writes one number.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    read_gb_s: float
    copy_gb_s: float
    launch_us: float

    @property
    def row(self) -> dict[str, Any]:
        """The head of a file of results."""
        return {
            "gpu": self.name, "capability": ".".join(map(str, self.capability)), "processors": self.processors,
            "read_gb_s": round(self.read_gb_s, 1), "copy_gb_s": round(self.copy_gb_s, 1), "launch_us": round(self.launch_us, 3),
        }  # fmt: skip


def require_gpu() -> torch.device:
    """The GPU of this machine. Raises `BenchmarkError` if there is none that PyTorch can use."""
    if not torch.cuda.is_available():
        raise BenchmarkError("this benchmark runs kernels on an NVIDIA GPU; PyTorch finds none here")
    return torch.device("cuda", torch.cuda.current_device())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of an element, less half a unit in its last place, over the root mean square of its row; infinite for NaN.

    So the rounding of a result to its dtype does not hide how it was computed. actual: [..., features] of any float dtype; expected: the
    same in float64. Raises `BenchmarkError` for another shape.
    """
    if actual.shape != expected.shape:
        raise BenchmarkError(f"the result has shape {tuple(actual.shape)}, required {tuple(expected.shape)}")
    scale = expected.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    dtype = torch.finfo(actual.dtype)
    magnitude = expected.abs().clamp_min(dtype.tiny)  # units of subnormal numbers are those of the smallest normal one
    half_unit = torch.exp2(torch.frexp(magnitude).exponent.double()) * (dtype.eps / 4)  # a mantissa of frexp is from 0.5 to 1
    excess = (((actual.double() - expected).abs() - half_unit) / scale).max().item()
    return max(excess, 0.0) if excess == excess else float("inf")


@torch.no_grad()
def check(call: Callable[[], Tensor], expected: Tensor, tolerance: float) -> Checked:
    """Run a call whose allocations are filled with NaN beforehand, and compare. Raises `BenchmarkError` beyond the tolerance."""
    with poisoned():
        actual = call()
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise BenchmarkError(f"relative error {error:.2e} must be at most {tolerance:.0e}")
    return Checked(error)


def copies_for(nbytes: int) -> int:
    """How many weights of this size it takes to exceed the cache, two at least."""
    return max(2, -(-CACHE_BYTES // nbytes))


@torch.no_grad()
def time_calls(calls: Sequence[Callable[[], object]], proof: Checked, replays: int = REPLAYS, min_calls: int = MIN_CALLS) -> Timing:
    """Time of one call in a CUDA graph of them all, which is repeated until it has `min_calls`, and replayed.

    calls: over different weights, `copies_for` them. Raises `TypeError` without the proof that they compute what they should.
    """
    if not isinstance(proof, Checked):
        raise TypeError(f"a call is timed after its result was checked: proof must be a Checked, got {proof!r}")
    calls = list(calls) * -(-min_calls // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    started_s = time.monotonic()
    while time.monotonic() - started_s < WARM_UP_S:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    return timing_of(times)


def timing_of(times: Sequence[float]) -> Timing:
    """The quantiles of some times, each one of the times."""
    ascending = sorted(times)
    at = [ascending[min(len(ascending) * p // 100, len(ascending) - 1)] for p in (50, 20, 80)]
    return Timing(*at)


def measure_card(device: torch.device) -> Card:
    """Measure what all shares are shares of; a second or two."""
    properties = torch.cuda.get_device_properties(device)
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    total = partial(torch.sum, source)
    copy = partial(target.copy_, source)
    one = torch.zeros(1, device=device)
    proof = check(lambda: total().reshape(1), torch.full((1,), len(source), dtype=torch.float64, device=device), 1e-6)
    read_us = time_calls([total], proof).us
    proof = check(lambda: copy()[-1024:], torch.ones(1024, dtype=torch.float64, device=device), 0.0)
    copy_us = time_calls([copy], proof).us
    proof = check(lambda: one.fill_(1.0), torch.ones(1, dtype=torch.float64, device=device), 0.0)
    launch_us = time_calls([partial(one.fill_, 1.0)], proof, min_calls=256).us
    return Card(
        properties.name, (properties.major, properties.minor), properties.multi_processor_count,
        BANDWIDTH_BYTES / read_us / 1e3, 2 * BANDWIDTH_BYTES / copy_us / 1e3, launch_us,
    )  # fmt: skip
