"""The multiplication by a trellis-coded weight on integer tensor cores (sm_90): decoded words are multiplied as bytes, exactly.

A program, a part of the line of work of `qpc.kernels.fused_work`, is one or more warpgroups: a warp has one block row of a group of rows,
a warpgroup its own column blocks of a turn.

Codes stream into shared memory by bulk copies, into a ring of STAGES slots that each warp has for itself, so that no warp waits for
another. They do not depend on what ran before, so the ring is full when the kernel before ends: a program takes at most half of a
multiprocessor, and the next kernel's programs start beside it. The operand (`qpc.kernels.operand`) is copied as it is, in chunks, one of
which is under way while another is read.
A lane reads its 16 windows from shared memory, multiplies each to words (`qpc.quant.codebook`), and these go as they are from registers to
`mma`: the four words of four windows are its fragment of 16 rows. Sums are exact in int32, rows stay in their warps, and float32 begins
where the limbs are put together. (`wgmma` was not faster for few rows: `benchmarks/results/nvidia-h100/KERNELS.md`. `qpc.kernels.warpgroup`
is for more.)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]
from triton.experimental.gluon.language.nvidia.hopper import mbarrier  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

from qpc.kernels.fused import GROUP_ROWS, OPERAND_BARRIER_BYTES, TAIL_BYTES, exchange_bytes, head_bytes
from qpc.kernels.fused_block import add_block, aligned, do, issue_block, load_arc, wait_for_products
from qpc.kernels.fused_ptx import (
    ARRIVE,
    BARRIER,
    COPY,
    INITIALIZE,
    OF_LANE_0,
    PREFETCH,
    PUBLISH_BARRIERS,
    REFILL,
    SHARED,
    WAIT,
    WAIT_IF,
)
from qpc.kernels.fused_work import codes_at, contributors, exchange, finish, first_of, segment
from qpc.kernels.warpgroup import distance

_TAIL, _ROWS = gl.constexpr(TAIL_BYTES), gl.constexpr(GROUP_ROWS)
_OPERAND_BARRIERS = gl.constexpr(OPERAND_BARRIER_BYTES)
_SHARED, _BARRIER = gl.constexpr(SHARED), gl.constexpr(BARRIER)
_INITIALIZE, _PUBLISH_BARRIERS = gl.constexpr(INITIALIZE), gl.constexpr(PUBLISH_BARRIERS)
_ARRIVE, _WAIT, _WAIT_IF = gl.constexpr(ARRIVE), gl.constexpr(WAIT), gl.constexpr(WAIT_IF)
_COPY, _REFILL = gl.constexpr(COPY), gl.constexpr(REFILL)
_OF_LANE_0, _PREFETCH = gl.constexpr(OF_LANE_0), gl.constexpr(PREFETCH)

_head_bytes, _exchange_bytes = gluon.constexpr_function(head_bytes), gluon.constexpr_function(exchange_bytes)
_distance = gluon.constexpr_function(distance)


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
    start, ahead_left = segment(group, first, end, turns)
    source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
    stage_bytes = gl.full_like(lane, STAGE)
    for stage in gl.static_range(STAGES):
        if (ahead_left == 0) & (ahead * turns > first):
            ahead -= 1
            start, ahead_left = segment(ahead, first, end, turns)
            source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
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
    copied_turn, copied_left = segment(group, first, end, turns)
    for number in gl.static_range(2):
        if (copied_left == 0) & (copied * turns > first):
            copied -= 1
            copied_turn, copied_left = segment(copied, first, end, turns)
        count = _copy_chunk(operand, copied_turn, copied_left, zero + number, shared, thread == 0, HEAD, CHUNK, TURN_BYTES)
        copied_turn += count
        copied_left -= count

    while (group + 1) * turns > first:
        turn, left = segment(group, first, end, turns)
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
                    start, ahead_left = segment(ahead, first, end, turns)
                    source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
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
                copied_turn, copied_left = segment(copied, first, end, turns)
            if copied_left > 0:
                do(_WAIT_IF, "=r,r,r,r", [empty, chunk // 2 % 2, (warp == 0).to(gl.int32)])
                count = _copy_chunk(operand, copied_turn, copied_left, chunk, shared, thread == 0, HEAD, CHUNK, TURN_BYTES)
                copied_turn += count
                copied_left -= count
            left -= here
            chunk += 1

        place_in_group = program - first_of(group * turns, units, programs)
        if IS_SECOND:
            place_in_group += contributors(group, turns_before, groups, programs_before)
        for tile in gl.static_range(0, TILES, (ITEMS + 3) // 4):
            exchange(sums, tile, batch, shared + EXCHANGE, lane, warpgroup, warp_row, TILES, ITEMS)
            finish(
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
