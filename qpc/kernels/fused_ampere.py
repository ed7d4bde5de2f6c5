"""`qpc.kernels.fused_hopper` without bulk copies and dependent launches, for GPUs from sm_80 on.

Of one plan both are to give the same sums, bit for bit; this one has not run yet. What differs is how codes and operand come to a warp.
Each warp has a ring of its own for both, which its lanes fill by copies of 16 bytes that run on while older slots are multiplied; so no
warp waits for another before its sums are put together. Four warps of a warpgroup copy the same blocks of the operand, by copies that may
hit the first-level cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]

from qpc.kernels.fused import TAIL_BYTES, exchange_bytes
from qpc.kernels.fused_block import add_block, aligned, do, load_arc
from qpc.kernels.fused_ptx import COMMIT_PIECES, COPY_PIECE, COPY_SHARED_PIECE, OF_LANE_0, SETTLED, SHARED, wait_for_pieces
from qpc.kernels.fused_work import codes_at, contributors, exchange, finish, first_of, segment

_TAIL, _SHARED, _OF_LANE_0 = gl.constexpr(TAIL_BYTES), gl.constexpr(SHARED), gl.constexpr(OF_LANE_0)
_COPY_PIECE, _COPY_SHARED_PIECE = gl.constexpr(COPY_PIECE), gl.constexpr(COPY_SHARED_PIECE)
_COMMIT_PIECES, _SETTLED = gl.constexpr(COMMIT_PIECES), gl.constexpr(SETTLED)
_exchange_bytes, _wait_for_pieces = gluon.constexpr_function(exchange_bytes), gluon.constexpr_function(wait_for_pieces)


@gluon.jit
def _copy(to, source, lane, exists, BYTES: gl.constexpr, TEXT: gl.constexpr):
    """Copy so many bytes (a multiple of 16) of int32 at `source` to a byte address of shared memory, if they exist; by all lanes."""
    for piece in gl.static_range(0, BYTES // 16, 32):
        number = lane + piece
        there = (exists & (number < BYTES // 16)).to(gl.int32)
        do(TEXT, "=r,r,l,r", [to + (number * 16).to(gl.uint32), source + number * 4, there])


@gluon.jit
def _multiply_part(
    program, programs, codes, operand, turns, turns_before, programs_before, operand_scales, scales, bias, out, workspace, most, batch,
    rows, out_features,
    shared, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, UNIT: gl.constexpr, IS_SECOND: gl.constexpr, IS_LAST: gl.constexpr,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, OPERAND_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPGROUPS: gl.constexpr,
    FINISH_ROWS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """What one of `programs` does of one part of the weight; arguments and sums as in `qpc.kernels.fused_hopper`."""
    TILES: gl.constexpr = (OPERAND_ROWS + 3) // 4
    OPERAND_BYTES: gl.constexpr = 128 * OPERAND_ROWS
    BLOCK_BYTES: gl.constexpr = 64 * STEP_BITS
    CODES: gl.constexpr = DEPTH * BLOCK_BYTES
    STAGE: gl.constexpr = CODES + DEPTH * OPERAND_BYTES
    TURN: gl.constexpr = DEPTH * WARPGROUPS
    ITEMS: gl.constexpr = OPERAND_ROWS if OPERAND_ROWS < FINISH_ROWS else FINISH_ROWS
    RINGS: gl.constexpr = _exchange_bytes(WARPGROUPS, OPERAND_ROWS, FINISH_ROWS)
    WAIT: gl.constexpr = _wait_for_pieces(STAGES - 1)
    groups = (rows + 3) // 4
    units = groups * turns
    first = units * program // programs
    end = units * (program + 1) // programs

    thread = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    lane = thread % 32
    warp = gl.inline_asm_elementwise(_OF_LANE_0, "=r,r", [thread // 32], gl.int32, is_pure=True, pack=1)
    warpgroup, warp_row = warp // 4, warp % 4
    ring = shared + RINGS + (warp * (STAGES * STAGE)).to(gl.uint32)

    group = (end - 1) // turns
    ahead = group
    start, ahead_left = segment(group, first, end, turns)
    source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
    activation = operand + (start * TURN + warpgroup * DEPTH) * (32 * OPERAND_ROWS)
    for stage in gl.static_range(STAGES):
        if (ahead_left == 0) & (ahead * turns > first):
            ahead -= 1
            start, ahead_left = segment(ahead, first, end, turns)
            source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
            activation = operand + (start * TURN + warpgroup * DEPTH) * (32 * OPERAND_ROWS)
        _copy(ring + stage * STAGE, source, lane, ahead_left > 0, CODES, _COPY_PIECE)
        _copy(ring + stage * STAGE + CODES, activation, lane, ahead_left > 0, DEPTH * OPERAND_BYTES, _COPY_SHARED_PIECE)
        do(_COMMIT_PIECES, "=r,r", [lane])
        source += TURN * 16 * STEP_BITS
        activation += TURN * 32 * OPERAND_ROWS
        ahead_left = gl.maximum(ahead_left - 1, 0)

    first_word = lane * STEP_BITS // 2
    own = (4 * first_word).to(gl.uint32)
    far = (4 * ((first_word + (STEP_BITS + 1) // 2) % (16 * STEP_BITS))).to(gl.uint32)
    shift = (lane % 2 * 16).to(gl.uint32)
    at_lane = (CODES + lane * 16).to(gl.uint32)
    slot = ring

    while (group + 1) * turns > first:
        turn, left = segment(group, first, end, turns)
        finishes = turn + left == turns
        sums = ()
        for _zero in gl.static_range(16 * TILES):
            sums += (gl.full_like(lane, 0),)
        for _turn in range(left):
            if (ahead_left == 0) & (ahead * turns > first):
                ahead -= 1
                start, ahead_left = segment(ahead, first, end, turns)
                source = codes_at(codes, ahead, start, turns, warp_row, warpgroup, rows, TURN, DEPTH, STEP_BITS)
                activation = operand + (start * TURN + warpgroup * DEPTH) * (32 * OPERAND_ROWS)
            do(WAIT, "=r,r", [lane])
            for index in gl.static_range(DEPTH):
                arc = load_arc(slot + own + index * BLOCK_BYTES, slot + far + index * BLOCK_BYTES, STEP_BITS)
                sums = add_block(
                    sums, aligned(arc, shift, STEP_BITS), slot + at_lane + index * OPERAND_BYTES, STEP_BITS, WINDOW_BITS, TILES
                )
            do(_SETTLED, "=r,r", [lane])
            _copy(slot, source, lane, ahead_left > 0, CODES, _COPY_PIECE)
            _copy(slot + CODES, activation, lane, ahead_left > 0, DEPTH * OPERAND_BYTES, _COPY_SHARED_PIECE)
            do(_COMMIT_PIECES, "=r,r", [lane])
            source += TURN * 16 * STEP_BITS
            activation += TURN * 32 * OPERAND_ROWS
            ahead_left = gl.maximum(ahead_left - 1, 0)
            slot += STAGE
            slot = gl.where(slot == ring + STAGES * STAGE, ring, slot)

        place_in_group = program - first_of(group * turns, units, programs)
        if IS_SECOND:
            place_in_group += contributors(group, turns_before, groups, programs_before)
        for tile in gl.static_range(0, TILES, (ITEMS + 3) // 4):
            exchange(sums, tile, batch, shared, lane, warpgroup, warp_row, TILES, ITEMS)
            finish(
                tile, group, group * most, place_in_group, finishes, operand_scales, scales, bias, out, workspace, batch, out_features,
                IS_LAST, 0, UNIT, OPERAND_ROWS, HAS_BIAS, WARPGROUPS, ITEMS, VOTES, WIDE,
            )  # fmt: skip
        group -= 1


@gluon.jit(do_not_specialize=["turns_0", "turns_1", "programs_0", "most", "batch", "rows"])
def ampere_kernel(
    operand, operand_scales, codes_0, codes_1, scales, bias, out, workspace,
    turns_0, turns_1, programs_0, most, batch, rows, out_features,
    STEP_BITS_0: gl.constexpr, STEP_BITS_1: gl.constexpr, WINDOW_BITS_0: gl.constexpr, WINDOW_BITS_1: gl.constexpr,
    UNIT_0: gl.constexpr, UNIT_1: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, OPERAND_ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WARPGROUPS: gl.constexpr, FINISH_ROWS: gl.constexpr, VOTES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """The first `programs_0` programs have the first part, the others the second, if there is one; arguments as `fused_kernel` has them."""
    WIDEST: gl.constexpr = STEP_BITS_0 if STEP_BITS_0 > STEP_BITS_1 else STEP_BITS_1
    RINGS: gl.constexpr = 4 * WARPGROUPS * STAGES * DEPTH * (64 * WIDEST + 128 * OPERAND_ROWS)
    SIZE: gl.constexpr = _exchange_bytes(WARPGROUPS, OPERAND_ROWS, FINISH_ROWS) + RINGS + _TAIL
    memory = gl.allocate_shared_memory(gl.int32, [(SIZE + 511) // 512, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    lane = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    memory.index(0).store(gl.zeros((128,), gl.int32, lane.type.layout))  # a use of the memory, without which there would be none
    shared = gl.inline_asm_elementwise(_SHARED, "=r,r", [lane], gl.uint32, is_pure=False, pack=1)
    program, programs = gl.program_id(0), gl.num_programs(0)
    if STEP_BITS_1 == 0:
        _multiply_part(
            program, programs, codes_0, operand, turns_0, 0, 0, operand_scales, scales, bias, out, workspace, most, batch, rows,
            out_features, shared, STEP_BITS_0, WINDOW_BITS_0, UNIT_0, False, True, DEPTH, STAGES, OPERAND_ROWS, HAS_BIAS, WARPGROUPS,
            FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
    elif program < programs_0:
        _multiply_part(
            program, programs_0, codes_0, operand, turns_0, 0, 0, operand_scales, scales, bias, out, workspace, most, batch, rows,
            out_features, shared, STEP_BITS_0, WINDOW_BITS_0, UNIT_0, False, False, DEPTH, STAGES, OPERAND_ROWS, HAS_BIAS, WARPGROUPS,
            FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
    else:
        _multiply_part(
            program - programs_0, programs - programs_0, codes_1, operand + turns_0 * (DEPTH * WARPGROUPS * 32 * OPERAND_ROWS), turns_1,
            turns_0, programs_0, operand_scales, scales, bias, out, workspace, most, batch, rows, out_features, shared, STEP_BITS_1,
            WINDOW_BITS_1, UNIT_1, True, True, DEPTH, STAGES, OPERAND_ROWS, HAS_BIAS, WARPGROUPS, FINISH_ROWS, VOTES, WIDE,
        )  # fmt: skip
