"""Multiplication by trellis-coded weights on integer tensor cores: for what it is, and how it is launched.

The kernel is in `qpc.kernels.fused_hopper`; activations come as the operand of `qpc.kernels.operand`. An element of the result is off by at
most half a step of the scale for each byte of the weights from rounding projections to 16-bit fixed point (a step is 1 / 32512 of the
largest of a row), (S + 4) 2^-24 of the sizes of its S splits together from float32, and one rounding to its dtype. Sums of bytes are exact.
Equal input gives equal output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpc.kernels import workspaces
from qpc.kernels.launch import MAX_BATCH, MAX_PARTS, processors
from qpc.kernels.select import Implementation, Support
from qpc.quant.codebook import SCALE, hash_words
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.trellis import TrellisQuantizer

CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)

PROGRAM_ROWS = 4
"""Block rows of one program, one for each warp of a warpgroup."""

STAGES = 2
"""Slots of the ring of codes of a warp. Four were slower: what they gain in latency they lose in programs on a multiprocessor."""

HEAD_AND_TAIL_BYTES = 1536
"""Shared memory besides codes and operand: barriers, and what a product reads behind a small operand."""

FINISH_BYTES = 4096
"""Shared memory in which the sums of a warpgroup change their layout."""

SHARED_BYTES = 48 << 10
"""Most shared memory of a program that is launched without asking for more."""

RESIDENT_BYTES = 227 << 10
"""Shared memory of a multiprocessor, less what the driver keeps for one program."""

MAX_COLUMNS = 32752
"""Input columns that a warp may add up in int32: 4 * 128 * 128 * 32752 < 2^31, four bytes for each column times the largest limb."""

FEW_ROWS = ((4, 2), (2, 4), (2, 2), (4, 1), (1, 4), (2, 1), (1, 2), (1, 1))
"""Warpgroups and depth, best first, for weights whose rows make programs for less than half of the multiprocessors: large programs, so that
few have to put their sums together."""

MANY_ROWS = ((1, 4), (2, 2), (1, 2), (2, 1), (1, 1))
"""The same for others: small programs, which fill the multiprocessors evenly."""


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


@dataclass(frozen=True)
class Plan:
    """How one multiplication is cut.

    warpgroups: of a program. depth: column blocks that a warpgroup takes in one turn. splits: programs that share 256 rows, for each part.
    chunk_bytes: of the operand that are copied to shared memory at a time. registers: of a thread at most. stages: slots of the ring of
    codes of a warp.
    """

    warpgroups: int
    depth: int
    splits: tuple[int, ...]
    chunk_bytes: int
    registers: int
    stages: int = STAGES

    @property
    def turn(self) -> int:
        """Column blocks of one turn of a program."""
        return self.warpgroups * self.depth


@cache
def plan(
    block_rows: int, widths: tuple[int, ...], step_bits: tuple[int, ...], words: tuple[int, ...], operand_rows: int, multiprocessors: int
) -> Plan:
    """A plan that fills the multiprocessors.

    widths: block columns of each part, at least 1. words: that a window of each is hashed to. operand_rows: a power of two up to 16.
    """
    programs, registers = -(-block_rows // PROGRAM_ROWS), register_limit(operand_rows)
    warpgroups, depth = next(
        (warpgroups, depth)
        for warpgroups, depth in (FEW_ROWS if programs <= multiprocessors // 2 else MANY_ROWS)
        if all(width % (warpgroups * depth) == 0 for width in widths)
        and chunk_room(warpgroups, depth, max(step_bits), registers) >= 256 * operand_rows * warpgroups * depth
    )
    turn = warpgroups * depth
    turns = [width // turn for width in widths]
    load = resident_warpgroups(registers) // warpgroups + (warpgroups == 1)
    wanted = max(len(widths), load * multiprocessors // programs)
    work = [count * (2 + each) for count, each in zip(turns, words, strict=True)]  # in instructions: two for the window, one for a word
    first = round(wanted * work[0] / sum(work))
    shares = (wanted,) if len(widths) == 1 else (max(1, min(first, wanted - 1)), max(1, wanted - max(1, first)))
    least = [-(-count * depth * 16 // MAX_COLUMNS) for count in turns]
    splits = tuple(max(floor, min(share, max(1, count // 2))) for share, count, floor in zip(shares, turns, least, strict=True))
    return Plan(warpgroups, depth, splits, chunk_bytes(warpgroups, depth, max(step_bits), registers), registers)


def register_limit(operand_rows: int) -> int:
    """Registers of a thread: few, so that many warps are resident, but enough to spill none."""
    return 80 if operand_rows <= 4 else 96 if operand_rows == 8 else 128


def resident_warpgroups(registers: int) -> int:
    """Warpgroups that a multiprocessor holds at a time."""
    return (1 << 16) // (128 * registers)


def words_of(quantizer: TrellisQuantizer) -> int:
    """Words that a window is hashed to."""
    return hash_words(quantizer.step_bits, quantizer.window_bits)


def program_bytes(warpgroups: int, registers: int) -> int:
    """Shared memory that a program may take if as many programs are to be resident as registers allow."""
    return min(SHARED_BYTES, RESIDENT_BYTES * warpgroups // resident_warpgroups(registers) - 1024)


def chunk_bytes(warpgroups: int, depth: int, step_bits: int, registers: int, stages: int = STAGES) -> int:
    """The largest chunk of which two have room: a power of two, and so whole turns of any operand."""
    return 1 << ((chunk_room(warpgroups, depth, step_bits, registers, stages) // 2).bit_length() - 1)


def chunk_room(warpgroups: int, depth: int, step_bits: int, registers: int, stages: int = STAGES) -> int:
    """Shared memory that is left for two chunks of the operand."""
    return program_bytes(warpgroups, registers) - HEAD_AND_TAIL_BYTES - warpgroups * (FINISH_BYTES + 4 * stages * depth * 64 * step_bits)


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
    cut: by default what `plan` says.
    """
    from qpc.kernels.fused_hopper import fused_kernel

    batch, rows, device = len(activation_scales), codes[0].shape[0], words.device
    parts = [quantizer for quantizer in quantizers if isinstance(quantizer, TrellisQuantizer)]
    present = [index for index, code in enumerate(codes) if code.shape[1]]
    parts, packed = [parts[index] for index in present], [codes[index].contiguous() for index in present]
    widths, step_bits = tuple(code.shape[1] for code in packed), tuple(part.step_bits for part in parts)
    cut = cut or plan(rows, widths, step_bits, tuple(map(words_of, parts)), words.shape[1], processors(device))
    splits = sum(cut.splits)
    out = torch.empty((batch, out_features), dtype=dtype, device=device)
    programs = -(-rows // PROGRAM_ROWS)
    workspace = workspaces.take(programs * splits * 256 * words.shape[1], device) if splits > 1 else None
    turns = [width // cut.turn for width in widths]
    two = len(parts) > 1
    fused_kernel[(programs, splits)](
        words, activation_scales, packed[0], packed[-1], scales.contiguous(), bias, out, workspace,
        turns[0], turns[-1], cut.splits[0], batch, rows, out_features,
        STEP_BITS_0=parts[0].step_bits, STEP_BITS_1=parts[1].step_bits if two else 0,
        WINDOW_BITS_0=parts[0].window_bits, WINDOW_BITS_1=parts[1].window_bits if two else 0,
        UNIT_0=SCALE * parts[0].unit, UNIT_1=SCALE * parts[-1].unit, DEPTH=cut.depth, STAGES=cut.stages, CHUNK_BYTES=cut.chunk_bytes,
        OPERAND_ROWS=words.shape[1], HAS_BIAS=bias is not None, SPLIT=splits > 1, WARPGROUPS=cut.warpgroups, PDL=True,
        num_warps=4 * cut.warpgroups, maxnreg=cut.registers, launch_pdl=True,
    )  # fmt: skip
    return out
