"""Machine instructions per weight of the ring-order kernel, counted from the code compiled for Hopper. Needs no GPU."""
# mypy: allow-untyped-calls

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.experimental.gluon._runtime import GluonASTSource  # type: ignore[import-untyped]

from benchmarks.studies.ring_kernel import Code, Order, multiply

HOPPER = GPUTarget("cuda", 90, 32)
WEIGHTS_PER_TENSOR_OP = 16 * 16 // 32
"""Weights that a lane decodes for one `mma.m16n8k16`."""

KINDS = {
    "logic": ("LOP3", "SGXT"),
    "shift": ("SHF",),
    "permute": ("PRMT",),
    "multiply_add": ("IMAD",),
    "half_add": ("HADD2", "HFMA2"),
    "load": ("LDG",),
    "tensor": ("HMMA",),
}
"""Kinds by the first part of the opcode. IMAD.MOV and IMAD.SHL, which move and shift on the multipliers, count as `move`."""

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;/]*);")


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS. address: in bytes; operands: as printed."""

    address: int
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        if self.opcode.startswith(("IMAD.MOV", "IMAD.SHL", "IMAD.U32", "MOV")):
            return "move"
        return next((kind for kind, names in KINDS.items() if self.opcode.split(".")[0] in names), "other")


def compile_for_hopper(
    order: Order, step_bits: int, window_bits: int, batch: int = 8, code: Code = Code.SUM, depth: int = 1, ahead: int = 1, warps: int = 4
) -> bytes:
    """The kernel of one variant as a cubin for compute capability 9.0; arguments as of `ring_kernel.multiply`."""
    constants = {
        "ORDER": int(order), "STEP_BITS": step_bits, "WINDOW_BITS": window_bits, "BATCH": batch, "CODE": int(code), "DEPTH": depth,
        "AHEAD": ahead, "WARPS": warps,
    }  # fmt: skip
    pointers = {"codes": "*i32", "halves": "*i16", "x": "*i64", "out": "*fp32"}
    signature = {**pointers, "columns": "i32", "steps": "i32", **dict.fromkeys(constants, "constexpr")}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    source = GluonASTSource(multiply, signature, constants, aligned)
    cubin: bytes = triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["cubin"]
    return cubin


def disassemble(cubin: bytes) -> list[Instruction]:
    """All instructions of a cubin, by the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-sass", path], capture_output=True, text=True, check=True).stdout
    return [Instruction(int(address, 16), opcode, operands) for address, opcode, operands in _INSTRUCTION.findall(text)]


def spills(instructions: list[Instruction]) -> int:
    """Loads and stores of local memory: none where every value stays in a register."""
    return sum(each.opcode.startswith(("LDL", "STL")) for each in instructions)


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions of the loop that holds the most tensor operations: from the target of its backward branch to the branch."""
    loops = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)", branch.operands)
        if branch.opcode == "BRA" and target and int(target[1], 16) < branch.address:
            loops.append([each for each in instructions if int(target[1], 16) <= each.address <= branch.address])
    return max(loops, key=lambda loop: sum(each.kind == "tensor" for each in loop))


def count(order: Order, step_bits: int, window_bits: int, code: Code = Code.SUM, depth: int = 1, ahead: int = 1) -> dict[str, object]:
    """One row: instructions per weight in the main loop, in all and by kind; spills of the whole kernel."""
    instructions = disassemble(compile_for_hopper(order, step_bits, window_bits, code=code, depth=depth, ahead=ahead))
    loop = main_loop(instructions)
    kinds = Counter(each.kind for each in loop)
    weights = WEIGHTS_PER_TENSOR_OP * kinds["tensor"]
    return {
        "variant": order.name.lower(), "rate": step_bits / 2, "window_bits": window_bits, "code": code.name.lower(), "depth": depth,
        "ahead": ahead, "spills": spills(instructions), "per_weight": round(len(loop) / weights, 2),
        **{kind: round(kinds[kind] / weights, 3) for kind in (*KINDS, "move", "other")},
    }  # fmt: skip


def rows() -> Iterator[dict[str, object]]:
    """Counts of all variants; of `BLOCK` also without a mask (windows of 32 bits) and with the shifted multiplier in its place."""
    for window_bits in (16, 18):
        for order in Order:
            for step_bits in (4, 5, 6, 8) if order is Order.BLOCK else (4, 6, 8):
                yield count(order, step_bits, window_bits)
    for step_bits in (4, 6, 8):
        yield count(Order.BLOCK, step_bits, 32)
        yield count(Order.BLOCK, step_bits, 16, Code.SHIFTED)
    for order in (Order.TILE, Order.BLOCK):
        for depth in (2, 4):
            yield count(order, 6, 16, depth=depth)
    for depth in (1, 2):
        yield count(Order.BLOCK, 6, 16, depth=depth, ahead=2)
    yield count(Order.LANE, 6, 16, ahead=2)
