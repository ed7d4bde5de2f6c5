"""The PTX of `qpc.kernels.fused_hopper`: products of bytes, bulk copies, and waiting for other programs.

In all texts `$0` is a result; where only the effect counts it is 0 and nobody reads it. Predicates come as int32, 0 for no.
"""

from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]

SHARED = "mov.u32 $0, global_smem;"
"""Where the shared memory that Triton allocates begins."""

INITIALIZE = "{.reg .pred p; setp.ne.u32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$1], 1; mov.u32 $0, 0;}"
"""Make the barrier at $1, for one arrival a phase, if $2."""

OF_LANE_0 = "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;"
"""What lane 0 has: so the assembler knows that it is the same in all lanes, and keeps it in uniform registers."""

PUBLISH_BARRIERS = "fence.mbarrier_init.release.cluster; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
"""Let bulk copies, and the other lanes of the warp, see the barriers that this thread made."""

BARRIER = "bar.sync 0; mov.u32 $0, 0;"
"""Wait for all threads of the program."""

ARRIVE = (
    "{.reg .pred p; setp.ne.u32 p, $2, 0; bar.warp.sync 0xffffffff; @p mbarrier.arrive.release.cta.shared::cta.b64 _, [$1]; mov.u32 $0, 0;}"
)
"""Arrive at the barrier at $1 if $2, after all lanes of the warp have come so far."""

WAIT = "{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra AGAIN; mov.u32 $0, 0;}"
"""Wait until the phase of parity $2 of the barrier at $1 is over."""

WAIT_IF = (
    "{.reg .pred p; setp.eq.u32 p, $3, 0; @p bra OVER; "
    "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra AGAIN; OVER: mov.u32 $0, 0;}"
)
"""The same if $3."""

COPY = (
    "{.reg .pred p; setp.ne.u32 p, $4, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $5; "
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [$3], $5, [$1]; mov.u32 $0, 0;}"
)
"""Copy $5 bytes from global memory at $3 to shared memory at $2 if $4; a phase of the barrier at $1 is over when they are there."""

REFILL = "bar.warp.sync 0xffffffff; fence.proxy.async.shared::cta; " + COPY
"""The same after all lanes of the warp have read what was there.

Without the fence the copy can overtake loads that were issued before it, on a multiprocessor that is busy enough: these read other codes
then.
"""

COPY_PIECE = "{.reg .pred p; setp.ne.u32 p, $3, 0; @p cp.async.cg.shared.global [$1], [$2], 16; mov.u32 $0, 0;}"
"""Copy 16 bytes from global memory at $2 to shared memory at $1 if $3; part of the next `COMMIT_PIECES` of this thread."""

COPY_SHARED_PIECE = COPY_PIECE.replace(".cg", ".ca")
"""The same of bytes that other warps copy too: they stay in the first-level cache."""

COMMIT_PIECES = "cp.async.commit_group; mov.u32 $0, 0;"
"""Close a group of copies, empty or not."""

SETTLED = "bar.warp.sync 0xffffffff; mov.u32 $0, 0;"
"""All lanes of the warp have come so far, and read what they read before."""


def wait_for_pieces(groups: int) -> str:
    """Wait until at most so many of the last groups of this thread's copies are under way, and let the other lanes of the warp see them."""
    return f"cp.async.wait_group {int(groups)}; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"


PREFETCH = "{.reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}"
"""Bring the line at $1 into the second-level cache, if $2."""

STORE = "{.reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0;}"
"""Leave float32 $2 in shared memory at $1, if $3."""

LOAD = "ld.shared.f32 $0, [$1];"
"""float32 of shared memory at $1."""

PUBLISH = "{.reg .pred p; setp.ne.u32 p, $2, 0; @p st.volatile.global.b32 [$1], $3; mov.u32 $0, 0;}"
"""Leave $3 at $1 for another program, if $2."""


def publish(elements: int) -> str:
    """The same for neighbouring elements of a thread, by as few instructions as can be. $0 on: as many results; the arguments of each."""
    elements = int(elements)
    width = min(4, elements)
    type_ = f"v{width}.b32" if width > 1 else "b32"
    text = f"{{.reg .pred p; setp.ne.u32 p, ${2 * elements}, 0; "
    for first in range(0, elements, width):
        values = ", ".join([f"${3 * elements + first + i}" for i in range(width)])
        text += f"@p st.relaxed.gpu.global.{type_} [${elements + first}], {{{values}}}; "
    return text + " ".join([f"mov.u32 ${i}, 0;" for i in range(elements)]) + "}"


def publish_constraints(elements: int) -> str:
    """Of the registers of `publish`."""
    elements = int(elements)
    return ",".join(["=r"] * elements + ["l"] * elements + ["r"] * (2 * elements))


def polled(elements: int, votes: bool) -> int:
    """How many values `poll` awaits at a time for each element: 24 registers of them together (or 28), and 15 at most."""
    return min(15, (28 if votes else 24) // int(elements))


def poll(elements: int, count: int, votes: bool, wide: bool) -> str:
    """Read values that other programs leave until none is free, and free their places, for so many elements of a thread at a time.

    Arguments of each element: where the first value is, whether there are any, how many (as many for each element, beyond `count` no
    more), and their distance in bytes. Results are `count` values of each element, 0 for what is not there.
    votes: the lanes of a warp wait for each other, so that the assembler knows that they come out as one, and what is the same in all
    lanes can stay in uniform registers wherever this is in a loop.
    wide: elements are neighbours in memory, up to four of which are read, and freed, by one instruction. (Those without have the whole
    system as their scope, of which a GPU is enough.)
    """
    elements, count = int(elements), int(count)
    width = min(4, elements) if wide else 1
    type_ = f"v{width}.b32" if width > 1 else "b32"
    load, store = ("ld.relaxed.gpu.global", "st.relaxed.gpu.global") if wide else ("ld.volatile.global", "st.volatile.global")
    first = elements * count  # the arguments come after the results, each of all elements
    address, mask, size, stride = first, first + elements, first + 2 * elements, first + 3 * elements
    read, free = "AGAIN: ", "mov.b32 m, 0xFFFFFFFF; "
    for element in range(0, elements, width):
        begin = f"setp.ne.u32 p, ${mask + element}, 0; mov.b64 a, ${address + element}; "
        read += begin
        free += begin
        for i in range(count):
            place = f"setp.gt.and.s32 q, ${size}, {i}, p; "
            values = ", ".join([f"v{(element + each) * count + i}" for each in range(width)])
            read += place + f"@q {load}.{type_} {{{values}}}, [a]; add.s64 a, a, ${stride}; "
            free += place + f"@q {store}.{type_} [a], {{{', '.join(['m'] * width)}}}; add.s64 a, a, ${stride}; "
    text = f"{{.reg .pred p, q; .reg .b32 m; .reg .b64 a; .reg .b32 v<{first}>; "
    text += "".join([f"mov.b32 v{i}, 0; " for i in range(first)]) + read
    text += "mov.b32 m, 0; " + "".join([f"max.u32 m, m, v{i}; " for i in range(first)])
    vote, branch = ("vote.sync.any.pred q, q, 0xffffffff; ", "bra.uni") if votes else ("", "bra")
    text += f"setp.eq.u32 q, m, 0xFFFFFFFF; {vote}@q {branch} AGAIN; " + free
    return text + " ".join([f"mov.b32 ${i}, v{i % elements * count + i // elements};" for i in range(first)]) + "}"


def poll_constraints(elements: int, count: int) -> str:
    """Of the registers of `poll`."""
    elements = int(elements)
    return ",".join(["=r"] * (elements * int(count)) + ["l"] * elements + ["r"] * (2 * elements) + ["l"] * elements)


def types(count: int, unsigned: bool = False) -> tuple[gl.dtype, ...]:
    """Types of a tuple of 32-bit integers."""
    return tuple([gl.uint32 if unsigned else gl.int32] * int(count))


def multiply(tiles: int, words: int) -> str:
    """Multiply the words of 16 rows by the operand, m16n8k32, once for each of `tiles` of four rows of the batch.

    $0 on: the sums, four for each tile; then the same as arguments; then four registers of each word, and of the operand two for each word
    and tile, words foremost.
    """
    tiles, words = int(tiles), int(words)
    sums, text = 4 * tiles, ""
    for word in range(words):
        a = ", ".join([f"${2 * sums + 4 * word + i}" for i in range(4)])
        for tile in range(tiles):
            c = ", ".join([f"${4 * tile + i}" for i in range(4)])
            b = ", ".join([f"${2 * sums + 4 * words + 2 * (tile * words + word) + i}" for i in range(2)])
            text += f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{c}}}, {{{a}}}, {{{b}}}, {{{c}}}; "
    return text


def multiply_constraints(tiles: int, words: int) -> str:
    """Of the registers of `multiply`."""
    sums = 4 * int(tiles)
    return ",".join(["=r"] * sums + [str(i) for i in range(sums)] + ["r"] * (4 * int(words) + 2 * int(words) * int(tiles)))
