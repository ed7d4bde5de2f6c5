"""Multiplication by trellis-coded weights on integer tensor cores: for what it is, and how it is launched.

The kernel is in `qpc.kernels.fused_hopper`; activations come as the operand of `qpc.kernels.operand`. An element of the result is off by at
most half a step of the scale for each byte of the weights from rounding projections to 16-bit fixed point (a step is 1 / 32512 of the
largest of a row), (S + 4) 2^-24 of the sizes of its S splits together from float32, and one rounding to its dtype. Sums of bytes are exact.
Equal input gives equal output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import product

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import workspaces
from qpc.kernels.launch import MAX_BATCH, MAX_PARTS, processors
from qpc.kernels.select import Implementation, Support
from qpc.kernels.warpgroup import ROWS, Product
from qpc.quant.codebook import SCALE, hash_words
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.trellis import TrellisQuantizer

CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)

GROUP_ROWS = 256
"""Rows of the weight that a program takes together: four block rows, one for each warp of a warpgroup."""

EXCHANGE_STRIDE = GROUP_ROWS + 8
"""Places for one row of the batch when warpgroups exchange their sums: the eight behind keep four rows in different banks."""

OPERAND_BARRIER_BYTES = 32
"""Before the barriers of the codes: two of chunks that have come, two of chunks that have been read."""

TAIL_BYTES = 512
"""Behind the operand, since a product reads four rows also where the operand has fewer."""

PIECE_STAGES = (4, 3, 2)
"""Slots of the ring of codes and operand of a warp, where they are copied in pieces; the best first."""

RESERVED_BYTES = 1024
"""Of shared memory that the driver takes of each program."""

SHARED_BYTES = 227 << 10
"""Shared memory of a multiprocessor that one program can have."""

MAX_COLUMNS = 32752
"""Input columns that a warp may add up in int32: 4 * 128 * 128 * 32752 < 2^31, four bytes for each column times the largest limb."""

WARP_ROWS = 4
"""Block rows of a group of rows, one for each warp of a warpgroup."""

CHUNK_BYTES, CHUNK_BYTES_A_ROW = 8192, 4096
"""Of the operand at a time, whichever is more, unless one turn is larger: some turns, since all warps must have read one before another can
take its place."""

MOST_CONTRIBUTORS = 8
"""Programs that share a group of rows, where few would do for the work: the last of them waits for all."""

STAGES = 2
"""Slots of the ring of codes of a warp. More were not faster."""

REGISTERS, MORE_REGISTERS = 128, 255
"""Of a thread at most: what a warp needs to decode some windows while others are multiplied, and to spill nothing; more for more
than 8 rows of the batch, which have more sums, and for single warpgroups, which finish more rows a thread. (With 64 it takes a
quarter longer.) So at most two programs are on a multiprocessor: see the end of `benchmarks/results/nvidia-h100/KERNELS.md` on three."""

HALF = ((2, 4), (2, 2), (2, 1), (1, 2), (1, 1))
WHOLE = ((4, 4), (4, 2), *HALF)
SHORT_TURNS = ((4, 2), (4, 1), (2, 2), *HALF[2:])
MANY_SUMS = HALF[1:]
"""Warpgroups and depth, best first: programs that take half of a multiprocessor, or the whole; short turns where the operand is long."""

SMALLEST_BLOCKS, SMALL_BLOCKS = 128, 256
"""Blocks for each multiprocessor up to which few large programs are best, which have few sums to put together; and up to which a kernel
takes half of each multiprocessor, so that the next one's codes are there when it may begin."""


def supports(quantizers: Sequence[UniformQuantizer], batch: int, dtype: torch.dtype, device: torch.device) -> Support:
    """Whether this multiplication runs here; otherwise why not."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) != CAPABILITY:
        return Support(None, f"bulk copies into shared memory need compute capability {CAPABILITY}, which {device} does not have")
    others = [quantizer for quantizer in quantizers if not isinstance(quantizer, TrellisQuantizer)]
    if others:
        return Support(None, f"the words of {others[0]} are no sums of bytes; only trellis codes are")
    if len(quantizers) > MAX_PARTS:
        return Support(None, f"{len(quantizers)} parts along the input axis, at most {MAX_PARTS} in one launch")
    if dtype not in DTYPES:
        return Support(None, f"activations of {dtype} lose more in 16-bit fixed point than rounding to {dtype} does")
    if batch > MAX_BATCH:
        return Support(None, f"{batch=} is above {MAX_BATCH}, where decoding the weight once and one matrix product is faster")
    return Support(Implementation.TRITON, "integer tensor cores")


class Copies(Enum):
    """How codes and operand come to shared memory: in bulk (sm_90), or by 16 bytes (sm_80 and later), which is not chosen anywhere yet."""

    BULK = "bulk"
    PIECES = "pieces"

    def __str__(self) -> str:
        """The name that options take."""
        return self.value


class Finish(Enum):
    """How programs put their sums together.

    rows: of the batch at a time, so that more take more rounds of waiting. votes: whether the lanes of a warp wait for each other, which
    leaves fewer instructions in the loop that multiplies (`fused_ptx.poll`). wide: whether neighbouring sums of a lane are left and read by
    one instruction. No plan chooses what is wide before it was timed.
    """

    BY_FOUR = (4, False, False)
    TOGETHER = (8, True, False)
    WIDE_BY_FOUR = (4, True, True)
    WIDE = (8, True, True)

    def __init__(self, rows: int, votes: bool, wide: bool) -> None:
        self.rows, self.votes, self.wide = rows, votes, wide

    def __str__(self) -> str:
        """The name that options take."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Plan:
    """How one multiplication is cut.

    warpgroups: of a program. depth: column blocks that a warpgroup takes in one turn. programs: for each part of the weight.
    chunk_bytes: of the operand that are copied to shared memory at a time. stages: slots of the ring of codes of a warp.
    registers: of a thread at most. product: `Product.WGMMA` takes an operand in its own order; it was no faster for 8 rows, and none is
    chosen.
    """

    warpgroups: int
    depth: int
    programs: tuple[int, ...]
    chunk_bytes: int
    stages: int
    registers: int
    product: Product = Product.MMA
    finish: Finish = Finish.BY_FOUR
    copies: Copies = Copies.BULK

    @property
    def turn(self) -> int:
        """Column blocks of one turn of a program."""
        return self.warpgroups * self.depth

    @property
    def resident(self) -> int:
        """Programs for which a multiprocessor has registers."""
        return (1 << 16) // (128 * self.warpgroups * self.registers)


@cache
def plan(block_rows: int, widths: tuple[int, ...], words: tuple[int, ...], operand_rows: int, multiprocessors: int) -> Plan:
    """The plan that was fastest on an H100 for shapes of this kind (`benchmarks.studies.fused_study`), and the finish on an H200.

    widths: block columns of each part, at least 1. words: that a window of each is hashed to. operand_rows: a power of two up to 16.
    """
    groups, even = -(-block_rows // WARP_ROWS), True
    cuts: tuple[tuple[int, int], ...]
    few = min(multiprocessors, MOST_CONTRIBUTORS * groups)
    if operand_rows > 8:
        cuts, programs = MANY_SUMS, few
    elif operand_rows > 4 or block_rows * sum(widths) <= SMALLEST_BLOCKS * multiprocessors:
        cuts, programs = SHORT_TURNS, few
    elif block_rows * sum(widths) <= SMALL_BLOCKS * multiprocessors:
        cuts, programs, even = HALF, multiprocessors, False
    elif 2 * groups >= multiprocessors:
        cuts, programs = HALF, 2 * multiprocessors
    else:
        cuts, programs = WHOLE, multiprocessors
    warpgroups, depth = next(cut for cut in cuts if all(width % (cut[0] * cut[1]) == 0 for width in widths))
    found = cut_for(warpgroups, depth, block_rows, widths, words, operand_rows, programs, even)
    together = operand_rows <= 4 or (operand_rows <= 8 and 2 * groups >= multiprocessors)
    return replace(found, finish=Finish.TOGETHER) if together else found


def cut_for(
    warpgroups: int,
    depth: int,
    block_rows: int,
    widths: tuple[int, ...],
    words: tuple[int, ...],
    operand_rows: int,
    programs: int,
    even: bool = False,
    stages: int = STAGES,
    registers: int | None = None,
) -> Plan:
    """The plan of so many warpgroups, and programs at most.

    even: no more programs than it takes to have no more turns in any. Otherwise each multiprocessor has one, and has room for one of the
    next kernel: with fewer, some would get two of the next one.
    """
    turn, groups = warpgroups * depth, -(-block_rows // WARP_ROWS)
    turns = [width // turn for width in widths]
    work = [count * (2 + each) for count, each in zip(turns, words, strict=True)]  # in instructions: two for the window, one for a word
    first = round(programs * work[0] / sum(work))
    shares = (programs,) if len(widths) == 1 else (max(1, min(first, programs - 1)), max(1, programs - first))
    counts = []
    for units, share in zip([groups * count for count in turns], shares, strict=True):
        longest = min(-(-units // share), MAX_COLUMNS // (16 * depth))
        fewest = -(-units // longest)
        counts.append(fewest if even else max(fewest, min(share, units)))
    registers = registers or (MORE_REGISTERS if operand_rows > 8 or warpgroups == 1 else REGISTERS)
    turn_bytes = 128 * operand_rows * turn
    chunk_bytes = max(1, min(max(turns), max(CHUNK_BYTES, CHUNK_BYTES_A_ROW * operand_rows) // turn_bytes)) * turn_bytes
    return Plan(warpgroups, depth, tuple(counts), chunk_bytes, stages, registers)


@cache
def plan_in_pieces(
    block_rows: int,
    widths: tuple[int, ...],
    words: tuple[int, ...],
    step_bits: int,
    operand_rows: int,
    multiprocessors: int,
    shared_bytes: int,
) -> Plan:
    """A plan for a GPU without bulk copies. step_bits: the most of a part. shared_bytes: of a multiprocessor. It was never timed.

    As many programs of 8 warps as have room, two at most; then turns as long as may be, then deep rings. Raises `KernelError` if not even
    one program has room.
    """
    few = MOST_CONTRIBUTORS * -(-block_rows // WARP_ROWS)
    for resident, (warpgroups, depth), stages in product((2, 1) if operand_rows <= 8 else (1,), HALF, PIECE_STAGES):
        programs = min(resident * multiprocessors, few)
        if any(width % (warpgroups * depth) for width in widths):
            continue
        found = cut_for(warpgroups, depth, block_rows, widths, words, operand_rows, programs, True, stages)
        found = replace(found, copies=Copies.PIECES, finish=Finish.WIDE, chunk_bytes=0)
        if resident * (program_bytes(found, step_bits, operand_rows) + RESERVED_BYTES) <= shared_bytes:
            return found
    raise KernelError(f"{shared_bytes} bytes of shared memory hold no program for {operand_rows=}; use another implementation")


def plan_of(codes: list[Tensor], quantizers: Sequence[UniformQuantizer], operand_rows: int, device: torch.device) -> Plan:
    """The plan of a weight on a GPU."""
    packed, parts = _present(codes, quantizers)
    widths, words = tuple(code.shape[1] for code in packed), tuple(map(words_of, parts))
    return plan(codes[0].shape[0], widths, words, operand_rows, processors(device))


def _present(codes: list[Tensor], quantizers: Sequence[UniformQuantizer]) -> tuple[list[Tensor], list[TrellisQuantizer]]:
    """The parts that have columns."""
    parts = [quantizer for quantizer in quantizers if isinstance(quantizer, TrellisQuantizer)]
    present = [index for index, code in enumerate(codes) if code.shape[1]]
    return [codes[index].contiguous() for index in present], [parts[index] for index in present]


@cache
def most_places(groups: int, turns: tuple[int, ...], programs: tuple[int, ...]) -> int:
    """Programs that have sums for one group, at most."""
    most = 0
    for group in range(groups):
        count = 0
        for width, parts in zip(turns, programs, strict=True):
            units = groups * width
            low, high = (((unit + 1) * parts - 1) // units for unit in (group * width, group * width + width - 1))
            count += high - low + 1
        most = max(most, count)
    return most


def head_bytes(warpgroups: int, stages: int) -> int:
    """Shared memory of the barriers, a multiple of 128."""
    return -(-(OPERAND_BARRIER_BYTES + 32 * int(warpgroups) * int(stages)) // 128) * 128


def exchange_bytes(warpgroups: int, operand_rows: int, rows: int) -> int:
    """Shared memory in which warpgroups exchange their sums, for so many rows of the batch at a time."""
    return int(warpgroups) * min(int(rows), int(operand_rows)) * EXCHANGE_STRIDE * 4


def program_bytes(cut: Plan, step_bits: int, operand_rows: int) -> int:
    """Shared memory of a program."""
    rings = 4 * cut.warpgroups * cut.stages * cut.depth * 64 * step_bits
    exchange = exchange_bytes(cut.warpgroups, operand_rows, cut.finish.rows)
    if cut.copies is Copies.PIECES:
        operands = 4 * cut.warpgroups * cut.stages * cut.depth * 128 * operand_rows
        return -(-(exchange + rings + operands + TAIL_BYTES) // 512) * 512
    return head_bytes(cut.warpgroups, cut.stages) + 2 * cut.chunk_bytes + TAIL_BYTES + exchange + rings


def words_of(quantizer: TrellisQuantizer) -> int:
    """Words that a window is hashed to."""
    return hash_words(quantizer.step_bits, quantizer.window_bits)


def multiply(
    words: Tensor,
    activation_scales: Tensor,
    codes: list[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    quantizers: Sequence[UniformQuantizer],
    out_features: int,
    dtype: torch.dtype,
    cut: Plan | None = None,
) -> Tensor:
    """`x @ w.T + bias` for an operand and a weight that `supports` says yes to: [batch, out_features] of `dtype`.

    words, activation_scales: the operand, for all block columns of the weight. codes, scales, bias: as the linear operators take them.
    cut: by default what `plan` says. Raises `KernelError` where the operand is not in the order of its product.
    """
    from qpc.kernels.fused_ampere import ampere_kernel
    from qpc.kernels.fused_hopper import fused_kernel

    batch, rows, device = len(activation_scales), codes[0].shape[0], words.device
    operand_rows = words.shape[3 if cut and cut.product is Product.WGMMA else 1]
    cut = cut or plan_of(codes, quantizers, operand_rows, device)
    _check_order(words, operand_rows, cut.product)
    packed, parts = _present(codes, quantizers)
    widths = [code.shape[1] for code in packed]
    out = torch.empty((batch, out_features), dtype=dtype, device=device)
    turns = [width // cut.turn for width in widths]
    most = most_places(-(-rows // 4), tuple(turns), cut.programs)
    workspace = workspaces.take(-(-rows // 4) * most * GROUP_ROWS * operand_rows, device)
    two = len(parts) > 1
    bulk = cut.copies is Copies.BULK
    of_kind = {"CHUNK_BYTES": cut.chunk_bytes, "BY_WARPGROUP": cut.product is Product.WGMMA, "launch_pdl": True} if bulk else {}
    (fused_kernel if bulk else ampere_kernel)[(sum(cut.programs),)](
        words, activation_scales, packed[0], packed[-1], scales.contiguous(), bias, out, workspace,
        turns[0], turns[-1], cut.programs[0], most, batch, rows, out_features,
        STEP_BITS_0=parts[0].step_bits, STEP_BITS_1=parts[1].step_bits if two else 0,
        WINDOW_BITS_0=parts[0].window_bits, WINDOW_BITS_1=parts[1].window_bits if two else 0,
        UNIT_0=SCALE * parts[0].unit, UNIT_1=SCALE * parts[-1].unit, DEPTH=cut.depth, STAGES=cut.stages, OPERAND_ROWS=operand_rows,
        HAS_BIAS=bias is not None, WARPGROUPS=cut.warpgroups, FINISH_ROWS=cut.finish.rows, VOTES=cut.finish.votes, WIDE=cut.finish.wide,
        num_warps=4 * cut.warpgroups, maxnreg=cut.registers, **of_kind,
    )  # fmt: skip
    return out


def _check_order(words: Tensor, operand_rows: int, product: Product) -> None:
    """Raise `KernelError` unless an operand is in the order of a product, and of as many rows as that takes."""
    order = (2, 2, operand_rows, 2, 4) if product is Product.WGMMA else (operand_rows, 2, 4, 2, 2)
    if tuple(words.shape[1:]) != order:
        raise KernelError(f"operand: words are {tuple(words.shape)}, required (column_blocks, {', '.join(map(str, order))}) for {product}")
    if product is Product.WGMMA and operand_rows not in ROWS:
        raise KernelError(f"operand: {operand_rows=} must be one of {ROWS} for {product}: use {Product.MMA}")
