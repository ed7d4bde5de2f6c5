"""The compiled search of one block of rings. Imports numba; everything else reaches it through `viterbi`.

A state is a window s of L bits; its low k bits are the symbol of its step, its upper L - k bits are the low bits of the next window. With
u = s >> k, the best cost of a walk that ends in any window of suffix u is

    m[u] = min over r of  m_before[s mod 2^(L-k)] + |c(s) - x|^2,   s = u 2^k + r,

so that the only array carried from step to step is m. The lanes of a vector are independent rings, which share the code points. No
back-pointers are kept: the traceback searches the 2^k branches of one state again.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

LANES = 32
"""Rings searched together: two vectors of 512 bits, or four of 256."""

FAR = np.float32(1e30)
"""Cost of a state that the walk may not pass."""


@intrinsic
def _advance(typing_context: Any, before: Any, after: Any, table: Any, values: Any, step_bits: Any, window_bits: Any) -> Any:
    """One step for all states: `after = m(before)`, both [2^(L-k), LANES] float32; table and values as `search_block` takes them."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word, real = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(real, LANES)
        arrays = zip(signature.args[:4], arguments[:4], strict=True)
        before_data, after_data, table_data, values_data = (
            make_array(kind)(context, builder, value).data  # type: ignore[no-untyped-call]
            for kind, value in arrays
        )
        k, window = (builder.sext(value, word) if value.type.width < 64 else value for value in arguments[4:])
        one = ir.Constant(word, 1)
        suffix = builder.sub(window, k)
        mask = builder.sub(builder.shl(one, suffix), one)
        high_bits = builder.select(builder.icmp_signed("<", k, suffix), k, suffix)
        low_bits = builder.sub(suffix, high_bits)
        table_rows = [builder.gep(table_data, [builder.mul(builder.shl(one, window), ir.Constant(word, row))]) for row in range(3)]

        def lanes(data: ir.Value, row: ir.Value) -> ir.Value:
            return builder.bitcast(builder.gep(data, [builder.mul(row, ir.Constant(word, LANES))]), vector.as_pointer())

        def load(data: ir.Value, row: ir.Value) -> ir.Value:
            return builder.load(lanes(data, row), align=64)

        def broadcast(row: int, column: ir.Value) -> ir.Value:
            undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            scalar = builder.load(builder.gep(table_rows[row], [column]))
            return builder.shuffle_vector(builder.insert_element(undefined, scalar, ir.Constant(word, 0)), undefined, zeros)

        fused = builder.module.declare_intrinsic(f"llvm.fmuladd.v{LANES}f32", (), ir.FunctionType(vector, [vector] * 3))
        first, second, energy = (load(values_data, ir.Constant(word, row)) for row in range(3))
        best = cgutils.alloca_once(builder, vector)  # type: ignore[no-untyped-call]
        with cgutils.for_range(builder, builder.shl(one, low_bits)) as low, cgutils.for_range(builder, builder.shl(one, high_bits)) as high:
            builder.store(ir.Constant(vector, [float(FAR)] * LANES), best)
            row = builder.shl(low.index, k)
            code = builder.shl(builder.add(builder.shl(low.index, high_bits), high.index), k)
            with cgutils.for_range(builder, builder.shl(one, k)) as branch:
                cost = load(before_data, builder.and_(builder.add(row, branch.index), mask))
                column = builder.add(code, branch.index)
                cost = builder.fadd(cost, broadcast(2, column))
                cost = builder.call(fused, [broadcast(0, column), first, cost])
                cost = builder.call(fused, [broadcast(1, column), second, cost])
                held = builder.load(best)
                builder.store(builder.select(builder.fcmp_ordered("<", cost, held), cost, held), best)
            target = builder.or_(builder.shl(high.index, low_bits), low.index)
            builder.store(builder.fadd(builder.load(best), energy), lanes(after_data, target), align=64)
        return context.get_dummy_value()

    return types.void(before, after, table, values, step_bits, window_bits), generate


@njit(nogil=True, cache=True)
def _trace(
    history: NDArray[np.float32],
    table: NDArray[np.float32],
    values: NDArray[np.float32],
    symbols: NDArray[np.uint16],
    lane: int,
    suffix: np.int64,
    first: int,
    last: int,
    step_bits: int,
    window_bits: int,
) -> np.int64:
    """Walk one ring back from `suffix` after step `last` to the suffix before step `first`; writes the symbols that it passes."""
    suffix_bits = window_bits - step_bits
    high_bits = min(step_bits, suffix_bits)
    low_bits = suffix_bits - high_bits
    mask = (1 << suffix_bits) - 1
    for step in range(last - 1, first - 1, -1):
        low, high = suffix & ((1 << low_bits) - 1), suffix >> low_bits
        code = ((low << high_bits) + high) << step_bits
        x, y = values[step, 0, lane], values[step, 1, lane]
        best, symbol = FAR, 0
        for r in range(1 << step_bits):
            before = history[step, ((low << step_bits) + r) & mask, lane]
            cost = before + table[2, code + r] + table[0, code + r] * x + table[1, code + r] * y
            if cost < best:
                best, symbol = cost, r
        symbols[lane, step] = symbol
        suffix = ((low << step_bits) + symbol) & mask
    return suffix


@njit(nogil=True, cache=True)
def _forward(
    history: NDArray[np.float32], table: NDArray[np.float32], values: NDArray[np.float32], steps: int, step_bits: int, window_bits: int
) -> None:
    """Fill `history[1 : steps + 1]` from `history[0]`."""
    for step in range(steps):
        _advance(history[step], history[step + 1], table, values[step], step_bits, window_bits)  # type: ignore[call-arg]


@njit(nogil=True, cache=True)
def _load(rings: NDArray[np.float32], values: NDArray[np.float32], first: int, steps: int) -> None:
    """Steps `first ...` of the rings, counted around them, lane by lane as -2 x, -2 y and x^2 + y^2; idle lanes are zero."""
    values[:] = 0
    for lane in range(rings.shape[0]):
        for step in range(steps):
            x, y = rings[lane, (first + step) % rings.shape[1]]
            values[step, 0, lane] = -2 * x
            values[step, 1, lane] = -2 * y
            values[step, 2, lane] = x * x + y * y


@njit(nogil=True, cache=True)
def search_block(
    rings: NDArray[np.float32],
    table: NDArray[np.float32],
    values: NDArray[np.float32],
    history: NDArray[np.float32],
    symbols: NDArray[np.uint16],
    reach: int,
    step_bits: int,
    window_bits: int,
) -> None:
    """Both passes over at most LANES rings.

    rings: float32 [rings, steps, 2].
    table: float32 [3, 2^window_bits], for each window its two code values and their sum of squares, in the order of `_advance`.
    values: float32 [steps, 3, LANES]; history: float32 [steps + 1, 2^(window_bits - step_bits), LANES]; both are workspace.
    symbols: uint16 [rings, steps], filled with the low bits of each window.
    reach: steps of the first pass on either side of the joint.
    """
    steps = rings.shape[1]
    _load(rings, values, -reach, 2 * reach)
    history[0] = 0
    _forward(history, table, values, 2 * reach, step_bits, window_bits)
    joint = np.empty(rings.shape[0], dtype=np.int64)
    for lane in range(rings.shape[0]):
        end = np.argmin(history[2 * reach, :, lane])
        joint[lane] = _trace(history, table, values, symbols, lane, end, reach, 2 * reach, step_bits, window_bits)
    _load(rings, values, 0, steps)
    history[0] = FAR
    for lane in range(rings.shape[0]):
        history[0, joint[lane], lane] = 0
    _forward(history, table, values, steps, step_bits, window_bits)
    for lane in range(rings.shape[0]):
        _trace(history, table, values, symbols, lane, joint[lane], 0, steps, step_bits, window_bits)
