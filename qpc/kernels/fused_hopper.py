"""The multiplication by a trellis-coded weight on integer tensor cores (sm_90): decoded words are multiplied as bytes, exactly.

A program has one or more warpgroups. Each takes the same 256 rows of the weight, a warp one block row, and every so many column blocks:
a *turn* of a program is DEPTH column blocks for each warpgroup. Codes stream into shared memory by bulk copies, into a ring of STAGES
slots that each warp has for itself, so that no warp waits for another. The operand (`qpc.kernels.operand`) is copied as it is, in chunks,
one of which is under way while another is read.
A lane reads its 16 windows from shared memory, multiplies each to words (`qpc.quant.codebook`), and these go as they are from registers to
`mma`: the four words of four windows are its fragment of 16 rows. Sums are exact in int32, rows stay in their warps, and float32 begins
where the limbs are put together. (`wgmma` was not faster: `benchmarks/results/nvidia-h100/KERNELS.md`.)

Programs that share rows (splits of the input axis) leave their sums in a workspace; the last of them in the order of the grid waits for
each value, adds them in that order, and frees the places again. A place that is free holds a NaN which no sum is. The wait ends, since
programs start in the order of the grid and those waited for come first.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import-untyped]

from qpc.kernels.fused_ptx import (
    BARRIER,
    COPY,
    INITIALIZE,
    OF_LANE_0,
    PUBLISH,
    PUBLISH_BARRIERS,
    REFILL,
    WAIT,
    multiply,
    multiply_constraints,
    poll,
    poll_constraints,
    polled,
    shared_bytes,
    types,
)
from qpc.quant.codebook import MULTIPLIERS, START, hash_words

HEAD_BYTES = 1024
"""Barriers at the start of shared memory: two of the operand, then those of the codes."""
TAIL_BYTES = 512
"""Behind the operand, since a product reads four rows also where the operand has fewer."""
ROWS = 256
"""Of the weight, for each program."""

_HEAD, _TAIL = gl.constexpr(HEAD_BYTES), gl.constexpr(TAIL_BYTES)
_START, _MULTIPLIERS = gl.constexpr(START), gl.constexpr(MULTIPLIERS)
_BARRIER = gl.constexpr(BARRIER)
_INITIALIZE, _PUBLISH_BARRIERS = gl.constexpr(INITIALIZE), gl.constexpr(PUBLISH_BARRIERS)
_WAIT, _COPY, _REFILL = gl.constexpr(WAIT), gl.constexpr(COPY), gl.constexpr(REFILL)
_PUBLISH, _OF_LANE_0 = gl.constexpr(PUBLISH), gl.constexpr(OF_LANE_0)

_multiply, _multiply_constraints = gluon.constexpr_function(multiply), gluon.constexpr_function(multiply_constraints)
_types = gluon.constexpr_function(types)
_shared_bytes, _hash_words = gluon.constexpr_function(shared_bytes), gluon.constexpr_function(hash_words)
_poll, _poll_constraints = gluon.constexpr_function(poll), gluon.constexpr_function(poll_constraints)
_polled = gluon.constexpr_function(polled)


@gluon.jit
def _do(TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, arguments):
    """Run instructions for their effect; `$0` is a result that nobody reads."""
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, arguments, dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _load_words(at, COUNT: gl.constexpr):
    """COUNT neighbouring words (1, 2 or 4) of shared memory from byte address `at`, a tuple of uint32."""
    if COUNT == 4:
        words = gl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,r", [at], _types(4, True), is_pure=False, pack=1
        )
    elif COUNT == 2:
        words = gl.inline_asm_elementwise("ld.shared.v2.b32 {$0,$1}, [$2];", "=r,=r,r", [at], _types(2, True), is_pure=False, pack=1)
    else:
        words = (gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], gl.uint32, is_pure=False, pack=1),)
    return words


@gluon.jit
def _load_arc(own, far, STEP_BITS: gl.constexpr):
    """The words that hold a lane's 16 windows, from the byte addresses of its first word and of the word after its last."""
    COUNT: gl.constexpr = (STEP_BITS + 1) // 2
    WIDTH: gl.constexpr = 4 if STEP_BITS % 8 == 0 else 2 if STEP_BITS % 4 == 0 else 1
    words = ()
    for start in gl.static_range(0, COUNT, WIDTH):
        words += _load_words(own + 4 * start, WIDTH)
    return words + _load_words(far, 1)


@gluon.jit
def _funnel(low, high, offset):
    """The 32 bits from bit `offset` (uint32, below 32) of `low` on into `high`."""
    return gl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, offset], gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _aligned(words, shift, STEP_BITS: gl.constexpr):
    """The words so that the first window begins at bit 0: with an odd step every other lane begins in the middle of a word."""
    made = words
    if STEP_BITS % 2:
        made = ()
        for index in gl.static_range((STEP_BITS + 1) // 2):
            made += (_funnel(words[index], words[index + 1], shift),)
        made += (words[(STEP_BITS + 1) // 2] >> shift,)
    return made


@gluon.jit
def _hash(words, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, STEP: gl.constexpr):
    """The words of the window of one of the 16 steps, a tuple of uint32."""
    FIRST: gl.constexpr = STEP * STEP_BITS // 32
    OFFSET: gl.constexpr = STEP * STEP_BITS % 32
    word = words[FIRST]
    if OFFSET + WINDOW_BITS > 32:
        word = _funnel(word, words[FIRST + 1], gl.full_like(word, OFFSET))
    elif OFFSET > 0:
        word = word >> OFFSET
    word = gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,n,n", [word, (1 << WINDOW_BITS) - 1, _START], gl.uint32, is_pure=True, pack=1
    )
    hashed = ()
    for index in gl.static_range(_hash_words(STEP_BITS, WINDOW_BITS)):
        hashed += (word * _MULTIPLIERS[index],)
    return hashed


@gluon.jit
def _add_block(sums, words, operand, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, TILES: gl.constexpr):
    """The sums, four for each 16 rows and TILE of the batch, plus the products of one block with the operand at a byte address."""
    WORDS: gl.constexpr = _hash_words(STEP_BITS, WINDOW_BITS)
    TEXT: gl.constexpr = _multiply(TILES, WORDS)
    CONSTRAINTS: gl.constexpr = _multiply_constraints(TILES, WORDS)
    activation = ()
    for tile in gl.static_range(TILES):
        activation += _load_words(operand + 512 * tile, 2 * WORDS)
    made = ()
    for quarter in gl.static_range(4):
        each = ()
        for step in gl.static_range(4 * quarter, 4 * quarter + 4):
            each += (_hash(words, STEP_BITS, WINDOW_BITS, step),)
        registers = ()
        for index in gl.static_range(4 * TILES):
            registers += (sums[4 * TILES * quarter + index],)
        for index in gl.static_range(WORDS):
            registers += (each[0][index], each[1][index], each[2][index], each[3][index])
        made += gl.inline_asm_elementwise(TEXT, CONSTRAINTS, registers + activation, _types(4 * TILES), is_pure=True, pack=1)
    return made


@gluon.jit
def _copy_chunk(operand, number, turns, shared, thread, CHUNK: gl.constexpr, TURN_BYTES: gl.constexpr):
    """Let one thread start the copy of chunk `number` (the same in all threads) of the operand: CHUNK of its `turns`, or what is left."""
    count = gl.minimum(turns - number * CHUNK, CHUNK)
    starts = ((thread == 0) & (count > 0)).to(gl.int32)
    source = operand + number * (CHUNK * TURN_BYTES // 4)
    buffer = (number % 2).to(gl.uint32)
    to = shared + _HEAD + buffer * (CHUNK * TURN_BYTES)
    _do(_COPY, "=r,r,r,l,r,r", [shared + 8 * buffer, to, source, starts, count * TURN_BYTES])


@gluon.jit
def _sum_part(
    codes, operand, begin, end, turns, groups, shared, TILES: gl.constexpr, OPERAND_BYTES: gl.constexpr, STEP_BITS: gl.constexpr,
    WINDOW_BITS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, CHUNK_BYTES: gl.constexpr, WARPGROUPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Sums over turns `begin` to `end` of one part. operand: its words from the first column of the part on, OPERAND_BYTES a column block.

    Sum 4 * (tile * TILES + j) + 2 * half + limb of a lane belongs to row 16 * tile + 8 * half + lane // 4 of its warp's block row and to
    row 4 * j + lane % 4 of the batch.
    """
    BLOCK_BYTES: gl.constexpr = 64 * STEP_BITS
    STAGE: gl.constexpr = DEPTH * BLOCK_BYTES
    TURN: gl.constexpr = DEPTH * WARPGROUPS
    CHUNK: gl.constexpr = CHUNK_BYTES // (TURN * OPERAND_BYTES)
    thread = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    lane, warpgroup = thread % 32, gl.inline_asm_elementwise(_OF_LANE_0, "=r,r", [thread // 128], gl.int32, is_pure=True, pack=1)
    block_row = gl.minimum(gl.program_id(0) * 4 + thread // 32 % 4, groups - 1)
    elected = lane == 0
    zero = gl.full_like(lane, 0)

    barriers = shared + 16 + (thread // 32 * (8 * STAGES)).to(gl.uint32)
    ring = shared + (_HEAD + 2 * CHUNK_BYTES + _TAIL) + (thread // 32 * (STAGES * STAGE)).to(gl.uint32)
    for index in gl.static_range(2):
        _do(_INITIALIZE, "=r,r,r", [shared + 8 * index, (thread == 0).to(gl.int32)])
    for stage in gl.static_range(STAGES):
        _do(_INITIALIZE, "=r,r,r", [barriers + 8 * stage, elected.to(gl.int32)])
    _do(_PUBLISH_BARRIERS, "=r,r", [lane])
    source = codes + (block_row.to(gl.int64) * (turns * TURN) + begin * TURN + warpgroup * DEPTH) * (16 * STEP_BITS)
    left = end - begin
    stage_bytes = gl.full_like(lane, STAGE)
    for stage in gl.static_range(STAGES):
        _do(
            _COPY,
            "=r,r,r,l,r,r",
            [barriers + 8 * stage, ring + stage * STAGE, source, (elected & (stage < left)).to(gl.int32), stage_bytes],
        )
        source += TURN * 16 * STEP_BITS
    _do(_BARRIER, "=r,r", [lane])
    if PDL:
        gdc_wait()

    first = lane * STEP_BITS // 2
    own = (4 * first).to(gl.uint32)
    far = (4 * ((first + (STEP_BITS + 1) // 2) % (16 * STEP_BITS))).to(gl.uint32)
    shift = (lane % 2 * 16).to(gl.uint32)
    sums = ()
    for _ in gl.static_range(16 * TILES):
        sums += (zero,)
    slot, barrier, phase = ring, barriers, zero
    from_operand = operand + begin * (TURN * OPERAND_BYTES // 4)
    for index in gl.static_range(2):
        _copy_chunk(from_operand, zero + index, left, shared, thread, CHUNK, TURN * OPERAND_BYTES)
    chunk = zero
    while left > 0:
        here = gl.minimum(left, CHUNK)
        buffer = (chunk % 2).to(gl.uint32)
        _do(_WAIT, "=r,r,r", [shared + 8 * buffer, chunk // 2 % 2])
        at = shared + _HEAD + buffer * (CHUNK * TURN * OPERAND_BYTES) + (warpgroup * (DEPTH * OPERAND_BYTES) + lane * 16).to(gl.uint32)
        for turn in range(here):
            _do(_WAIT, "=r,r,r", [barrier, phase])
            arcs = ()
            for index in gl.static_range(DEPTH):
                arcs += (_load_arc(slot + own + index * BLOCK_BYTES, slot + far + index * BLOCK_BYTES, STEP_BITS),)
            more = (elected & (left - turn > STAGES)).to(gl.int32)
            _do(_REFILL, "=r,r,r,l,r,r", [barrier, slot, source, more, stage_bytes])
            source += TURN * 16 * STEP_BITS
            slot += STAGE
            barrier += 8
            wraps = barrier == barriers + 8 * STAGES
            slot, barrier, phase = gl.where(wraps, ring, slot), gl.where(wraps, barriers, barrier), gl.where(wraps, phase ^ 1, phase)
            for index in gl.static_range(DEPTH):
                words = _aligned(arcs[index], shift, STEP_BITS)
                sums = _add_block(sums, words, at + index * OPERAND_BYTES, STEP_BITS, WINDOW_BITS, TILES)
            at += TURN * OPERAND_BYTES
        _do(_BARRIER, "=r,r", [lane])
        _copy_chunk(from_operand, chunk + 2, end - begin, shared, thread, CHUNK, TURN * OPERAND_BYTES)
        left -= here
        chunk += 1
    return sums


@gluon.jit
def _whole(sums, AT: gl.constexpr):
    """The sums of both limbs, put together."""
    return sums[AT].to(gl.float32) * 256.0 + sums[AT + 1].to(gl.float32)


@gluon.jit
def _gathered(sums, tile, WARPGROUPS: gl.constexpr, TILES: gl.constexpr, LAYOUT: gl.constexpr):
    """Sums over the warpgroups for four rows of the batch: float32 [4 * 256], row of the batch times 256 plus row of the program."""
    joined = ()
    for quarter in gl.static_range(4):
        joined += (gl.join(_whole(sums, 4 * (quarter * TILES + tile)), _whole(sums, 4 * (quarter * TILES + tile) + 2)),)
    value = gl.join(gl.join(joined[0], joined[2]), gl.join(joined[1], joined[3]))
    value = gl.reshape(value, (WARPGROUPS, 4, 8, 4, 2, 2, 2))  # warpgroup, warp, row, batch, half of 8, quarter // 2, quarter % 2
    value = gl.reshape(gl.permute(value, (0, 3, 1, 5, 6, 4, 2)), (WARPGROUPS, 1024))
    return gl.sum(gl.convert_layout(value, LAYOUT), axis=0)


@gluon.jit(do_not_specialize=["turns_0", "turns_1", "splits_0", "batch", "groups"])
def fused_kernel(
    operand, operand_scales, codes_0, codes_1, scales, bias, out, workspace,
    turns_0, turns_1, splits_0, batch, groups, out_features,
    STEP_BITS_0: gl.constexpr, STEP_BITS_1: gl.constexpr, WINDOW_BITS_0: gl.constexpr, WINDOW_BITS_1: gl.constexpr,
    UNIT_0: gl.constexpr, UNIT_1: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, CHUNK_BYTES: gl.constexpr,
    OPERAND_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, WARPGROUPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Programs (256 rows, split of the input axis); the first `splits_0` splits belong to the first part, the others to the second.

    operand: as `qpc.kernels.operand` has it, of OPERAND_ROWS rows. workspace: float32 NaNs with all bits set, which it is again at the end.
    """
    TILES: gl.constexpr = (OPERAND_ROWS + 3) // 4
    OPERAND_BYTES: gl.constexpr = 128 * OPERAND_ROWS
    WIDEST: gl.constexpr = STEP_BITS_0 if STEP_BITS_0 > STEP_BITS_1 else STEP_BITS_1
    if PDL:
        gdc_launch_dependents()
    lane = gl.arange(0, 128 * WARPGROUPS, gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    size: gl.constexpr = _HEAD + 2 * CHUNK_BYTES + _TAIL + 4 * WARPGROUPS * STAGES * DEPTH * 64 * WIDEST
    shared = gl.inline_asm_elementwise(_shared_bytes(size), "=r,r", [lane], gl.uint32, is_pure=False, pack=1)
    split = gl.program_id(1)
    splits = gl.num_programs(1)
    unit = UNIT_0
    if STEP_BITS_1 == 0:
        sums = _sum_part(
            codes_0, operand, turns_0 * split // splits, turns_0 * (split + 1) // splits, turns_0, groups, shared, TILES,
            OPERAND_BYTES, STEP_BITS_0, WINDOW_BITS_0, DEPTH, STAGES, CHUNK_BYTES, WARPGROUPS, PDL,
        )  # fmt: skip
    elif split < splits_0:
        sums = _sum_part(
            codes_0, operand, turns_0 * split // splits_0, turns_0 * (split + 1) // splits_0, turns_0, groups, shared, TILES,
            OPERAND_BYTES, STEP_BITS_0, WINDOW_BITS_0, DEPTH, STAGES, CHUNK_BYTES, WARPGROUPS, PDL,
        )  # fmt: skip
    else:
        splits_1 = splits - splits_0
        sums = _sum_part(
            codes_1, operand + turns_0 * (DEPTH * WARPGROUPS * OPERAND_BYTES // 4), turns_1 * (split - splits_0) // splits_1,
            turns_1 * (split - splits_0 + 1) // splits_1, turns_1, groups, shared, TILES, OPERAND_BYTES, STEP_BITS_1, WINDOW_BITS_1,
            DEPTH, STAGES, CHUNK_BYTES, WARPGROUPS, PDL,
        )  # fmt: skip
        unit = UNIT_1
    layout: gl.constexpr = gl.BlockedLayout([WARPGROUPS, 1], [1, 32], [1, 4 * WARPGROUPS], [1, 0])
    index = gl.arange(0, 1024, gl.SliceLayout(0, layout))
    row = gl.program_id(0) * 256 + index % 256
    STRIDE: gl.constexpr = 256 * OPERAND_ROWS
    for tile in gl.static_range(TILES):
        total = _gathered(sums, tile, WARPGROUPS, TILES, layout) * unit
        item = tile * 4 + index // 256
        mask = (item < batch) & (row < out_features)
        if SPLIT:
            place = workspace + (gl.program_id(0) * splits + split) * STRIDE + item * 256 + index % 256
            if split < splits - 1:
                _do(_PUBLISH, "=r,l,r,r", [place, mask.to(gl.int32), total.to(gl.int32, bitcast=True)])
            else:
                others = gl.zeros([1024], gl.float32, gl.SliceLayout(0, layout))
                ELEMENTS: gl.constexpr = 8 // WARPGROUPS
                AT_ONCE: gl.constexpr = _polled(ELEMENTS)
                CONSTRAINTS: gl.constexpr = _poll_constraints(ELEMENTS, AT_ONCE)
                for other in range(0, splits - 1, AT_ONCE):
                    from_place = place - (splits - 1 - other) * STRIDE
                    count, stride = gl.full_like(index, splits - 1 - other), gl.full_like(index, 4 * STRIDE).to(gl.int64)
                    found = gl.inline_asm_elementwise(
                        _poll(ELEMENTS, AT_ONCE), CONSTRAINTS, [from_place, mask.to(gl.int32), count, stride], _types(AT_ONCE),
                        is_pure=False, pack=ELEMENTS,
                    )  # fmt: skip
                    for each in gl.static_range(AT_ONCE):
                        others += found[each].to(gl.float32, bitcast=True)
                _store(others + total, operand_scales, scales, bias, out, item, row, mask, out_features, HAS_BIAS)
        else:
            _store(total, operand_scales, scales, bias, out, item, row, mask, out_features, HAS_BIAS)


@gluon.jit
def _store(total, operand_scales, scales, bias, out, item, row, mask, out_features, HAS_BIAS: gl.constexpr):
    """Apply the scales of the activation and of the rows, add the bias, round once."""
    value = total * gl.load(operand_scales + item, mask=mask, other=0.0) * gl.load(scales + row, mask=mask, other=0.0).to(gl.float32)
    if HAS_BIAS:
        value += gl.load(bias + row, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + item.to(gl.int64) * out_features + row, value.to(out.dtype.element_ty), mask=mask)
