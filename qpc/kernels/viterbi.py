"""Search of the tail-biting bitshift trellis on a GPU: the same two passes, windows and costs as `qpc.quant.viterbi`.

One program searches one ring, all its steps in one launch. Its only state between steps is the array m of best costs, one for each suffix
of L - k bits, which lies in shared memory while the windows of `qpc.quant.neighbours` gather from it. The code of a window is computed, not
loaded. The number of the slot that won rides in the lowest bits of a cost, where it costs one instruction and no precision that matters;
the symbol behind it is kept for each suffix and step, and the traceback follows these. Rings are searched in chunks that bound this memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels.computed_code import hash_window
from qpc.quant.bitstring import pack
from qpc.quant.codebook import hash_words
from qpc.quant.neighbours import Neighbours, neighbours
from qpc.quant.viterbi import joint_reach

FAR = tl.constexpr(1e30)
"""Cost of a state that the walk may not pass."""

SCRATCH_BYTES = 8 << 30
"""Bound on the memory of the symbols that won; half of the free memory if that is less."""


@triton.jit(do_not_specialize=["ring_steps", "first", "steps", "step_bits", "free"])
def _walk_kernel(
    values, cells, table, history, joint, ring_steps, first, steps, step_bits, free,
    SUFFIX_BITS: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Walk each ring from step `first` on, and keep the winning symbols in `history`, uint16 [rings, steps, suffixes].

    free: if not 0, all suffixes are open at the start, and the cheapest at the end is left in `joint`; else only the suffix `joint` is
    open. The rate is no constant, so that two compiled kernels serve all rates of an effort.
    """
    suffixes: tl.constexpr = 1 << SUFFIX_BITS
    ring = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, suffixes)
    high = own.to(tl.uint32) << step_bits.to(tl.uint32)
    costs = tl.where((own == tl.load(joint + ring)) | (free != 0), 0.0, FAR)
    for step in range(steps):
        at = ring * ring_steps + (first + step) % ring_steps
        listed = table + tl.load(cells + at).to(tl.int64) * (SLOTS * suffixes) + own
        x_0, x_1 = tl.load(values + 2 * at), tl.load(values + 2 * at + 1)
        best = tl.full((suffixes,), FAR, tl.float32)
        for slot in tl.static_range(SLOTS):
            window = high | tl.load(listed + slot * suffixes).to(tl.uint32)
            before = tl.gather(costs, (window & (suffixes - 1)).to(tl.int32), 0)
            even, odd = hash_window(window, WORDS)
            across, along = even - x_0, odd - x_1
            cost = tl.fma(along, along, tl.fma(across, across, before))
            marked = (cost.to(tl.int32, bitcast=True) & -SLOTS) | slot
            best = tl.minimum(best, marked.to(tl.float32, bitcast=True))
        winner = best.to(tl.int32, bitcast=True) & (SLOTS - 1)
        tl.store(history + (ring * steps + step) * suffixes + own, tl.load(listed + winner * suffixes))
        costs = best
    if free != 0:
        tl.store(joint + ring, tl.argmin(costs, axis=0, tie_break_left=True))


@triton.jit(do_not_specialize=["ring_steps", "steps", "last", "step_bits", "suffixes", "free"])
def _trace_kernel(history, joint, symbols, ring_steps, steps, last, step_bits, suffixes, free):
    """Follow one ring back from step `steps` and the suffix `joint` to step `last`.

    free: if not 0, leave the suffix that it reaches in `joint`; else write the symbols.
    """
    ring = tl.program_id(0).to(tl.int64)
    suffix = tl.load(joint + ring)
    for back in range(steps - last):
        step = steps - 1 - back
        symbol = tl.load(history + (ring * steps + step) * suffixes + suffix).to(tl.int32)
        if free == 0:
            tl.store(symbols + ring * ring_steps + step, symbol)
        suffix = ((suffix << step_bits) | symbol) & (suffixes - 1)
    if free != 0:
        tl.store(joint + ring, suffix)


def encode_rings(values: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Bits of the rings closest to `values` in squared error: int32 [rings, steps * step_bits / 32], in the bit order of `trellis`.

    values: float32 [rings, steps, 2] on a GPU, in units of the code; steps divisible by 32. As good as what
    `qpc.quant.viterbi.encode_rings` finds, and equal to it except where two walks are nearly as good. Raises `KernelError`.
    """
    if values.ndim != 3 or values.shape[2] != 2 or values.dtype != torch.float32:
        raise KernelError(f"rings are {values.dtype} {tuple(values.shape)}, required float32 [rings, steps, 2]")
    rings, steps, _ = values.shape
    if steps % 32 or not step_bits <= window_bits <= steps * step_bits:
        raise KernelError(f"{steps=} of {step_bits=} make no ring for {window_bits=}; required a multiple of 32, not shorter than a window")
    values = values.contiguous()
    symbols = torch.empty((rings, steps), dtype=torch.int32, device=values.device)
    chunk = ring_chunk(steps, step_bits, window_bits, values.device)
    listed = neighbours(step_bits, window_bits, values.device)
    cells = listed.cells(values)
    with torch.cuda.device_of(values):
        for start in range(0, rings, chunk):
            some = slice(start, start + chunk)
            _search(values[some], cells[some], listed, symbols[some], step_bits, window_bits)
    return pack(symbols, step_bits)


def ring_chunk(steps: int, step_bits: int, window_bits: int, device: torch.device) -> int:
    """Rings whose winning symbols fit in the scratch memory together."""
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else SCRATCH_BYTES
    return max(1, min(SCRATCH_BYTES, free) // (2 * steps << (window_bits - step_bits)))


def walk_warps(suffix_bits: int) -> int:
    """Warps of one program: 4 suffixes for each lane, if so many fit."""
    return max(1, min(32, (1 << suffix_bits) // 128))


def _search(values: Tensor, cells: Tensor, listed: Neighbours, symbols: Tensor, step_bits: int, window_bits: int) -> None:
    """Both passes over some rings: a free one across the joint, then one that begins and ends with the suffix found there."""
    rings, steps, _ = values.shape
    reach = joint_reach(steps, step_bits, window_bits)
    suffix_bits = window_bits - step_bits
    history = torch.empty((rings, max(steps, 2 * reach), 1 << suffix_bits), dtype=torch.uint16, device=values.device)
    joint = torch.empty(rings, dtype=torch.int32, device=values.device)
    for free, first, count, last in ((1, steps - reach, 2 * reach, reach), (0, 0, steps, 0)):
        _walk_kernel[(rings,)](
            values, cells, listed.symbols, history, joint, steps, first, count, step_bits, free,
            SUFFIX_BITS=suffix_bits, SLOTS=listed.slots, WORDS=hash_words(step_bits, window_bits), num_warps=walk_warps(suffix_bits),
        )  # fmt: skip
        _trace_kernel[(rings,)](history, joint, symbols, steps, count, last, step_bits, 1 << suffix_bits, free, num_warps=1)
