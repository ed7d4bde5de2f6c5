"""The product of a warpgroup: its registers, descriptors and sums against what the PTX manual says of them, and its machine code.

The registers and the memory are those of the kernel, the instructions those of its text. It runs in `benchmarks check --product wgmma`.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from qpc.errors import KernelError
from qpc.kernels import fused
from qpc.kernels.fused import Finish
from qpc.kernels.operand import pack_operand
from qpc.kernels.warpgroup import Product, distance, in_cores, issue, issue_constraints
from qpc.quant.bitstring import ring_windows
from qpc.quant.codebook import MULTIPLIERS, SCALE, START, decode_windows, hash_words
from qpc.quant.layout import from_blocks
from tests.kernels.compiling import usage
from tests.kernels.fused_compiling import compiled, opcodes, turn
from tests.kernels.packed import packed

THREAD = torch.arange(128)
WARP, GROUP, IN_GROUP = THREAD // 32, THREAD % 32 // 4, THREAD % 4
"""Of each thread of a warpgroup, as the figures of fragments in the PTX manual name them."""

ADDRESS = 2048
"""Where the operand begins in shared memory."""


@cache
def by_warpgroup(*step_bits: int) -> Any:
    """The kernel of the plans for 5 to 8 rows, by the other product."""
    variant: dict[str, Any] = {"product": Product.WGMMA, "finish": Finish.TOGETHER}
    return compiled(*step_bits, operand_rows=8, warpgroups=4, depth=2, chunk_bytes=32768, bias=True, **variant)


def signed_byte(value: Tensor, index: int) -> Tensor:
    return ((value >> 8 * index & 0xFF) ^ 0x80) - 0x80


def a_matrix(registers: list[Tensor]) -> Tensor:
    """[64, 32] from the four registers of each thread: 9.7.15.5.1 of the PTX manual, `.m64nNk32`."""
    a = torch.zeros(64, 32, dtype=torch.int64)
    for index, register in enumerate(registers):
        for byte in range(4):
            a[16 * WARP + GROUP + 8 * (index % 2), 16 * (index // 2) + 4 * IN_GROUP + byte] = signed_byte(register, byte)
    return a


def b_matrix(memory: Tensor, descriptor: int, columns: int) -> Tensor:
    """[32, columns] of bytes of shared memory: K-major, without swizzling, in core matrices of 8 columns of 16 bytes."""
    assert descriptor >> 46 == 0, "neither a base offset nor a swizzle"
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    k, n = torch.arange(32)[:, None], torch.arange(columns)[None, :]
    return memory[start + n // 8 * stride + k // 16 * leading + n % 8 * 16 + k % 16]


def add_product(sums: list[Tensor], product: Tensor) -> list[Tensor]:
    """Registers of each thread, plus what of [64, columns] it has."""
    return [
        each + product[16 * WARP + GROUP + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * IN_GROUP + index % 2]
        for index, each in enumerate(sums)
    ]


def run(text: str, arguments: list[Tensor], sums: int, memory: Tensor) -> list[Tensor]:
    """What the instructions of `issue` leave in their sums. arguments: of `$sums` on; the same in all threads of a descriptor."""
    registers = [*arguments[:sums], *arguments]
    lower = {}
    for name, at, upper in re.findall(r"mov\.b64 d(\d), \{\$(\d+), (\d+)\};", text):
        assert len(registers[int(at)].unique()) == 1, "a descriptor is one for all threads"
        lower[name] = int(registers[int(at)][0]) | int(upper) << 32
    pattern = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.s32\.s8\.s8 \{(.*?)\}, \{(.*?)\}, d(\d), p;"
    for columns, c, a, name in re.findall(pattern, text):
        of_c, of_a = ([int(each[1:]) for each in list_.split(", ")] for list_ in (c, a))
        product = a_matrix([registers[each] for each in of_a]) @ b_matrix(memory, lower[name], int(columns))
        for index, value in zip(of_c, add_product([registers[each] for each in of_c], product), strict=True):
            registers[index] = value
    return registers[:sums]


@pytest.mark.parametrize(("step_bits", "suffix_bits"), [(3, 13), (4, 13), (6, 13), (7, 15), (12, 12)])
@pytest.mark.parametrize("rows", [8, 16])
def test_sums_are_exact(rows: int, step_bits: int, suffix_bits: int) -> None:
    """Four block rows by three column blocks, the codes in each warp's registers as the kernel decodes them, the operand as it copies it.

    Activations are multiples of 32, so that projections are whole numbers, and the product of the integer weights is known exactly.
    """
    weight = packed("trellis", 256, 48, [step_bits], suffix_bits)
    window_bits = min(step_bits + suffix_bits, 24)
    windows = ring_windows(weight.codes[0], step_bits, window_bits).long()
    x = 32 * torch.randint(-300, 301, (rows, 48), generator=torch.Generator().manual_seed(1))
    operand = in_cores(pack_operand(x.double(), torch.ones(rows))[0])
    assert operand.shape == (3, 2, 2, rows, 2, 4)
    memory = torch.cat([torch.full((ADDRESS,), 77), operand.flatten().view(torch.int8).long(), torch.full((512,), 77)])

    tiles, words = rows // 4, hash_words(step_bits, window_bits)
    assert len(issue_constraints(tiles, words).split(",")) == 2 * 16 * tiles + 9 * words
    sums = [torch.zeros(128, dtype=torch.int64)] * (16 * tiles)
    of_lanes = windows.reshape(4, 3, 32, 16)
    for block in range(3):
        described = (ADDRESS + block * 128 * rows) // 16 | distance(rows) << 16
        for half in range(2):
            registers = [
                (of_lanes[:, block, :, 4 * quarter + step].flatten() | START) * MULTIPLIERS[index] & 0xFFFFFFFF
                for quarter in (2 * half, 2 * half + 1)
                for index in range(words)
                for step in range(4)
            ]
            descriptors = [torch.full((128,), described + 4 * rows * index) for index in range(words)]
            sums = run(issue(tiles, words, half), [*sums, *registers, *descriptors], 16 * tiles, memory)

    found = torch.zeros(256, rows, dtype=torch.int64)
    for quarter in range(4):
        for tile in range(tiles):
            for half in range(2):
                at = 4 * (quarter * tiles + tile) + 2 * half
                found[64 * WARP + 16 * quarter + 8 * half + GROUP, 4 * tile + IN_GROUP] = 256 * sums[at] + sums[at + 1]
    decoded = from_blocks(decode_windows(windows, step_bits, window_bits).flatten(2)).long()
    assert torch.equal(SCALE * found, decoded @ x.T)
    assert (found.abs() > 1 << 16).any() and (memory[ADDRESS:-512].abs() > 64).any(), "the comparison means something"


def written(line: str) -> set[int]:
    """Registers that an instruction other than a product writes: those from its first operand on."""
    name, _, operands = re.sub(r"^@\S+\s+", "", line).partition(" ")
    found = re.match(r"R(\d+)", operands.strip())
    wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(int(found[1]), int(found[1]) + wide)) if found else set()


def touched_under_way(lines: list[str]) -> list[str]:
    """Instructions of a loop that write what products under way read or add to, or that read their sums."""
    groups: list[tuple[set[int], set[int]]] = [(set(), set())]  # registers of A, and sums; the last is not committed yet
    wrong = []
    for line in lines * 2:
        product = re.match(r"IGMMA\S+ R(\d+), R(\d+), gdesc\[UR\d+\], R(\d+)", line)
        if product:
            sums, a, same = map(int, product.groups())
            assert sums == same
            groups[-1][0].update(range(a, a + 4))
            groups[-1][1].update(range(sums, sums + 8))
            if "gsb0" in line:
                groups.append((set(), set()))
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)", line):
            groups = groups[-1 - int(wait[1], 16) :]
        else:
            reads = {int(each) for each in re.findall(r"\bR(\d+)", line)}
            busy, sums_under_way = set().union(*(each[0] | each[1] for each in groups)), set().union(*(each[1] for each in groups))
            if written(line) & busy or reads & sums_under_way:
                wrong.append(line)
    return wrong


@pytest.mark.parametrize("step_bits", [(6,), (4, 7)], ids=str)
def test_products_overlap_and_each_word_is_multiplied_once(step_bits: tuple[int, ...]) -> None:
    """A turn is two blocks. If the assembler could not see that nothing touches what is under way, it would wait for each product."""
    used, lines = usage(by_warpgroup(*step_bits)), turn(by_warpgroup(*step_bits), "IGMMA")
    counts, words = opcodes(lines), hash_words(step_bits[0], step_bits[0] + 13)
    assert used.registers <= fused.REGISTERS and used.stack <= 8 and counts["STL"] == counts["LDL"] == 0
    products = [line for line in lines if line.startswith("IGMMA")]
    assert len(products) == 2 * 4 * words and all(line.startswith("IGMMA.64x16x32.S8.S8") for line in products)
    assert sum("gsb0" in line for line in products) == 4, "one group for each half block"
    waits = [line for line in lines if line.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 4 and all(line.split()[-1] == "0x1" for line in waits), "all but the last group"
    assert not touched_under_way(lines)
    assert counts["R2UR"] <= 4, "descriptors are made in uniform registers"
    assert counts["IMMA"] == counts["I2F"] == counts["PRMT"] == counts["LDG"] == 0
    assert 32 <= counts["LOP3"] <= 38 and 32 * words <= counts["IMAD"] <= 32 * words + 24


def test_shared_memory_is_what_the_plan_takes_it_for() -> None:
    cut = fused.Plan(4, 2, (1,), 32768, fused.STAGES, fused.REGISTERS, Product.WGMMA, Finish.TOGETHER)
    assert by_warpgroup(6).metadata.shared == fused.program_bytes(cut, 6, 8)


def test_no_plan_chooses_it() -> None:
    for rows in (1, 2, 4, 8, 16):
        for block_rows in (16, 64, 448):
            cut = fused.plan(block_rows, (256,), (2,), rows, 132)
            assert cut.product is Product.MMA and not cut.finish.wide


def test_refuses_an_operand_in_another_order() -> None:
    weight = packed("trellis", 64, 32, [6])
    cut = replace(fused.plan(1, (2,), (2,), 8, 132), product=Product.WGMMA)
    words, scales = pack_operand(torch.ones(8, 32))
    rest = (scales, weight.codes, weight.scales, None, weight.quantizers, 64, torch.bfloat16)
    with pytest.raises(KernelError, match=r"\(2, 8, 2, 4, 2, 2\), required \(column_blocks, 2, 2, 4, 2, 4\) for wgmma"):
        fused.multiply(words, *rest, cut)
    with pytest.raises(KernelError, match=r"\(2, 2, 2, 8, 2, 4\), required .* for mma"):
        fused.multiply(in_cores(words), *rest, replace(cut, product=Product.MMA))
    few, few_scales = pack_operand(torch.ones(3, 32))
    with pytest.raises(KernelError, match=r"operand_rows=4 must be one of \(8, 16\)"):
        fused.multiply(in_cores(few), few_scales, *rest[1:], cut)
