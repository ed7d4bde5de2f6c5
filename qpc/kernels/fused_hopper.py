"""The multiplication by a trellis-coded weight on integer tensor cores (sm_90): decoded words are multiplied as bytes, exactly.

Groups of 256 rows times the *turns* along the input axis, of DEPTH column blocks for each warpgroup, are one line of work, of which every
program takes an equal part; where that ends in the middle of a group, several programs have sums for the same rows. A program is one or
more warpgroups: a warp has one block row of the group, a warpgroup its own column blocks of a turn.

Codes stream into shared memory by bulk copies, into a ring of STAGES slots that each warp has for itself, so that no warp waits for
another. They do not depend on what ran before, so the ring is full when the kernel before ends: a program takes at most half of a
multiprocessor, and the next kernel's programs start beside it. The operand (`qpc.kernels.operand`) is copied as it is, in chunks, one of
which is under way while another is read.
A lane reads its 16 windows from shared memory, multiplies each to words (`qpc.quant.codebook`), and these go as they are from registers to
`mma`: the four words of four windows are its fragment of 16 rows. Sums are exact in int32, rows stay in their warps, and float32 begins
where the limbs are put together. (`wgmma` was not faster for few rows: `benchmarks/results/nvidia-h100/KERNELS.md`. `qpc.kernels.warpgroup`
is for more.)

Programs that share rows leave their sums in a workspace; the last of them in the order of the grid waits for each value, adds them in that
order, and frees the places again. A place that is free holds a NaN which no sum is. A program takes its last group first, so that sums for
which a later one waits are there early. The wait ends, since programs start in the order of the grid and those waited for come first.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]
from triton.experimental.gluon.language.nvidia.hopper import mbarrier  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

from qpc.kernels.fused import EXCHANGE_STRIDE, GROUP_ROWS, OPERAND_BARRIER_BYTES, TAIL_BYTES, exchange_bytes, head_bytes
from qpc.kernels.fused_block import add_block, aligned, do, issue_block, load_arc, wait_for_products
from qpc.kernels.fused_ptx import (
    ARRIVE,
    BARRIER,
    COPY,
    INITIALIZE,
    LOAD,
    OF_LANE_0,
    PREFETCH,
    PUBLISH,
    PUBLISH_BARRIERS,
    REFILL,
    SHARED,
    STORE,
    WAIT,
    WAIT_IF,
    poll,
    poll_constraints,
    polled,
    publish,
    publish_constraints,
    types,
)
from qpc.kernels.warpgroup import distance

_TAIL, _ROWS, _STRIDE = gl.constexpr(TAIL_BYTES), gl.constexpr(GROUP_ROWS), gl.constexpr(EXCHANGE_STRIDE)
_OPERAND_BARRIERS = gl.constexpr(OPERAND_BARRIER_BYTES)
_SHARED, _BARRIER = gl.constexpr(SHARED), gl.constexpr(BARRIER)
_INITIALIZE, _PUBLISH_BARRIERS = gl.constexpr(INITIALIZE), gl.constexpr(PUBLISH_BARRIERS)
_ARRIVE, _WAIT, _WAIT_IF = gl.constexpr(ARRIVE), gl.constexpr(WAIT), gl.constexpr(WAIT_IF)
_COPY, _REFILL, _STORE, _LOAD = gl.constexpr(COPY), gl.constexpr(REFILL), gl.constexpr(STORE), gl.constexpr(LOAD)
_PUBLISH, _OF_LANE_0, _PREFETCH = gl.constexpr(PUBLISH), gl.constexpr(OF_LANE_0), gl.constexpr(PREFETCH)

_head_bytes, _exchange_bytes = gluon.constexpr_function(head_bytes), gluon.constexpr_function(exchange_bytes)
_types = gluon.constexpr_function(types)
_poll, _poll_constraints = gluon.constexpr_function(poll), gluon.constexpr_function(poll_constraints)
_publish, _publish_constraints = gluon.constexpr_function(publish), gluon.constexpr_function(publish_constraints)
_polled, _distance = gluon.constexpr_function(polled), gluon.constexpr_function(distance)


@gluon.jit
def _first_of(unit, units, programs):
    """The program that has a unit, when `programs` have equal parts of `units`."""
    return ((unit + 1) * programs - 1) // units


@gluon.jit
def _contributors(group, turns, groups, programs):
    """How many programs have units of a group."""
    units = groups * turns
    return _first_of(group * turns + turns - 1, units, programs) - _first_of(group * turns, units, programs) + 1


@gluon.jit
def _segment(group, begin, end, turns):
    """The units of [begin, end) that are of a group: the turn of the first of them, and how many."""
    start = gl.maximum(begin - group * turns, 0)
    return start, gl.minimum(end - group * turns, turns) - start


@gluon.jit
def _codes_at(codes, group, turn, turns, warp_row, warpgroup, rows, TURN: gl.constexpr, DEPTH: gl.constexpr, STEP_BITS: gl.constexpr):
    """Where the codes are that a warp reads in a turn of a group. rows: block rows of the weight; a warp beyond them reads the last."""
    block_row = gl.minimum(group * 4 + warp_row, rows - 1)
    return codes + (block_row.to(gl.int64) * (turns * TURN) + turn * TURN + warpgroup * DEPTH) * (16 * STEP_BITS)


@gluon.jit
def _copy_chunk(operand, turn, left, number, shared, starts, HEAD: gl.constexpr, CHUNK: gl.constexpr, TURN_BYTES: gl.constexpr):
    """Copy the `number`-th chunk of a program: CHUNK turns of the operand from `turn` on, or what is left, if `starts`. Returns that."""
    count = gl.minimum(left, CHUNK)
    buffer = (number % 2).to(gl.uint32)
    to = shared + HEAD + buffer * (CHUNK * TURN_BYTES)
    starts = (starts & (count > 0)).to(gl.int32)
    do(_COPY, "=r,r,r,l,r,r", [shared + 8 * buffer, to, operand + turn * (TURN_BYTES // 4), starts, count * TURN_BYTES])
    return count


@gluon.jit
def _whole(sums, AT: gl.constexpr):
    """The sums of both limbs, put together."""
    return sums[AT].to(gl.float32) * 256.0 + sums[AT + 1].to(gl.float32)


@gluon.jit
def _exchange(sums, TILE: gl.constexpr, batch, to, lane, warpgroup, warp_row, TILES: gl.constexpr, ITEMS: gl.constexpr):
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
def _finish(
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


@gluon.jit
def _multiply_part(
    program, programs, codes, operand, turns, turns_before, programs_before, operand_scales, scales, bias, out, workspace, most, batch,
    rows, out_features,
    shared, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, UNIT: gl.constexpr, IS_SECOND: gl.constexpr, IS_LAST: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr, CHUNK_BYTES: gl.constexpr, OPERAND_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPGROUPS: gl.constexpr,
    BY_WARPGROUP: gl.constexpr, FINISH_ROWS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """What one of `programs` does of one part of the weight. operand: from the first column of the part on.

    turns_before, programs_before: of the first part, for the second. most: places of a group in the workspace. rows: block rows.
    Sum 4 * (quarter * TILES + tile) + 2 * half + limb of a lane belongs to row 16 * quarter + 8 * half + lane // 4 of its warp's block row
    and to row 4 * tile + lane % 4 of the batch.
    """
    TILES: gl.constexpr = (OPERAND_ROWS + 3) // 4
    OPERAND_BYTES: gl.constexpr = 128 * OPERAND_ROWS
    UNITS: gl.constexpr = OPERAND_BYTES // 16
    BLOCK_BYTES: gl.constexpr = 64 * STEP_BITS
    STAGE: gl.constexpr = DEPTH * BLOCK_BYTES
    TURN: gl.constexpr = DEPTH * WARPGROUPS
    ITEMS: gl.constexpr = OPERAND_ROWS if OPERAND_ROWS < FINISH_ROWS else FINISH_ROWS
    TURN_BYTES: gl.constexpr = TURN * OPERAND_BYTES
    CHUNK: gl.constexpr = CHUNK_BYTES // TURN_BYTES
    HEAD: gl.constexpr = _head_bytes(WARPGROUPS, STAGES)
    EXCHANGE: gl.constexpr = HEAD + 2 * CHUNK_BYTES + _TAIL
    RINGS: gl.constexpr = EXCHANGE + _exchange_bytes(WARPGROUPS, OPERAND_ROWS, FINISH_ROWS)
    groups = (rows + 3) // 4
    units = groups * turns
    first = units * program // programs
    end = units * (program + 1) // programs

    thread = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    lane = thread % 32
    warp = gl.inline_asm_elementwise(_OF_LANE_0, "=r,r", [thread // 32], gl.int32, is_pure=True, pack=1)
    warpgroup, warp_row = warp // 4, warp % 4
    elected = lane == 0
    zero = gl.full_like(lane, 0)
    barriers = shared + _OPERAND_BARRIERS + (warp * (8 * STAGES)).to(gl.uint32)
    ring = shared + RINGS + (warp * (STAGES * STAGE)).to(gl.uint32)
    for stage in gl.static_range(STAGES):
        do(_INITIALIZE, "=r,r,r", [barriers + 8 * stage, elected.to(gl.int32)])
    do(_PUBLISH_BARRIERS, "=r,r", [lane])

    group = (end - 1) // turns
    ahead = group
    start, ahead_left = _segment(group, first, end, turns)
    source = _codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
    stage_bytes = gl.full_like(lane, STAGE)
    for stage in gl.static_range(STAGES):
        if (ahead_left == 0) & (ahead * turns > first):
            ahead -= 1
            start, ahead_left = _segment(ahead, first, end, turns)
            source = _codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
        do(
            _COPY,
            "=r,r,r,l,r,r",
            [barriers + 8 * stage, ring + stage * STAGE, source, (elected & (ahead_left > 0)).to(gl.int32), stage_bytes],
        )
        source += TURN * 16 * STEP_BITS
        ahead_left = gl.maximum(ahead_left - 1, 0)
    do(_BARRIER, "=r,r", [lane])
    gdc_wait()

    first_word = lane * STEP_BITS // 2
    own = (4 * first_word).to(gl.uint32)
    far = (4 * ((first_word + (STEP_BITS + 1) // 2) % (16 * STEP_BITS))).to(gl.uint32)
    shift = (lane % 2 * 16).to(gl.uint32)
    slot, barrier, phase, chunk = ring, barriers, zero, zero
    copied = group
    copied_turn, copied_left = _segment(group, first, end, turns)
    for number in gl.static_range(2):
        if (copied_left == 0) & (copied * turns > first):
            copied -= 1
            copied_turn, copied_left = _segment(copied, first, end, turns)
        count = _copy_chunk(operand, copied_turn, copied_left, zero + number, shared, thread == 0, HEAD, CHUNK, TURN_BYTES)
        copied_turn += count
        copied_left -= count

    while (group + 1) * turns > first:
        turn, left = _segment(group, first, end, turns)
        finishes = turn + left == turns
        do(_PREFETCH, "=r,l,r", [scales + (group * _ROWS + thread * 64), ((thread < 4) & (group * 4 + thread < rows)).to(gl.int32)])
        sums = ()
        for _zero in gl.static_range(16 * TILES):
            sums += (zero,)
        while left > 0:
            here = gl.minimum(left, CHUNK)
            buffer = (chunk % 2).to(gl.uint32)
            do(_WAIT, "=r,r,r", [shared + 8 * buffer, chunk // 2 % 2])
            at = shared + HEAD + buffer * (CHUNK * TURN_BYTES) + (warpgroup * (DEPTH * OPERAND_BYTES)).to(gl.uint32)
            if BY_WARPGROUP:
                at = at // 16 | (_distance(OPERAND_ROWS) << 16)
            else:
                at += (lane * 16).to(gl.uint32)
            for _turn in range(here):
                if (ahead_left == 0) & (ahead * turns > first):
                    ahead -= 1
                    start, ahead_left = _segment(ahead, first, end, turns)
                    source = _codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
                do(_WAIT, "=r,r,r", [barrier, phase])
                for index in gl.static_range(DEPTH):
                    arc = load_arc(slot + own + index * BLOCK_BYTES, slot + far + index * BLOCK_BYTES, STEP_BITS)
                    if index == DEPTH - 1:
                        more = (elected & (ahead_left > 0)).to(gl.int32)
                        do(_REFILL, "=r,r,r,l,r,r", [barrier, slot, source, more, stage_bytes])
                    words = aligned(arc, shift, STEP_BITS)
                    if BY_WARPGROUP:
                        sums = issue_block(sums, words, at + index * UNITS, STEP_BITS, WINDOW_BITS, TILES, OPERAND_ROWS)
                    else:
                        sums = add_block(sums, words, at + index * OPERAND_BYTES, STEP_BITS, WINDOW_BITS, TILES)
                source += TURN * 16 * STEP_BITS
                ahead_left = gl.maximum(ahead_left - 1, 0)
                slot += STAGE
                barrier += 8
                wraps = barrier == barriers + 8 * STAGES
                slot, barrier, phase = gl.where(wraps, ring, slot), gl.where(wraps, barriers, barrier), gl.where(wraps, phase ^ 1, phase)
                at += TURN_BYTES // 16 if BY_WARPGROUP else TURN_BYTES
            if BY_WARPGROUP:
                sums = wait_for_products(sums, TILES)
            empty = shared + 16 + 8 * buffer
            do(_ARRIVE, "=r,r,r", [empty, elected.to(gl.int32)])
            if (copied_left == 0) & (copied * turns > first):
                copied -= 1
                copied_turn, copied_left = _segment(copied, first, end, turns)
            if copied_left > 0:
                do(_WAIT_IF, "=r,r,r,r", [empty, chunk // 2 % 2, (warp == 0).to(gl.int32)])
                count = _copy_chunk(operand, copied_turn, copied_left, chunk, shared, thread == 0, HEAD, CHUNK, TURN_BYTES)
                copied_turn += count
                copied_left -= count
            left -= here
            chunk += 1

        place_in_group = program - _first_of(group * turns, units, programs)
        if IS_SECOND:
            place_in_group += _contributors(group, turns_before, groups, programs_before)
        for tile in gl.static_range(0, TILES, (ITEMS + 3) // 4):
            _exchange(sums, tile, batch, shared + EXCHANGE, lane, warpgroup, warp_row, TILES, ITEMS)
            _finish(
                tile, group, group * most, place_in_group, finishes, operand_scales, scales, bias, out, workspace, batch, out_features,
                IS_LAST, EXCHANGE, UNIT, OPERAND_ROWS, HAS_BIAS, WARPGROUPS, ITEMS, VOTES, WIDE,
            )  # fmt: skip
        group -= 1


@gluon.jit(do_not_specialize=["turns_0", "turns_1", "programs_0", "most", "batch", "rows"])
def fused_kernel(
    operand, operand_scales, codes_0, codes_1, scales, bias, out, workspace,
    turns_0, turns_1, programs_0, most, batch, rows, out_features,
    STEP_BITS_0: gl.constexpr, STEP_BITS_1: gl.constexpr, WINDOW_BITS_0: gl.constexpr, WINDOW_BITS_1: gl.constexpr,
    UNIT_0: gl.constexpr, UNIT_1: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, CHUNK_BYTES: gl.constexpr,
    OPERAND_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPGROUPS: gl.constexpr, BY_WARPGROUP: gl.constexpr,
    FINISH_ROWS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The first `programs_0` programs have the first part, the others the second, if there is one.

    operand: as `qpc.kernels.operand` has it, of OPERAND_ROWS rows, or for BY_WARPGROUP as `in_cores` does. workspace: float32 NaNs with all
    bits set, which it is again at the end, `most` times 256 * OPERAND_ROWS for each group. rows: block rows of the weight. FINISH_ROWS,
    VOTES, WIDE: of a `Finish`.
    """
    WIDEST: gl.constexpr = STEP_BITS_0 if STEP_BITS_0 > STEP_BITS_1 else STEP_BITS_1
    gdc_launch_dependents()
    EXCHANGED: gl.constexpr = _exchange_bytes(WARPGROUPS, OPERAND_ROWS, FINISH_ROWS)
    RINGS: gl.constexpr = 4 * WARPGROUPS * STAGES * DEPTH * 64 * WIDEST
    SIZE: gl.constexpr = _head_bytes(WARPGROUPS, STAGES) + 2 * CHUNK_BYTES + _TAIL + EXCHANGED + RINGS
    memory = gl.allocate_shared_memory(gl.int64, [SIZE // 8, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(2):
        mbarrier.init(memory.index(index), count=1)
        mbarrier.init(memory.index(2 + index), count=4 * WARPGROUPS)
    lane = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    shared = gl.inline_asm_elementwise(_SHARED, "=r,r", [lane], gl.uint32, is_pure=False, pack=1)
    program, programs = gl.program_id(0), gl.num_programs(0)
    if STEP_BITS_1 == 0:
        _multiply_part(
            program, programs, codes_0, operand, turns_0, 0, 0, operand_scales, scales, bias, out, workspace, most, batch, rows,
            out_features, shared, STEP_BITS_0, WINDOW_BITS_0, UNIT_0, False, True, DEPTH, STAGES, CHUNK_BYTES, OPERAND_ROWS,
            HAS_BIAS, WARPGROUPS, BY_WARPGROUP, FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
    elif program < programs_0:
        _multiply_part(
            program, programs_0, codes_0, operand, turns_0, 0, 0, operand_scales, scales, bias, out, workspace, most, batch, rows,
            out_features, shared, STEP_BITS_0, WINDOW_BITS_0, UNIT_0, False, False, DEPTH, STAGES, CHUNK_BYTES, OPERAND_ROWS,
            HAS_BIAS, WARPGROUPS, BY_WARPGROUP, FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
    else:
        _multiply_part(
            program - programs_0, programs - programs_0, codes_1, operand + turns_0 * (DEPTH * WARPGROUPS * 32 * OPERAND_ROWS), turns_1,
            turns_0, programs_0, operand_scales, scales, bias, out, workspace, most, batch, rows, out_features, shared, STEP_BITS_1,
            WINDOW_BITS_1, UNIT_1, True, True, DEPTH, STAGES, CHUNK_BYTES, OPERAND_ROWS, HAS_BIAS, WARPGROUPS, BY_WARPGROUP,
            FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
