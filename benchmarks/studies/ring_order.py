"""Which order should the ring of a trellis code have? The study that the format's block was chosen by; README.md tells the answer.

`python -m benchmarks.studies.ring_order --json FILE` checks and times three orders on a GPU next to bf16 `F.linear`;
`--sass` counts their machine instructions instead and needs no GPU; `--quick` times two orders at one window, in about a minute.
A variant that fails becomes a row with its `error`.
"""
# mypy: allow-untyped-calls

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.studies.ring_kernel import AND, INCREMENTS, MULTIPLIERS, XOR, Code, Order, multiply
from qpc.quant.bitstring import ring_windows

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""out_features, in_features of the four fused linears of a decoder layer of Llama 3.1 8B."""
BATCHES = (1, 8)
MAX_ERROR = 1e-3
CACHE_BYTES = 256 << 20
SWEEP_REPLAYS, REPLAYS = 5, 15
WARPS = (4, 8)
MIN_WARPS, MAX_WARPS = 1000, 17000
"""Warps in all programs that the sweep goes through; an H100 holds 132 * 64."""


@dataclass(frozen=True)
class Variant:
    """What is compiled apart from the launch."""

    order: Order
    step_bits: int
    window_bits: int
    code: Code = Code.SUM

    @property
    def row(self) -> dict[str, object]:
        """The first columns of a row of results."""
        return {
            "variant": self.order.name.lower(), "rate": self.step_bits / 2, "window_bits": self.window_bits, "code": self.code.name.lower(),
        }  # fmt: skip

    @property
    def unit_shape(self) -> tuple[int, int]:
        """Rows and columns of the weights of one unit of the kernel."""
        return (16, 256) if self.order is Order.LANE else (64, 16)

    @property
    def unit_words(self) -> int:
        rows, columns = self.unit_shape
        return rows * columns * self.step_bits // 64


@dataclass(frozen=True)
class Launch:
    """warps: of a program; depth: units loaded together; ahead: steps from their load to their use; splits: programs along the inputs."""

    warps: int
    depth: int
    ahead: int = 1
    splits: int = 1


VARIANTS = (
    *(Variant(order, step_bits, 16) for step_bits in (6, 4, 8) for order in Order),
    Variant(Order.BLOCK, 5, 16),
    Variant(Order.BLOCK, 6, 32),
    Variant(Order.BLOCK, 6, 16, Code.SHIFTED),
    *(Variant(order, step_bits, 18) for step_bits in (6, 4, 8) for order in Order),
    Variant(Order.BLOCK, 5, 18),
)
"""What is timed, the most telling first. Windows of 32 bits need no mask: what they save is what the mask costs."""


QUICK = tuple(Variant(order, step_bits, 16) for step_bits in (6, 4, 8) for order in (Order.BLOCK, Order.LANE))
"""The comparison that the choice of the format hangs on, in about a minute."""


def kernels(variant: Variant) -> list[Launch]:
    """What the sweep compiles, one split each. Two runs of four units take 125 registers; a ring of a lane is a run of its own."""
    runs = ((1, 1), (1, 2)) if variant.order is Order.LANE else ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    return [Launch(warps, depth, ahead) for warps in WARPS for depth, ahead in runs]


def launches(variant: Variant, shape: tuple[int, int]) -> list[Launch]:
    """All launches of the sweep: those that divide the columns evenly into enough warps, and not too many."""
    rows, columns = shape[0] // variant.unit_shape[0], shape[1] // variant.unit_shape[1]
    return [
        replace(kernel, splits=splits)
        for kernel in kernels(variant)
        for splits in range(1, columns + 1)
        if columns % (splits * kernel.warps * kernel.depth) == 0
        and columns // (splits * kernel.warps * kernel.depth) >= kernel.ahead
        and MIN_WARPS <= rows * splits * kernel.warps <= MAX_WARPS
    ]


def repack(rings: Tensor, variant: Variant) -> Tensor:
    """Rings in canonical order, int32 [units, rings of a unit, words], in the order of the kernel: int32 [units, words of a unit]."""
    units = len(rings)
    if variant.order is Order.TILE:
        return rings.reshape(units, -1)
    if variant.order is Order.LANE or variant.step_bits % 2 == 0:
        return rings.reshape(units, 32, -1).transpose(1, 2).reshape(units, -1)
    arcs = rings.view(torch.int16).reshape(units, 32, variant.step_bits)
    words = arcs[..., :-1].contiguous().view(torch.int32)
    halves = arcs[..., -1].contiguous().view(torch.int32)
    return torch.cat([words.transpose(1, 2).reshape(units, -1), halves], dim=1)


def decode(rings: Tensor, variant: Variant, shape: tuple[int, int]) -> Tensor:
    """The weight of canonical rings: float16 [out_features, in_features]."""
    windows = ring_windows(rings, variant.step_bits, variant.window_bits)
    if variant.code is Code.SHIFTED:
        first = (windows * (MULTIPLIERS[0] << (32 - variant.window_bits))) & 0xFFFFFFFF
        second = (first * MULTIPLIERS[1]) >> 32
    else:
        first, second = (windows * multiplier + increment for multiplier, increment in zip(MULTIPLIERS, INCREMENTS, strict=True))
    bits = (torch.stack([first, second]) & AND) ^ XOR
    halves = torch.stack([bits & 0xFFFF, bits >> 16], dim=-1).to(torch.int16).view(torch.float16)
    unit_rows, unit_columns = variant.unit_shape
    rows, columns = shape[0] // unit_rows, shape[1] // unit_columns
    pairs = (halves[0] + halves[1]).flatten(1)
    if variant.order is Order.TILE:  # ring = tile of the block; step = lane, quarter
        lanes = pairs.reshape(rows, columns, 4, 8, 4, 2, 2, 2)
    elif variant.order is Order.BLOCK:  # step = lane, tile, quarter
        lanes = pairs.reshape(rows, columns, 8, 4, 4, 2, 2, 2).permute(0, 1, 4, 2, 3, 5, 6, 7)
    else:  # ring = lane; step = tile along the columns, quarter
        lanes = pairs.reshape(rows, columns, 8, 4, 16, 2, 2, 2).permute(0, 1, 4, 2, 3, 5, 6, 7)
    # row, column, tile, g, t, q // 2, q % 2, value -> row, (tile), q % 2, g, column, (tile), q // 2, t, value
    if variant.order is Order.LANE:
        return lanes.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(shape)
    return lanes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(shape)


def fragments(x: Tensor) -> Tensor:
    """Activations float16 [batch, in_features] in the order of the B operand, eight rows: int64 [in_features * 2]."""
    padded = torch.zeros(8, x.shape[1], dtype=torch.float16, device=x.device)
    padded[: len(x)] = x
    return padded.reshape(8, -1, 2, 4, 2).permute(1, 0, 3, 2, 4).flatten().view(torch.int64)


def rings_of(variant: Variant, shape: tuple[int, int], device: str) -> Tensor:
    """Random canonical rings of one weight: int32 [units, rings of a unit, words]; every string of bits is a code."""
    units = shape[0] * shape[1] // (variant.unit_shape[0] * variant.unit_shape[1])
    rings = {Order.TILE: 4, Order.BLOCK: 1, Order.LANE: 32}[variant.order]
    return torch.randint(-(1 << 31), 1 << 31, (units, rings, variant.unit_words // rings), dtype=torch.int32, device=device)


def run(variant: Variant, launch: Launch, shape: tuple[int, int], codes: Tensor, x: Tensor, out: Tensor) -> None:
    """Add the product to `out`, float32 [out_features, batch]; codes as `repack`, x as `fragments` make them."""
    columns = shape[1] // variant.unit_shape[1]
    steps = columns // (launch.splits * launch.warps * launch.depth)
    multiply[(shape[0] // variant.unit_shape[0], launch.splits)](
        codes, codes.view(torch.int16), x, out, columns, steps, **constants(variant, launch, out.shape[1]), num_warps=launch.warps
    )


def constants(variant: Variant, launch: Launch, batch: int) -> dict[str, int]:
    """The compile-time arguments of the kernel."""
    return {
        "ORDER": int(variant.order), "STEP_BITS": variant.step_bits, "WINDOW_BITS": variant.window_bits, "BATCH": batch,
        "CODE": int(variant.code), "DEPTH": launch.depth, "AHEAD": launch.ahead, "WARPS": launch.warps,
    }  # fmt: skip


def compile_ahead(variant: Variant, launch: Launch, batch: int) -> None:
    """Put one kernel into Triton's cache on disk; runs in a process of its own."""
    dtypes = (torch.int32, torch.int16, torch.int64, torch.float32)
    multiply.warmup(*dtypes, 256, 2, **constants(variant, launch, batch), num_warps=launch.warps, grid=(1, 1))


def microseconds(calls: Sequence[Callable[[], object]], replays: int, before: Callable[[], object] | None = None) -> float:
    """Median time of one call; all calls are captured into one CUDA graph, after `before`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if before is not None:
            before()
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    return float(sorted(times[2:])[replays // 2])


@cache
def bf16_microseconds(shape: tuple[int, int], batch: int) -> float:
    """Time of `F.linear` in bf16 over weights that come from memory."""
    copies = max(2, -(-CACHE_BYTES // (2 * shape[0] * shape[1])))
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device="cuda")
    return microseconds([partial(functional.linear, x, weight) for weight in weights] * 4, REPLAYS)


Known = dict[tuple[Order, int, tuple[int, int], int], Launch]
"""The fastest launch by order, step bits, shape and batch: swept once, then used for other windows and codes too."""


def measure(variant: Variant, shape: tuple[int, int], known: Known) -> Iterator[dict[str, object]]:
    """One row for each batch: every launch is compared with the float64 product of the decoded weight, and the fastest is timed."""
    rings = rings_of(variant, shape, "cuda")
    weight = decode(rings, variant, shape).double()
    first = repack(rings, variant)
    copies = max(2, -(-CACHE_BYTES // (first.numel() * 4)))
    codes = torch.randint(-(1 << 31), 1 << 31, (copies, first.numel()), dtype=torch.int32, device="cuda")
    codes[0] = first.flatten()
    del rings, first
    for batch in BATCHES:
        x = torch.randn(batch, shape[1], dtype=torch.float16, device="cuda")
        expected = weight @ x.double().T
        operand = fragments(x)
        outs = torch.empty(copies, shape[0], batch, dtype=torch.float32, device="cuda")
        row: dict[str, object] = {
            **variant.row, "batch": batch, "out_features": shape[0], "in_features": shape[1],
            "bf16_us": round(bf16_microseconds(shape, batch), 2),
        }  # fmt: skip
        times, worst = {}, 0.0
        key = (variant.order, variant.step_bits, shape, batch)
        try:
            for launch in [known[key]] if key in known else launches(variant, shape):
                outs.zero_()
                run(variant, launch, shape, codes[0], operand, outs[0])
                error = ((outs[0] - expected).norm(dim=0) / expected.norm(dim=0)).max().item()
                if not error < MAX_ERROR:
                    raise ArithmeticError(f"relative error {error:.2e} of {launch} must be below {MAX_ERROR}")
                worst = max(worst, error)
                calls = [partial(run, variant, launch, shape, codes[i], operand, outs[i]) for i in range(copies)]
                times[launch] = microseconds(calls, SWEEP_REPLAYS, outs.zero_)
            best = known[key] = min(times, key=times.__getitem__)
            calls = [partial(run, variant, best, shape, codes[i], operand, outs[i]) for i in range(copies)]
            row |= {"us": round(microseconds(calls, REPLAYS, outs.zero_), 2), "max_rel_error": worst}
            row |= {"warps": best.warps, "depth": best.depth, "ahead": best.ahead, "splits": best.splits}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
        yield row


def table(rows: list[dict[str, object]]) -> Iterator[str]:
    """Sums over the four shapes in us, with the ratio to bf16."""
    yield f"{'variant':8} {'bits':>5} {'L':>3} {'code':8} {'batch':>5} {'us':>8} {'bf16':>8} {'ratio':>6}   each shape"
    keys = ("variant", "rate", "window_bits", "code", "batch")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        group = [row for row in rows if tuple(row[name] for name in keys) == key]
        label = f"{key[0]:8} {key[1]:5} {key[2]:3} {key[3]:8} {key[4]:5}"
        if len(group) < len(SHAPES) or any("us" not in row for row in group):
            yield f"{label}  incomplete or failed"
            continue
        ours, theirs = (sum(float(str(row[name])) for row in group) for name in ("us", "bf16_us"))
        yield f"{label} {ours:8.1f} {theirs:8.1f} {theirs / ours:6.2f}   {' / '.join(str(row['us']) for row in group)}"


def timings(variants: Sequence[Variant], budget_s: float) -> Iterator[dict[str, object]]:
    """Compile in parallel, then measure all variants, in their order; stops when the time is spent."""
    started = time.monotonic()
    jobs = [(variant, kernel, batch) for variant in variants for kernel in kernels(variant) for batch in BATCHES]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_ahead, *job) for job in jobs]
        failures = [f"{job}: {str(future.exception())[-300:]}" for job, future in zip(jobs, futures, strict=True) if future.exception()]
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - started:.0f} s, {len(failures)} failed", flush=True)
    print(*failures[:3], sep="\n", flush=True)
    known: Known = {}
    for variant in variants:
        for shape in SHAPES:
            if time.monotonic() - started > budget_s:
                print(f"stopped before {variant}, {shape}: {budget_s} s are spent", flush=True)
                return
            try:
                yield from measure(variant, shape, known)
            except Exception as error:
                failure = {"out_features": shape[0], "in_features": shape[1], "error": f"{type(error).__name__}: {str(error)[-600:]}"}
                yield from ({**variant.row, "batch": batch, **failure} for batch in BATCHES)


def main() -> int:
    """Count or time; print each row, and the table of timings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sass", action="store_true", help="count machine instructions instead; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="only blocks and lanes, windows of 16 bits, at 2, 3 and 4 bits")
    parser.add_argument("--budget-s", type=float, help="start no new measurement after this many seconds (130, quick: 68)")
    options = parser.parse_args()
    if options.sass:
        from benchmarks.studies import sass

        source = sass.rows()
    elif torch.cuda.is_available():
        import triton  # type: ignore[import-untyped]

        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}), flush=True)
        torch.manual_seed(0)
        source = timings(QUICK if options.quick else VARIANTS, options.budget_s or (68 if options.quick else 130))
    else:
        print("no CUDA device; --sass needs none", file=sys.stderr)
        return 2
    rows = []
    for row in source:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not options.sass:
        print("\n".join(table(rows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
