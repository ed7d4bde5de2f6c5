"""Where the time of a step goes: the kernels of a GPU as the profiler of PyTorch saw them, by what they are for."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

WHOLE_NAME = 100
"""Letters of the name of a kernel that are kept."""


class Purpose(StrEnum):
    """What a kernel is for. HEAD: the output head, where it is told apart from the linears of the layers. GAPS: no kernel runs."""

    LINEARS = "linears"
    HEAD = "head"
    TRANSFORMS = "transforms"
    ATTENTION = "attention"
    NORMS = "norms"
    SAMPLING = "sampling"
    OTHER = "other"
    GAPS = "gaps"


PATTERNS: tuple[tuple[Purpose, str], ...] = (
    (Purpose.ATTENTION, r"_attention_kernel|fmha|flash|attention|sdpa|softmax"),
    (Purpose.TRANSFORMS, r"\btransform_kernel|_transform_kernel|_pack_kernel|_rotate_kernel"),
    (Purpose.LINEARS, r"fused_kernel|_vector_kernel|_sum_splits_kernel|_decode_\w*kernel|dequantize"),
    (Purpose.NORMS, r"triton_(red|per)_fused.*(rsqrt|mean|norm)"),
    (Purpose.SAMPLING, r"argmax|ArgMax|reduce_kernel"),
)
"""The first that is found in the name of a kernel. A transform that a norm went into is one of the transforms."""

PRODUCTS = r"gemm|gemv|nvjet|cutlass|cublas|splitK|_mm_|addmm|dot_kernel"
"""In the names of matrix products of other libraries."""


@dataclass(frozen=True)
class Event:
    """A kernel, or a copy that the GPU made. Times in microseconds."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Breakdown:
    """us: time of a step by purpose, the sum of which is `span_us`; kernels that overlap count until the first ends, then the second.
    launches: how often each kernel runs in a step."""

    us: dict[Purpose, float]
    span_us: float
    launches: dict[str, float]


def purpose_of(name: str, products: Purpose = Purpose.LINEARS) -> Purpose:
    """What a kernel of this name is for. products: what those of cuBLAS and its like are for."""
    found = next((purpose for purpose, pattern in PATTERNS if re.search(pattern, name)), Purpose.OTHER)
    return products if found is Purpose.OTHER and re.search(PRODUCTS, name) else found


def breakdown(events: Iterable[Event], steps: int, products: Purpose = Purpose.LINEARS) -> Breakdown:
    """The mean of so many steps that ran one after another."""
    ordered = sorted(events, key=lambda event: event.start_us)
    us = dict.fromkeys(Purpose, 0.0)
    launches: dict[str, float] = {}
    if not ordered:
        return Breakdown(us, 0.0, launches)
    now = ordered[0].start_us
    for event in ordered:
        us[Purpose.GAPS] += max(0.0, event.start_us - now) / steps
        us[purpose_of(event.name, products)] += max(0.0, event.end_us - max(now, event.start_us)) / steps
        now = max(now, event.end_us)
        launches[event.name[:WHOLE_NAME]] = launches.get(event.name[:WHOLE_NAME], 0.0) + 1 / steps
    return Breakdown(us, (now - ordered[0].start_us) / steps, launches)


def profiled(step: Callable[[], object], steps: int, products: Purpose) -> Breakdown:
    """Run a step so often under the profiler, without waiting between."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found: Sequence[dict[str, object]] = json.loads(path.read_text())["traceEvents"]
    return breakdown(events_of(found), steps, products)


def events_of(found: Iterable[dict[str, object]]) -> list[Event]:
    """What the GPU did, of the events of a trace in Chrome's format."""
    events = []
    for each in found:
        if each.get("ph") == "X" and each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start_us = float(each["ts"])  # type: ignore[arg-type]
            events.append(Event(str(each["name"]), start_us, start_us + float(each["dur"])))  # type: ignore[arg-type]
    return events
