"""Whole-model decoding of Llama 3.1 8B with random weights: `python -m benchmarks decode --json FILE`, on an NVIDIA GPU.

A step of one token for each sequence, compiled by Inductor and captured in a CUDA graph, with a cache of 1,024 places of which 128 are
filled. Beside it, in the same process, the model in bfloat16 with the attention of transformers, compiled and captured in the same way.
Columns of a row: budget, bits of a weight of the layers (16: bfloat16 with the attention of qpc); head_bits, of the output head; batch;
ms_per_token of a step, ms_p20, ms_p80; tokens_per_second of all sequences; bf16_ms_per_token, and speedup, the ratio; weight_bytes and
bf16_weight_bytes of the linears of the layers; allocated_bytes and bf16_allocated_bytes of the whole model; breakdown_us, of a step under
the profiler: linears, head, transforms, attention, norms, sampling, other, gaps, the sum of which is profiled_us; bf16_breakdown_us;
launches, how often each kernel runs in a step; compile_s. Graphs are compiled ahead in processes of their own, which fill the caches on
disk.
"""

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama import LLAMA_8B, TINY, Kind, build, linear_bytes
from benchmarks.plan import failure, require_all
from benchmarks.rows import BenchmarkError, machine, read_rows, write_rows
from benchmarks.timing import Timing, timing_of
from benchmarks.trace import Breakdown, Purpose, profiled
from qpc.integrations.decoder import Decoder, Stepping

FILLED, CAPACITY = 128, 1024
"""Places of the cache that hold a token when a step is timed, and all places."""

REPLAYS, PROFILED = 40, 10
HEAD_BITS = Fraction(6)
BUDGETS = tuple(map(Fraction, ("13/4", "3", "2", "4")))
BATCHES = (1, 8)
MOST_OFF = 0.25
"""Relative difference of the logits of the compiled step from those of the eager one: both round to 16 bits, at different places."""

MAX_WORKERS = 14


@dataclass(frozen=True)
class Job:
    """One model and batch. stock: attend as transformers does."""

    kind: Kind
    batch: int
    stock: bool = False


@dataclass(frozen=True)
class Measured:
    """The time of a step, what it consists of (None without a GPU), bytes of the model and of its linears, seconds of compiling."""

    timing: Timing
    breakdown: Breakdown | None
    allocated_bytes: int
    weight_bytes: int
    compile_s: float


@dataclass(frozen=True)
class Setting:
    """What all jobs share."""

    sizes: dict[str, Any]
    device: torch.device
    stepping: Stepping


def main(arguments: list[str]) -> None:
    """Compile ahead, then measure job by job; print and write each row at once."""
    options = parse(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        raise BenchmarkError("this benchmark runs kernels on an NVIDIA GPU; PyTorch finds none here")
    started_s = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (TINY if options.tiny else LLAMA_8B) | ({} if options.layers is None else {"num_hidden_layers": options.layers})
    setting = Setting(sizes, device, options.stepping)
    rows: list[dict[str, Any]] = []
    if options.resume and options.json is not None and options.json.is_file():
        rows = [row for row in read_rows(options.json) if "error" not in row]
    known = {key(row) for row in rows}
    jobs = [job for job in jobs_of(options.bits, options.batch) if key(described(job)) not in known]
    stocks = [Job(Kind(None), batch, stock=True) for batch in dict.fromkeys(job.batch for job in jobs)]
    if not options.no_ahead and device.type == "cuda":
        compile_ahead([*stocks, *jobs], setting)
    baselines: dict[int, Measured] = {}
    for job in jobs:
        if time.monotonic() - started_s > options.budget_s:
            print(f"stopped: {options.budget_s:g} s are spent; --resume measures what is left", flush=True)
            break
        row = described(job)
        try:
            if job.batch not in baselines:
                baselines[job.batch] = measure(stocks[[each.batch for each in stocks].index(job.batch)], setting)
            row |= columns(measure(job, setting), baselines[job.batch], job.batch)
        except Exception as error:
            row |= failure(error)
        row["after_s"] = round(time.monotonic() - started_s, 1)
        rows.append(row)
        print(show(row) if "error" not in row else f"FAILED {row}", flush=True)
        write_rows(options.json, "decode", rows, {"gpu": machine(device), "layers": sizes["num_hidden_layers"], "tiny": options.tiny})
    require_all(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks decode", description=__doc__, formatter_class=formatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, after each of them")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure those that it lacks")
    parser.add_argument("--bits", type=_numbers(Fraction), default=BUDGETS, metavar="B,…", help="budgets (3.25,3,2,4)")
    parser.add_argument("--batch", type=_numbers(int), default=BATCHES, metavar="N,…", help="batches (1,8)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the model (32)")
    parser.add_argument("--tiny", action="store_true", help="a small model, which a CPU can run too")
    parser.add_argument("--stepping", type=Stepping, choices=list(Stepping), default=Stepping.COMPILED, help="how a step runs (compiled)")
    parser.add_argument("--no-ahead", action="store_true", help="compile nothing in other processes")
    parser.add_argument("--budget-s", type=float, default=215, metavar="S", help="start no row after this many seconds (215)")
    return parser.parse_args(arguments)


def _numbers(of: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(map(of, text.split(",")))


def jobs_of(budgets: Sequence[Fraction], batches: Sequence[int]) -> list[Job]:
    """What tells most comes first; last, a packed output head, and what the attention of qpc alone is worth."""
    jobs = [Job(Kind(bits), batch) for bits in budgets[:1] for batch in batches]
    jobs += [Job(Kind(bits), batch) for batch in batches for bits in budgets[1:]]
    return [*jobs, Job(Kind(budgets[0], HEAD_BITS), batches[0]), Job(Kind(None), batches[0])]


def described(job: Job) -> dict[str, Any]:
    """The first columns of a row."""
    bits, head = (16.0 if each is None else float(each) for each in (job.kind.bits, job.kind.head_bits))
    return {"budget": bits, "head_bits": head, "batch": job.batch}


def key(row: dict[str, Any]) -> tuple[float, float, int]:
    """What a row is known by."""
    return row["budget"], row["head_bits"], row["batch"]


def compile_ahead(jobs: Sequence[Job], setting: Setting) -> None:
    """Run each job's step once in a process of its own. What fails here fails again where it is reported."""
    started_s = time.monotonic()
    workers = max(1, min(MAX_WORKERS, len(jobs), (os.cpu_count() or 2) - 2))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # of each process
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = [future.exception() for future in [pool.submit(step_once, job, setting) for job in jobs]]
    print(f"{len(jobs)} steps compiled in {time.monotonic() - started_s:.0f} s, {workers} at a time", flush=True)
    for error in errors:
        if error is not None:
            print(f"  {type(error).__name__}: {str(error)[-300:]}", flush=True)


def step_once(job: Job, setting: Setting) -> None:
    """Compile a step, with all kernels in it."""
    decoder = decoder_of(job, setting, shared=True)
    with torch.no_grad():
        decoder.step(greedy=True)


def decoder_of(job: Job, setting: Setting, shared: bool = False) -> Decoder:
    """The model with a cache that is filled up to where the step is timed."""
    model = build(job.kind, setting.sizes, setting.device, shared)
    decoder = Decoder(model, job.batch, CAPACITY, setting.stepping)
    if job.stock:
        decoder.attention = "the attention of transformers is measured"
    elif decoder.attention is not None and setting.device.type == "cuda":
        raise BenchmarkError(decoder.attention)
    decoder.tokens.random_(setting.sizes["vocab_size"])
    decoder.position.fill_(FILLED)
    return decoder


def measure(job: Job, setting: Setting) -> Measured:
    """Measure a job; nothing of it stays on the GPU."""
    try:
        return _measured(job, setting)
    finally:
        torch.compiler.reset()
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _measured(job: Job, setting: Setting) -> Measured:
    """Build, compile, compare with the eager step, capture, time and profile."""
    before = allocated(setting.device)
    decoder = decoder_of(job, setting)
    cache_bytes = sum(t.nbytes for layer in decoder.cache.fixed for t in (layer.keys, layer.values) if t is not None)
    occupied = allocated(setting.device) - before - cache_bytes
    started_s = time.monotonic()
    off = decoder.compared()
    compile_s = time.monotonic() - started_s
    if not off <= MOST_OFF:
        raise BenchmarkError(f"the logits of the compiled step are off by {off:.1%}, at most {MOST_OFF:.0%} are rounding")
    decoder.ready(greedy=True)
    timing = timing_of(list(timed(decoder, setting.device)))
    found = None
    if setting.device.type == "cuda":
        decoder.position.fill_(FILLED)
        products = Purpose.LINEARS if job.kind.bits is None else Purpose.HEAD
        found = profiled(partial(decoder.advance, greedy=True), PROFILED, products)
    return Measured(timing, found, occupied, linear_bytes(decoder.model), compile_s)


def timed(decoder: Decoder, device: torch.device) -> Iterator[float]:
    """Microseconds of single steps, after some to warm up."""
    for step in range(2 * REPLAYS):
        if step % REPLAYS == 0:
            decoder.position.fill_(FILLED)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            decoder.advance(greedy=True)
            end.record()
            end.synchronize()
            found = 1000 * begin.elapsed_time(end)
        else:
            started_s = time.monotonic()
            decoder.advance(greedy=True)
            found = 1e6 * (time.monotonic() - started_s)
        if step >= REPLAYS:
            yield found


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def columns(found: Measured, stock: Measured, batch: int) -> dict[str, Any]:
    """What was measured, beside bfloat16."""
    row: dict[str, Any] = {
        "ms_per_token": round(found.timing.us / 1000, 4), "ms_p20": round(found.timing.us_p20 / 1000, 4),
        "ms_p80": round(found.timing.us_p80 / 1000, 4), "tokens_per_second": round(1e6 * batch / found.timing.us, 1),
        "bf16_ms_per_token": round(stock.timing.us / 1000, 4),
        "speedup": round(stock.timing.us / found.timing.us, 3), "weight_bytes": found.weight_bytes,
        "bf16_weight_bytes": stock.weight_bytes, "allocated_bytes": found.allocated_bytes,
        "bf16_allocated_bytes": stock.allocated_bytes, "compile_s": round(found.compile_s, 1),
    }  # fmt: skip
    for prefix, each in (("", found.breakdown), ("bf16_", stock.breakdown)):
        if each is not None:
            row[f"{prefix}breakdown_us"] = {str(purpose): round(us, 1) for purpose, us in each.us.items()}
            row[f"{prefix}profiled_us"] = round(each.span_us, 1)
    if found.breakdown is not None:
        row["launches"] = {name: round(count, 1) for name, count in found.breakdown.launches.items()}
    return row


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    line = f"{row['budget']:5} bits, head {row['head_bits']:4}, batch {row['batch']}  {row['ms_per_token']:7.3f} ms"
    line += f"  bf16 {row['bf16_ms_per_token']:7.3f}  {row['speedup']:5.2f}x  {row['tokens_per_second']:8.1f} tokens/s"
    parts = row.get("breakdown_us", {})
    return line + "".join(f"  {purpose} {parts[purpose]:.0f}" for purpose in Purpose if purpose in parts)
