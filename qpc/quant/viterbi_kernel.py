"""The compiled search of one ring. Imports numba; everything else reaches it through `viterbi`.

A state is a window s of L bits; its low k bits are the symbol of its step, its upper L - k bits are the low bits of the next window. With
u = s >> k, the best cost of a walk that ends in any window of suffix u is

    m[u] = min over r of  m_before[s mod 2^(L-k)] + |c(s) - x|^2,   s = u 2^k + r,

so that the only array carried from step to step is m. The symbols r that are tried are those of `neighbours`. The lanes of a vector are
suffixes; the symbol that won is kept for each suffix and step, so the traceback only follows it.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

FAR = np.float32(1e30)
"""Cost of a state that the walk may not pass."""

LANES = 16
"""Suffixes of one vector."""


@intrinsic
def _advance_vectors(
    typing_context: Any, before: Any, after: Any, won: Any, symbols: Any, points: Any, cell: Any, x: Any, y: Any, step_bits: Any
) -> Any:
    """`_advance` for a multiple of LANES suffixes. Written out, since a compiler cannot know that the gathered array is not stored to."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word, half, short, real = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
        wide, floats, shorts = (ir.VectorType(kind, LANES) for kind in (half, real, short))
        arrays = [make_array(kind)(context, builder, value) for kind, value in zip(signature.args[:5], arguments[:5], strict=True)]  # type: ignore[no-untyped-call]
        before_data, after_data, won_data, symbols_data, points_data = (array.data for array in arrays)
        slots, suffixes = (builder.extract_value(arrays[3].shape, axis) for axis in (1, 2))
        plane = builder.mul(builder.mul(builder.extract_value(arrays[3].shape, 0), slots), suffixes)
        cell, step_bits = (builder.sext(value, word) if value.type.width < 64 else value for value in (arguments[5], arguments[8]))

        def constant(kind: Any, values: Any) -> ir.Constant:
            return ir.Constant(ir.VectorType(kind, LANES), values)

        def splat(value: ir.Value) -> ir.Value:
            undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
            first = builder.insert_element(undefined, value, ir.Constant(half, 0))
            return builder.shuffle_vector(first, undefined, constant(half, [0] * LANES))

        def place(data: ir.Value, index: ir.Value, vector: ir.VectorType) -> ir.Value:
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        name = f"v{LANES}f32"
        fused = builder.module.declare_intrinsic(f"llvm.fmuladd.{name}", (), ir.FunctionType(floats, [floats] * 3))
        pointers = ir.VectorType(real.as_pointer(), LANES)
        gather_type = ir.FunctionType(floats, [pointers, half, ir.VectorType(ir.IntType(1), LANES), floats])
        gather = cgutils.get_or_insert_function(builder.module, gather_type, f"llvm.masked.gather.{name}.v{LANES}p0")  # type: ignore[no-untyped-call]
        all_lanes, nothing = constant(ir.IntType(1), [1] * LANES), ir.Constant(floats, ir.Undefined)
        words = ir.VectorType(word, LANES)
        origin = splat(builder.ptrtoint(before_data, word))
        x_lanes, y_lanes = splat(arguments[6]), splat(arguments[7])
        mask = splat(builder.trunc(builder.sub(suffixes, ir.Constant(word, 1)), half))
        shift = splat(builder.trunc(step_bits, half))
        best, found = (cgutils.alloca_once(builder, kind) for kind in (floats, wide))  # type: ignore[no-untyped-call]
        lanes, zero = ir.Constant(word, LANES), ir.Constant(word, 0)
        with cgutils.for_range_slice(builder, zero, suffixes, lanes, inc=True) as (start, _):
            own = builder.add(splat(builder.trunc(start, half)), constant(half, list(range(LANES))))
            base = builder.shl(own, shift)
            builder.store(constant(real, [float(FAR)] * LANES), best)
            builder.store(constant(half, [0] * LANES), found)
            with cgutils.for_range(builder, slots) as slot:
                row = builder.add(builder.mul(cell, slots), slot.index)
                at = builder.add(builder.mul(row, suffixes), start)
                symbol = builder.zext(builder.load(place(symbols_data, at, shorts), align=2), wide)
                source = builder.and_(builder.or_(base, symbol), mask)
                offsets = builder.shl(builder.zext(source, words), constant(word, [2] * LANES))
                addresses = builder.inttoptr(builder.add(origin, offsets), pointers)
                cost = builder.call(gather, [addresses, ir.Constant(half, 4), all_lanes, nothing])
                for offset, target in ((zero, x_lanes), (plane, y_lanes)):
                    short_values = builder.load(place(points_data, builder.add(at, offset), shorts), align=2)
                    away = builder.fsub(builder.sitofp(short_values, floats), target)
                    cost = builder.call(fused, [away, away, cost])
                held = builder.load(best)
                better = builder.fcmp_ordered("<", cost, held)
                builder.store(builder.select(better, cost, held), best)
                builder.store(builder.select(better, symbol, builder.load(found)), found)
            builder.store(builder.load(best), place(after_data, start, floats), align=4)
            builder.store(builder.trunc(builder.load(found), shorts), place(won_data, start, shorts), align=2)
        return context.get_dummy_value()

    return types.void(before, after, won, symbols, points, cell, x, y, step_bits), generate


@njit(nogil=True, cache=True)
def _advance(
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    won: NDArray[np.uint16],
    symbols: NDArray[np.uint16],
    points: NDArray[np.int16],
    cell: np.int32,
    x: np.float32,
    y: np.float32,
    step_bits: int,
) -> None:
    """One step for all suffixes: `after = m(before)`, the winning symbols in `won`; symbols and points as `search_ring` takes them."""
    _, slots, suffixes = symbols.shape
    if suffixes % LANES == 0:
        _advance_vectors(before, after, won, symbols, points, cell, x, y, step_bits)  # type: ignore[call-arg]
        return
    for u in range(suffixes):
        after[u] = FAR
        won[u] = 0
        for slot in range(slots):
            symbol = symbols[cell, slot, u]
            across, along = np.float32(points[0, cell, slot, u]) - x, np.float32(points[1, cell, slot, u]) - y
            cost = before[((u << step_bits) | symbol) & (suffixes - 1)] + across * across + along * along
            if cost < after[u]:
                after[u], won[u] = cost, symbol


@njit(nogil=True, cache=True)
def _walk(
    values: NDArray[np.float32],
    cells: NDArray[np.int32],
    symbols: NDArray[np.uint16],
    points: NDArray[np.int16],
    costs: NDArray[np.float32],
    history: NDArray[np.uint16],
    first: int,
    steps: int,
    step_bits: int,
) -> NDArray[np.float32]:
    """Steps `first ...` of a ring, counted around it, from the costs `costs[0]`; returns the costs after the last."""
    ring_steps = len(values)
    for step in range(steps):
        at = (first + step) % ring_steps
        cell, x, y = cells[at], values[at, 0], values[at, 1]
        before, after = costs[step % 2], costs[(step + 1) % 2]
        _advance(before, after, history[step], symbols, points, cell, x, y, step_bits)
    last: NDArray[np.float32] = costs[steps % 2]
    return last


@njit(nogil=True, cache=True)
def search_ring(
    values: NDArray[np.float32],
    cells: NDArray[np.int32],
    symbols: NDArray[np.uint16],
    points: NDArray[np.int16],
    costs: NDArray[np.float32],
    history: NDArray[np.uint16],
    found: NDArray[np.uint16],
    reach: int,
    step_bits: int,
) -> None:
    """Both passes over one ring.

    values: float32 [steps, 2]; cells: int32 [steps]; symbols: uint16 [cells, slots, suffixes]; points: int16 [2, cells, slots, suffixes],
    the code values of the listed windows, in the unit of the values. costs: float32 [2, suffixes]; history: uint16 [steps, suffixes];
    both are workspace. found: uint16 [steps], filled with the low bits of each window. reach: steps of the first pass on either side of
    the joint.
    """
    steps, suffixes = len(values), symbols.shape[2]
    mask = suffixes - 1
    costs[0] = 0
    last = _walk(values, cells, symbols, points, costs, history, -reach, 2 * reach, step_bits)
    suffix = np.argmin(last)
    for step in range(2 * reach - 1, reach - 1, -1):
        suffix = ((suffix << step_bits) + history[step, suffix]) & mask
    joint = suffix
    costs[0] = FAR
    costs[0, joint] = 0
    _walk(values, cells, symbols, points, costs, history, 0, steps, step_bits)
    for step in range(steps - 1, -1, -1):
        found[step] = history[step, suffix]
        suffix = ((suffix << step_bits) + found[step]) & mask
