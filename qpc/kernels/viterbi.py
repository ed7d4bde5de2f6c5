"""Search of the tail-biting bitshift trellis on a GPU: the same two passes, costs and ties as `qpc.quant.viterbi`.

With u a suffix of L - k bits and x the values of a step, the only array carried from step to step is

    m[u] = min over r of  m_before[s mod 2^(L-k)] + |c(s)|^2 - 2 c(s) . x,   s = u 2^k + r,   plus |x|^2,

A program searches `RINGS` rings, which share the code points; it loads a block of `m_before` once and meets it with every code that follows
it. All steps of `m` stay in memory, so that the traceback searches the 2^k branches of one state again instead of reading back-pointers.
Rings are searched in chunks that bound this memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels.computed_code import decode_window
from qpc.quant.bitstring import pack

FAR = tl.constexpr(1e30)
"""Cost of a state that the walk may not pass."""

JOINT_WINDOWS = 8
"""The first pass covers this many window lengths to either side of the joint."""

SCRATCH_BYTES = 4 << 30
"""Bound on the memory of the steps; half of the free memory if that is less."""

RINGS = 4
"""Rings that share the code points of a program."""

STATES = 2048
"""States of one block of a program, more if one step has more branches."""


@triton.jit
def _cost(before, even, odd, energy, x_0, x_1):
    """Cost of entering each state, without |x|^2; x is given as -2 x."""
    return tl.fma(odd, x_1, tl.fma(even, x_0, before + energy))


@triton.jit
def _code(state):
    """Code values of each state and their sum of squares, as float32."""
    even, odd = decode_window(state.to(tl.uint32))
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    return even, odd, even * even + odd * odd


@triton.jit
def _forward_kernel(
    values, history, joint, rings, ring_steps, first, steps,
    STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, FREE: tl.constexpr, RINGS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Fill `history` [rings, steps + 1, suffixes] from its first step on: all zero if FREE, else only the suffix `joint` is open."""
    suffixes: tl.constexpr = 1 << (WINDOW_BITS - STEP_BITS)
    low_suffixes: tl.constexpr = suffixes >> HIGH_BITS
    start: tl.constexpr = suffixes if suffixes < 1024 else 1024
    ring_size = (steps + 1).to(tl.int64) * suffixes
    for i in tl.static_range(RINGS):
        ring = tl.minimum(tl.program_id(0) * RINGS + i, rings - 1)
        for at in range(0, suffixes, start):
            suffix = at + tl.arange(0, start)
            cost = tl.zeros((start,), tl.float32)
            if not FREE:
                cost = tl.where(suffix == tl.load(joint + ring), cost, FAR)
            tl.store(history + ring * ring_size + suffix, cost)
    tl.debug_barrier()
    for step in range(steps):
        for at in range(0, low_suffixes, GROUP):
            low = at + tl.arange(0, GROUP)
            state = (low[:, None] << STEP_BITS) + tl.arange(0, 1 << STEP_BITS)[None, :]
            come_from = state
            if HIGH_BITS < STEP_BITS:
                come_from = state & (suffixes - 1)
            before, x_0, x_1, square = (), (), (), ()
            for i in tl.static_range(RINGS):
                ring = tl.minimum(tl.program_id(0) * RINGS + i, rings - 1)
                before += (tl.load(history + ring * ring_size + step * suffixes + come_from),)
                here = values + (ring.to(tl.int64) * ring_steps + (first + step) % ring_steps) * 2
                a, b = tl.load(here), tl.load(here + 1)
                x_0 += (-2 * a,)
                x_1 += (-2 * b,)
                square += (a * a + b * b,)
            for high in range(1 << HIGH_BITS):
                even, odd, energy = _code((high << (WINDOW_BITS - HIGH_BITS)) + state)
                for i in tl.static_range(RINGS):
                    ring = tl.minimum(tl.program_id(0) * RINGS + i, rings - 1)
                    cost = tl.min(_cost(before[i], even, odd, energy, x_0[i], x_1[i]), axis=1)
                    target = history + ring * ring_size + (step + 1) * suffixes + high * low_suffixes + low
                    tl.store(target, tl.minimum(cost, FAR) + square[i])
        tl.debug_barrier()


@triton.jit
def _trace_kernel(
    values, history, joint, symbols, ring_steps, first, steps, last,
    STEP_BITS: tl.constexpr, WINDOW_BITS: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Walk one ring back from step `steps` to step `last`.

    FREE: from the cheapest suffix, leaving the suffix that it reaches in `joint`. Else from the suffix `joint`, writing the symbols.
    """
    suffixes: tl.constexpr = 1 << (WINDOW_BITS - STEP_BITS)
    block: tl.constexpr = suffixes if suffixes < 1024 else 1024
    ring = tl.program_id(0).to(tl.int64)
    costs = history + ring * (steps + 1) * suffixes
    if FREE:
        suffix = 0
        least = FAR
        for at in range(0, suffixes, block):
            cost = tl.load(costs + steps * suffixes + at + tl.arange(0, block))
            here, index = tl.min(cost, axis=0), tl.argmin(cost, axis=0, tie_break_left=True)
            suffix = tl.where(here < least, at + index, suffix)
            least = tl.minimum(here, least)
    else:
        suffix = tl.load(joint + ring)
    branch = tl.arange(0, 1 << STEP_BITS)
    for back in range(steps - last):
        step = steps - 1 - back
        state = (suffix << STEP_BITS) + branch
        even, odd, energy = _code(state)
        before = tl.load(costs + step * suffixes + (state & (suffixes - 1)))
        here = values + (ring * ring_steps + (first + step) % ring_steps) * 2
        cost = _cost(before, even, odd, energy, -2 * tl.load(here), -2 * tl.load(here + 1))
        symbol = tl.argmin(cost, axis=0, tie_break_left=True)
        if not FREE:
            tl.store(symbols + ring * ring_steps + step, symbol)
        suffix = ((suffix << STEP_BITS) + symbol) & (suffixes - 1)
    if FREE:
        tl.store(joint + ring, suffix)


def encode_rings(values: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Bits of the rings closest to `values` in squared error: int32 [rings, steps * step_bits / 32], in the bit order of `trellis`.

    values: float32 [rings, steps, 2] on a GPU, in units of the integer code; steps divisible by 32. Equal to what
    `qpc.quant.viterbi.encode_rings` finds, except where two walks differ by less than float32 can tell. Raises `KernelError`.
    """
    if values.ndim != 3 or values.shape[2] != 2 or values.dtype != torch.float32:
        raise KernelError(f"rings are {values.dtype} {tuple(values.shape)}, required float32 [rings, steps, 2]")
    rings, steps, _ = values.shape
    if steps % 32 or not step_bits <= window_bits <= steps * step_bits:
        raise KernelError(f"{steps=} of {step_bits=} make no ring for {window_bits=}; required a multiple of 32, not shorter than a window")
    values = values.contiguous()
    symbols = torch.empty((rings, steps), dtype=torch.int32, device=values.device)
    chunk = ring_chunk(steps, step_bits, window_bits, values.device)
    with torch.cuda.device_of(values):
        for start in range(0, rings, chunk):
            _search(values[start : start + chunk], symbols[start : start + chunk], step_bits, window_bits)
    return pack(symbols, step_bits)


def ring_chunk(steps: int, step_bits: int, window_bits: int, device: torch.device) -> int:
    """Rings whose steps fit in the scratch memory together."""
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else SCRATCH_BYTES
    return max(1, min(SCRATCH_BYTES, free) // (4 * (steps + 1) << (window_bits - step_bits)))


def walk_shape(step_bits: int, window_bits: int) -> dict[str, int]:
    """Shape of a block of states: how many of the suffix bits the codes of one block run over, and suffixes met at once."""
    high_bits = min(step_bits, window_bits - step_bits)
    return {"HIGH_BITS": high_bits, "GROUP": min(1 << (window_bits - step_bits - high_bits), max(1, STATES >> step_bits))}


def walk_warps(step_bits: int, window_bits: int) -> int:
    """Warps of one program: about 8 states for each lane."""
    return max(1, min(8, (walk_shape(step_bits, window_bits)["GROUP"] << step_bits) // 256))


def _search(values: Tensor, symbols: Tensor, step_bits: int, window_bits: int) -> None:
    """Both passes over some rings: a free one across the joint, then one that begins and ends with the suffix found there."""
    rings, steps, _ = values.shape
    if rings == 0:
        return
    reach = min(steps // 2, JOINT_WINDOWS * -(-window_bits // step_bits))
    history = torch.empty((rings, steps + 1, 1 << (window_bits - step_bits)), dtype=torch.float32, device=values.device)
    joint = torch.empty(rings, dtype=torch.int32, device=values.device)
    shape, warps = walk_shape(step_bits, window_bits), walk_warps(step_bits, window_bits)
    bits = {"STEP_BITS": step_bits, "WINDOW_BITS": window_bits}
    for free, first, count, last in ((True, steps - reach, 2 * reach, reach), (False, 0, steps, 0)):
        _forward_kernel[(triton.cdiv(rings, RINGS),)](
            values, history, joint, rings, steps, first, count, **bits, **shape, FREE=free, RINGS=RINGS, num_warps=warps
        )
        _trace_kernel[(rings,)](values, history, joint, symbols, steps, first, count, last, **bits, FREE=free, num_warps=1)
