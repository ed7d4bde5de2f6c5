"""The multiplication on integer tensor cores: what is decided about it, and what its machine code is. It runs in `benchmarks check`."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton")

from qpc.errors import KernelError
from qpc.kernels import fused
from qpc.kernels.fused import Finish
from qpc.kernels.fused_ampere import ampere_kernel
from qpc.quant.codebook import hash_words
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from tests.kernels.compiling import instructions, usage
from tests.kernels.fused_compiling import compiled, opcodes, turn

TRELLIS = TrellisQuantizer(6, 19)
CPU = torch.device("cpu")


@pytest.mark.parametrize("step_bits", [3, 4, 6, 8, 9, 12])
def test_decodes_in_a_shift_a_mask_and_a_multiplication_for_each_word(step_bits: int) -> None:
    """A turn is four blocks, 64 windows a lane; three dozen instructions for all the rest."""
    kernel = compiled(step_bits)
    used, counts = usage(kernel), opcodes(turn(kernel, "IMMA"))
    words = hash_words(step_bits, min(step_bits + 13, 24))
    assert used.stack == 0, "a spill costs more than it saves"
    assert counts["IMMA"] == 4 * 4 * words
    assert 64 <= counts["LOP3"] <= 76 and 64 * words <= counts["IMAD"] <= 64 * words + 32
    assert counts["SHF"] <= 64 + 24 * (step_bits % 2)
    assert counts["I2F"] == counts["PRMT"] == counts["LDG"] == counts["FFMA"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"operand_rows": 4, "warpgroups": 4},
        {"operand_rows": 8, "warpgroups": 4, "depth": 2, "chunk_bytes": 32768},
        {"operand_rows": 16, "depth": 2},
        {"warpgroups": 1, "depth": 1, "bias": True},
    ],
    ids=str,
)
def test_compiles_within_its_registers(options: dict[str, Any]) -> None:
    used = usage(compiled(6, **options))
    assert used.registers <= fused.MORE_REGISTERS and used.stack == 0


@pytest.mark.parametrize(
    ("finish", "loads", "bits"), [(Finish.BY_FOUR, 48, 32), (Finish.WIDE_BY_FOUR, 28, 64), (Finish.WIDE, 7, 128)], ids=str
)
def test_neighbouring_sums_of_others_are_read_together(finish: Finish, loads: int, bits: int) -> None:
    """Of 8 rows and four warpgroups a thread finishes two sums in each of two rounds, or four in one, and waits for 12, 14 and 7 others."""
    kernel = compiled(6, operand_rows=8, warpgroups=4, depth=2, chunk_bytes=32768, finish=finish)
    strong = [re.sub(r"^@\S+\s+", "", line).split()[0] for line in instructions(kernel) if ".STRONG." in line]
    width = "" if bits == 32 else f".{bits}"
    assert [name for name in strong if name.startswith("LDG")] == [f"LDG.E{width}.STRONG.{'GPU' if finish.wide else 'SYS'}"] * loads
    assert usage(kernel).stack == 0


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
def test_copies_in_pieces_need_no_more_instructions(architecture: int) -> None:
    """A lane copies 4 x 384 bytes of codes and 4 x 128 of the operand for its warp in each turn of four blocks, by 16 bytes at a time."""
    kernel = compiled(6, kernel=ampere_kernel, stages=4, bias=True, finish=Finish.WIDE, architecture=architecture)
    used, body = usage(kernel), turn(kernel, "IMMA")
    counts = opcodes(body)
    assert used.registers <= fused.REGISTERS and used.stack == 0
    assert counts["LDGSTS"] == 4 and counts["LDG"] == counts["BAR"] == 0, "and no warp waits for another"
    if architecture == 90:
        assert len(body) <= len(turn(compiled(6), "IMMA"))


SHAPES_OF_GPUS = st.sampled_from([(108, 164 << 10), (84, 100 << 10), (128, 100 << 10), (132, 228 << 10)])


@given(
    SHAPES_OF_GPUS, st.integers(1, 500), st.lists(st.integers(1, 900), min_size=1, max_size=2), st.integers(2, 12),
    st.sampled_from([1, 2, 4, 8, 16]),
)  # fmt: skip
def test_pieces_fit_where_two_programs_run(
    gpu: tuple[int, int], block_rows: int, widths: list[int], step_bits: int, operand_rows: int
) -> None:
    """On an A100, an RTX 3090, an L40S and an H100: every column is multiplied, and what runs at the same time has room."""
    multiprocessors, shared_bytes = gpu
    cut = fused.plan_in_pieces(block_rows, tuple(widths), (2,) * len(widths), step_bits, operand_rows, multiprocessors, shared_bytes)
    assert all(width % cut.turn == 0 for width in widths) and cut.stages >= 2
    at_once = 2 if sum(cut.programs) > multiprocessors + 1 else 1  # one more where a part is so small that it would have none
    assert at_once <= cut.resident and 1 <= sum(cut.programs) <= 2 * multiprocessors + 1
    assert at_once * (fused.program_bytes(cut, step_bits, operand_rows) + fused.RESERVED_BYTES) <= shared_bytes


def test_no_plan_in_pieces_says_why() -> None:
    with pytest.raises(KernelError, match="4096 bytes of shared memory hold no program for operand_rows=1"):
        fused.plan_in_pieces(64, (256,), (2,), 6, 1, 108, 4096)


def test_shared_memory_in_pieces_is_what_the_plan_takes_it_for() -> None:
    cut = fused.plan_in_pieces(448, (256,), (2,), 6, 1, 108, 164 << 10)
    kernel = compiled(6, kernel=ampere_kernel, warpgroups=cut.warpgroups, depth=cut.depth, stages=cut.stages, finish=cut.finish)
    assert kernel.metadata.shared == fused.program_bytes(cut, 6, 1)


@pytest.mark.parametrize("architecture", [100, 120])
def test_compiles_for_the_architectures_that_followed(architecture: int) -> None:
    """Where it has never run, so `supports` says no; but nothing of it is Hopper's alone. Before sm_90 there are no bulk copies."""
    used = usage(compiled(6, architecture=architecture))
    assert used.registers <= fused.REGISTERS and used.stack == 0


def test_codes_are_read_before_their_slot_is_refilled() -> None:
    """A bulk copy writes through another proxy: only a fence holds it behind loads of the same bytes that are under way."""
    lines = [re.sub(r"^@\S+\s+", "", line).split()[0] for line in instructions(compiled(6))]
    first_product = next(index for index, name in enumerate(lines) if name.startswith("IMMA"))
    refill = next(index for index, name in enumerate(lines) if index > first_product and name.startswith("UBLKCP"))
    fence = max(index for index, name in enumerate(lines[:refill]) if name.startswith("FENCE.VIEW.ASYNC"))
    assert fence > first_product and not any(name == "LDS" for name in lines[fence:refill])


@pytest.mark.parametrize(("rows", "warpgroups", "depth"), [(1, 2, 4), (8, 4, 2)])
def test_shared_memory_is_what_the_plan_takes_it_for(rows: int, warpgroups: int, depth: int) -> None:
    """Nothing of Triton's own lies before it, since addresses count from the start; a kibibyte is the driver's."""
    kernel = compiled(6, operand_rows=rows, warpgroups=warpgroups, depth=depth)
    cut = fused.Plan(warpgroups, depth, (1,), fused.CHUNK_BYTES, fused.STAGES, fused.REGISTERS)
    assert kernel.metadata.shared == fused.program_bytes(cut, 6, rows)
    assert usage(kernel).shared == kernel.metadata.shared + 1024


def test_two_rates_in_one_launch() -> None:
    used = usage(compiled(6, 7))
    assert used.registers <= fused.REGISTERS and used.stack == 0


SHAPES = {
    "block_rows": st.integers(1, 700),
    "widths": st.lists(st.integers(1, 2000), min_size=1, max_size=2),
    "step_bits": st.lists(st.integers(2, 12), min_size=2, max_size=2),
    "operand_rows": st.sampled_from([1, 2, 4, 8, 16]),
}


def cut_of(block_rows: int, widths: list[int], step_bits: list[int], operand_rows: int) -> fused.Plan:
    words = tuple(1 if bits <= 4 else 2 for bits in step_bits[: len(widths)])
    return fused.plan(block_rows, tuple(widths), words, operand_rows, 132)


@given(**SHAPES)
def test_plans_cover_every_column_within_the_limits(block_rows: int, widths: list[int], step_bits: list[int], operand_rows: int) -> None:
    cut = cut_of(block_rows, widths, step_bits, operand_rows)
    assert len(cut.programs) == len(widths)
    for width, programs in zip(widths, cut.programs, strict=True):
        assert width % cut.turn == 0, "a turn that is cut would read another row's codes"
        units = -(-block_rows // 4) * (width // cut.turn)
        assert 1 <= programs <= units
        assert -(-units // programs) * cut.depth * 16 <= fused.MAX_COLUMNS
    assert fused.program_bytes(cut, max(step_bits[: len(widths)]), operand_rows) < fused.SHARED_BYTES
    assert cut.chunk_bytes % (128 * operand_rows * cut.turn) == 0, "a chunk is whole turns"
    assert 1 <= cut.resident <= 2


@given(**SHAPES)
def test_every_group_has_as_many_places_as_programs(block_rows: int, widths: list[int], step_bits: list[int], operand_rows: int) -> None:
    """Counted unit by unit, on few enough units."""
    block_rows, widths = block_rows % 40 + 1, [width % 64 + 1 for width in widths]
    cut = cut_of(block_rows, widths, step_bits, operand_rows)
    groups, turns = -(-block_rows // 4), [width // cut.turn for width in widths]
    found: dict[int, set[tuple[int, int]]] = {}
    for part, (width, programs) in enumerate(zip(turns, cut.programs, strict=True)):
        units = groups * width
        for program in range(programs):
            for unit in range(units * program // programs, units * (program + 1) // programs):
                found.setdefault(unit // width, set()).add((part, program))
    assert fused.most_places(groups, tuple(turns), cut.programs) == max(map(len, found.values()))


def test_sums_fit_int32() -> None:
    assert 4 * 128 * 128 * fused.MAX_COLUMNS < 2**31


def test_says_why_not() -> None:
    assert "compute capability" in fused.supports([TRELLIS], 1, torch.bfloat16, CPU).reason


@pytest.mark.parametrize(
    ("quantizers", "batch", "dtype", "reason"),
    [
        ([ScalarQuantizer(4)], 1, torch.bfloat16, "scalar"),
        ([TRELLIS] * 3, 1, torch.bfloat16, "3 parts"),
        ([TRELLIS], 1, torch.float32, "float32"),
        ([TRELLIS], 17, torch.bfloat16, "batch=17"),
    ],
)
def test_says_why_not_on_hopper(
    monkeypatch: pytest.MonkeyPatch, quantizers: list[Any], batch: int, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    found = fused.supports(quantizers, batch, dtype, cuda)
    assert found.implementation is None and reason in found.reason
    assert fused.supports([TRELLIS], 16, torch.float16, cuda).implementation is not None
