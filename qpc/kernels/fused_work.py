"""The line of work of a multiplication on integer tensor cores, and how sums of several programs are put together.

Groups of 256 rows times the *turns* along the input axis, of DEPTH column blocks for each warpgroup, are one line of work, of which every
program takes an equal part; where that ends in the middle of a group, several programs have sums for the same rows. They leave them in a
workspace; the last of them in the order of the grid waits for each value, adds them in that order, and frees the places again. A place
that is free holds a NaN which no sum is. A program takes its last group first, so that sums for which a later one waits are there early.
The wait ends, since programs start in the order of the grid and those waited for come first.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]

from qpc.kernels.fused import EXCHANGE_STRIDE, GROUP_ROWS
from qpc.kernels.fused_block import do
from qpc.kernels.fused_ptx import (
    BARRIER,
    LOAD,
    PUBLISH,
    SHARED,
    STORE,
    poll,
    poll_constraints,
    polled,
    publish,
    publish_constraints,
    types,
)

_ROWS, _STRIDE = gl.constexpr(GROUP_ROWS), gl.constexpr(EXCHANGE_STRIDE)
_SHARED, _BARRIER = gl.constexpr(SHARED), gl.constexpr(BARRIER)
_STORE, _LOAD, _PUBLISH = gl.constexpr(STORE), gl.constexpr(LOAD), gl.constexpr(PUBLISH)
_types, _polled = gluon.constexpr_function(types), gluon.constexpr_function(polled)
_poll, _poll_constraints = gluon.constexpr_function(poll), gluon.constexpr_function(poll_constraints)
_publish, _publish_constraints = gluon.constexpr_function(publish), gluon.constexpr_function(publish_constraints)


@gluon.jit
def first_of(unit, units, programs):
    """The program that has a unit, when `programs` have equal parts of `units`."""
    return ((unit + 1) * programs - 1) // units


@gluon.jit
def contributors(group, turns, groups, programs):
    """How many programs have units of a group."""
    units = groups * turns
    return first_of(group * turns + turns - 1, units, programs) - first_of(group * turns, units, programs) + 1


@gluon.jit
def segment(group, begin, end, turns):
    """The units of [begin, end) that are of a group: the turn of the first of them, and how many."""
    start = gl.maximum(begin - group * turns, 0)
    return start, gl.minimum(end - group * turns, turns) - start


@gluon.jit
def codes_at(codes, group, turn, turns, warp_row, warpgroup, rows, TURN: gl.constexpr, DEPTH: gl.constexpr, STEP_BITS: gl.constexpr):
    """Where the codes are that a warp reads in a turn of a group. rows: block rows of the weight; a warp beyond them reads the last."""
    block_row = gl.minimum(group * 4 + warp_row, rows - 1)
    return codes + (block_row.to(gl.int64) * (turns * TURN) + turn * TURN + warpgroup * DEPTH) * (16 * STEP_BITS)


@gluon.jit
def _whole(sums, AT: gl.constexpr):
    """The sums of both limbs, put together."""
    return sums[AT].to(gl.float32) * 256.0 + sums[AT + 1].to(gl.float32)


@gluon.jit
def exchange(sums, TILE: gl.constexpr, batch, to, lane, warpgroup, warp_row, TILES: gl.constexpr, ITEMS: gl.constexpr):
    """Leave the sums for ITEMS rows of the batch in shared memory: [warpgroup][row of the batch][row of the group]."""
    do(_BARRIER, "=r,r", [lane])
    to += (((warpgroup * ITEMS + lane % 4) * _STRIDE + warp_row * 64 + lane // 4) * 4).to(gl.uint32)
    for tile in gl.static_range((ITEMS + 3) // 4):
        there = ((TILE + tile) * 4 + lane % 4 < batch).to(gl.int32)
        for quarter in gl.static_range(4):
            for half in gl.static_range(2):
                value = _whole(sums, 4 * (quarter * TILES + TILE + tile) + 2 * half)
                do(_STORE, "=r,r,f,r", [to + 4 * (16 * quarter + 8 * half + 4 * tile * _STRIDE), value, there])
    do(_BARRIER, "=r,r", [lane])


@gluon.jit
def _add_and_store(
    total, place, there, place_in_group, item, row, mask, operand_scales, scales, bias, out, out_features, STRIDE: gl.constexpr,
    HAS_BIAS: gl.constexpr, ELEMENTS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Add the sums of the programs before and free their places; apply the scales of activation and rows, add the bias, round once.

    there: whether a place has sums. mask: whether they are of an element of the result.
    """
    factor = gl.load(operand_scales + item, mask=mask, other=0.0) * gl.load(scales + row, mask=mask, other=0.0).to(gl.float32)
    added = gl.zeros_like(factor)
    if HAS_BIAS:
        added = gl.load(bias + row, mask=mask, other=0.0).to(gl.float32)
    others = gl.zeros_like(factor)
    AT_ONCE: gl.constexpr = _polled(ELEMENTS, VOTES)
    CONSTRAINTS: gl.constexpr = _poll_constraints(ELEMENTS, AT_ONCE)
    for other in range(0, place_in_group, AT_ONCE):
        count = gl.zeros_like(item) + (place_in_group - other)
        from_place, stride = place - (place_in_group - other) * STRIDE, gl.full_like(item, 4 * STRIDE).to(gl.int64)
        found = gl.inline_asm_elementwise(
            _poll(ELEMENTS, AT_ONCE, VOTES, WIDE), CONSTRAINTS, [from_place, there.to(gl.int32), count, stride], _types(AT_ONCE),
            is_pure=False, pack=ELEMENTS,
        )  # fmt: skip
        for each in gl.static_range(AT_ONCE):
            others += found[each].to(gl.float32, bitcast=True)
    value = (others + total) * factor + added
    gl.store(out + item.to(gl.int64) * out_features + row, value.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _leave(place, there, total, ELEMENTS: gl.constexpr, WIDE: gl.constexpr):
    """Leave sums for another program."""
    arguments = [place, there.to(gl.int32), total.to(gl.int32, bitcast=True)]
    if WIDE:
        CONSTRAINTS: gl.constexpr = _publish_constraints(ELEMENTS)
        gl.inline_asm_elementwise(_publish(ELEMENTS), CONSTRAINTS, arguments, gl.uint32, is_pure=False, pack=ELEMENTS)
    else:
        do(_PUBLISH, "=r,l,r,r", arguments)


@gluon.jit
def finish(
    TILE: gl.constexpr, group, first_place, place_in_group, finishes, operand_scales, scales, bias, out, workspace, batch, out_features,
    IS_LAST: gl.constexpr, EXCHANGE: gl.constexpr, UNIT: gl.constexpr, OPERAND_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr,
    WARPGROUPS: gl.constexpr, ITEMS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Add up what the warpgroups left for ITEMS rows of the batch. Then leave that for another program, or add what others left and store.

    Each thread has some neighbouring rows of the group, of one row of the batch.
    """
    COVERED: gl.constexpr = 4 if ITEMS < 4 else ITEMS
    ELEMENTS: gl.constexpr = 2 * COVERED // WARPGROUPS
    STRIDE: gl.constexpr = _ROWS * OPERAND_ROWS
    index = gl.arange(0, COVERED * _ROWS, gl.BlockedLayout([ELEMENTS], [32], [4 * WARPGROUPS], [0]))
    item, row = TILE * 4 + index // _ROWS, group * _ROWS + index % _ROWS
    mask = (item < batch) & (row < out_features)
    there = (item < batch) if WIDE else mask  # the same for neighbouring rows: those behind the last feature have sums that nobody needs
    at = gl.inline_asm_elementwise(_SHARED, "=r,r", [index], gl.uint32, is_pure=False, pack=1)
    at += EXCHANGE + ((gl.minimum(index // _ROWS, ITEMS - 1) * _STRIDE + index % _ROWS) * 4).to(gl.uint32)
    total = gl.zeros_like(index).to(gl.float32)
    for warpgroup in gl.static_range(WARPGROUPS):
        total += gl.inline_asm_elementwise(_LOAD, "=f,r", [at + warpgroup * (4 * ITEMS * _STRIDE)], gl.float32, is_pure=False, pack=1)
    total = total * UNIT
    place = workspace + (first_place + place_in_group) * STRIDE + item * _ROWS + index % _ROWS
    if IS_LAST:  # otherwise no branch: Triton 3.6 cannot translate one that is never taken
        if finishes:
            _add_and_store(
                total, place, there, place_in_group, item, row, mask, operand_scales, scales, bias, out, out_features, STRIDE, HAS_BIAS,
                ELEMENTS, VOTES, WIDE,
            )  # fmt: skip
        else:
            _leave(place, there, total, ELEMENTS, WIDE)
    else:
        _leave(place, there, total, ELEMENTS, WIDE)
