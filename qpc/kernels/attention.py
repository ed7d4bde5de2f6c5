"""Attention of one new token to the places of a cache of fixed length, in one launch; it also writes the token to the cache.

A program has one head of the keys with all queries that read it, and a part of the places. Nothing is read beyond the position, which is
on the device, so the time grows with what the cache holds and not with its length. Programs that share a head leave their sums in a
workspace (flash decoding: softmax of a part, with its maximum and sum); the last of them to finish puts these together. It knows
by a counter, which it sets back.

Where a kernel may be launched while the one before still runs, q, k and v of the new token are what must be waited for. The position, the
turns of the rotary embedding and what the cache holds come from kernels that were not launched so, or from the step before: these have
ended before any kernel behind them begins. A plan may read them `ahead`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment"

from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from qpc.kernels import workspaces
from qpc.kernels.launch import processors

BLOCK = 32
"""Places that a program takes at a time, unless a plan says otherwise."""

TOGETHER = tl.constexpr(4)
"""Parts of a head that are put together at a time."""

MAX_SPLITS = 64
ROWS = 16
"""Queries of a program at least, for tensor cores; those beyond the queries of a head are idle."""

PDL_CAPABILITY = (9, 0)
"""Oldest compute capability on which a kernel may be launched while the one before still runs; this one waits for it before it reads."""

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turned(x, at, place, mask, cos, sin, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Values x[at + place], turned by rotary embedding if ROPE: `x cos + rotate_half(x) sin`, float32, once rounded to the dtype of x.

    cos, sin: float32, for each place.
    """
    value = tl.load(x + at + place, mask=mask, other=0.0)
    if ROPE:
        low = place < WIDTH // 2
        partner = tl.load(x + at + tl.where(low, place + WIDTH // 2, place - WIDTH // 2), mask=mask, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * cos + tl.where(low, -partner, partner) * sin).to(value.dtype)
    return value


@triton.jit
def _places(keys, values, base, begin, last, place, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values of BLOCK places from `begin` on, zeros from `last` on."""
    which = begin + tl.arange(0, BLOCK)
    at = base + which.to(tl.int64)[:, None] * WIDTH + place[None, :]
    held = (which < last)[:, None]
    return tl.load(keys + at, mask=held, other=0.0), tl.load(values + at, mask=held, other=0.0)


@triton.jit
def _attention_kernel(
    q, k, v, keys, values, position, starts, cos, sin, out, partial, counters,
    scale, window, length, q_batch, q_head, k_batch, k_head, v_batch, v_head, turn_batch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ROPE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Programs (head of the keys of a sequence, split). HEADS: of the keys of one sequence. AHEAD: read what may be read before the wait.

    partial: float32 [programs, ROWS * (WIDTH + 2)]: sums of each row, then the maximum of each, then the sum of weights of each.
    counters: int32, one for each head, -1 before and after.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and not AHEAD:
        tl.extra.cuda.gdc_wait()
    head, split = tl.program_id(0), tl.program_id(1)
    item, own = head // HEADS, head % HEADS
    now = tl.load(position).to(tl.int32)
    start = tl.load(starts + item).to(tl.int32)
    if window > 0:
        start = tl.maximum(start, now + 1 - window)
    count = now - start
    chunk = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
    live = tl.maximum(tl.cdiv(count, tl.maximum(chunk, 1)), 1)
    if split >= live:
        return
    row, place = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = (row < GROUP)[:, None] & (place < WIDTH)[None, :]
    base = head.to(tl.int64) * length * WIDTH
    first = start + split * chunk
    last = tl.minimum(first + chunk, now)
    turn_cos, turn_sin = 0.0, 0.0
    if ROPE:
        turn_cos = tl.load(cos + item * turn_batch + place).to(tl.float32)
        turn_sin = tl.load(sin + item * turn_batch + place).to(tl.float32)
    if AHEAD:
        key, value = _places(keys, values, base, first, last, place, WIDTH, BLOCK)
    if PDL and AHEAD:
        tl.extra.cuda.gdc_wait()
    at_q = q + item.to(tl.int64) * q_batch + own * GROUP * q_head
    query = _turned(at_q, row[:, None] * q_head, place[None, :], there, turn_cos, turn_sin, WIDTH, ROPE)

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if split == 0:
        new_key = _turned(k + item.to(tl.int64) * k_batch + own * k_head, 0, place, place < WIDTH, turn_cos, turn_sin, WIDTH, ROPE)
        new_value = tl.load(v + item.to(tl.int64) * v_batch + own * v_head + place)
        at = base + now.to(tl.int64) * WIDTH + place
        tl.store(keys + at, new_key)
        tl.store(values + at, new_value)
        most = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * (scale * _LOG2E)
        total += 1.0
        acc += new_value.to(tl.float32)[None, :]
    for begin in range(first, last, BLOCK):
        if not AHEAD:
            key, value = _places(keys, values, base, begin, last, place, WIDTH, BLOCK)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * _LOG2E)
        scores = tl.where((begin + tl.arange(0, BLOCK) < last)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        most = higher
        if AHEAD:
            key, value = _places(keys, values, base, begin + BLOCK, last, place, WIDTH, BLOCK)

    at_out = out + (item * HEADS + own) * GROUP * WIDTH + row[:, None] * WIDTH + place[None, :]
    if live == 1:
        tl.store(at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
        return
    at = partial + (head * SPLITS + split) * (ROWS * (WIDTH + 2))
    tl.store(at + row[:, None] * WIDTH + place[None, :], acc, mask=there)
    tl.store(at + ROWS * WIDTH + row, most, mask=row < GROUP)
    tl.store(at + ROWS * (WIDTH + 1) + row, total, mask=row < GROUP)
    tl.debug_barrier()
    done = tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu")
    if done == live - 2:  # they begin at -1
        tl.store(counters + head, -1)
        most = tl.where(row < GROUP, float("-inf"), 0.0)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for begin in range(0, live, TOGETHER):
            other = begin + tl.arange(0, TOGETHER)
            parts = partial + (head * SPLITS + other) * (ROWS * (WIDTH + 2))
            at_row = parts[:, None] + ROWS * WIDTH + row[None, :]
            held = (other < live)[:, None] & (row < GROUP)[None, :]
            its_most = tl.load(at_row, mask=held, other=float("-inf"), cache_modifier=".cg")
            its_total = tl.load(at_row + ROWS, mask=held, other=0.0, cache_modifier=".cg")
            at_place = parts[:, None, None] + row[None, :, None] * WIDTH + place[None, None, :]
            its_acc = tl.load(at_place, mask=held[:, :, None], other=0.0, cache_modifier=".cg")
            higher = tl.maximum(most, tl.max(its_most, 0))
            shrink, its_shrink = tl.exp2(most - higher), tl.exp2(its_most - higher[None, :])
            total = total * shrink + tl.sum(its_total * its_shrink, 0)
            acc = acc * shrink[:, None] + tl.sum(its_acc * its_shrink[:, :, None], 0)
            most = higher
        tl.store(at_out, (acc / tl.maximum(total, 1.0)[:, None]).to(out.dtype.element_ty), mask=there)  # idle rows have a sum of 0


@dataclass(frozen=True)
class Plan:
    """splits: programs that share a head at most. warps: of a program. block: places at a time. ahead: see above; it was never timed."""

    splits: int
    warps: int
    block: int = BLOCK
    ahead: bool = False


@cache
def plan(heads: int, length: int, multiprocessors: int) -> Plan:
    """Two programs for each multiprocessor where there are places enough. heads: of the keys, of all sequences."""
    wanted = max(1, 2 * multiprocessors // heads)
    return Plan(min(MAX_SPLITS, wanted, -(-length // BLOCK)), 4)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window: int,
    cut: Plan | None = None,
) -> Tensor:
    """As `qpc::decode_attention`; the innermost axes of q, k and v have no gaps, keys and values are contiguous."""
    batch, heads, length, width = keys.shape
    group = q.shape[1] // heads
    rows = max(ROWS, triton.next_power_of_2(group))
    cut = cut or plan(batch * heads, length, processors(q.device))
    out = torch.empty((batch, 1, q.shape[1], width), dtype=q.dtype, device=q.device)
    partial = torch.empty((batch * heads, cut.splits, rows, width + 2), dtype=torch.float32, device=q.device)
    counters = _counters(batch * heads, q.device)
    precision = "ieee" if q.dtype is torch.float32 else "tf32"
    early = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= PDL_CAPABILITY
    turn_batch = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    _attention_kernel[(batch * heads, cut.splits)](
        q, k, v, keys, values, position, starts, q if cos is None else cos, q if sin is None else sin, out, partial, counters,
        scale, window, length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), turn_batch,
        HEADS=heads, GROUP=group, ROWS=rows, WIDTH=width, SPLITS=cut.splits, BLOCK=cut.block, ROPE=cos is not None, PRECISION=precision,
        PDL=early, AHEAD=cut.ahead, num_warps=cut.warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _counters(count: int, device: torch.device) -> Tensor:
    """Counters that are -1 between launches, int32: places of the workspace that kernels of this stream share."""
    if device.type != "cuda":
        return torch.full((count,), -1, dtype=torch.int32, device=device)
    return workspaces.take(count, device).view(torch.int32)
