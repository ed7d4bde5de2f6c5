"""The multiplication on integer tensor cores, compiled for a GPU that need not be there."""

import re
from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from qpc.kernels import fused
from qpc.kernels.fused import Finish
from qpc.kernels.fused_hopper import fused_kernel
from qpc.kernels.warpgroup import Product
from tests.kernels.compiling import instructions


def compiled(
    *step_bits: int,
    operand_rows: int = 1,
    warpgroups: int = 2,
    depth: int = 4,
    chunk_bytes: int = fused.CHUNK_BYTES,
    bias: bool = False,
    architecture: int = 90,
    product: Product = Product.MMA,
    finish: Finish | None = None,
    kernel: Any = fused_kernel,
    stages: int = fused.STAGES,
) -> Any:
    """The compiled kernel; a second number of bits is that of a second part. finish: by default that of plans for so many rows."""
    finish = finish or (Finish.TOGETHER if operand_rows <= 4 else Finish.BY_FOUR)
    first, second = (*step_bits, 0)[:2]
    constants = {
        "STEP_BITS_0": first, "STEP_BITS_1": second, "WINDOW_BITS_0": min(first + 13, 24), "WINDOW_BITS_1": min(second + 13, 24),
        "UNIT_0": 0.01, "UNIT_1": 0.02, "DEPTH": depth, "STAGES": stages, "CHUNK_BYTES": chunk_bytes, "OPERAND_ROWS": operand_rows,
        "HAS_BIAS": bias, "WARPGROUPS": warpgroups, "BY_WARPGROUP": product is Product.WGMMA, "FINISH_ROWS": finish.rows,
        "VOTES": finish.votes, "WIDE": finish.wide,
    }  # fmt: skip
    types = {"operand": "*i32", "codes_0": "*i32", "codes_1": "*i32", "scales": "*bf16", "bias": "*bf16", "out": "*bf16"}
    types |= {"operand_scales": "*fp32", "workspace": "*fp32"}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4 * warpgroups, "maxnreg": fused.MORE_REGISTERS if operand_rows > 8 or warpgroups == 1 else fused.REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def turn(kernel: Any, product: str) -> list[str]:
    """The instructions of the shortest loop that multiplies, by an instruction of this name."""
    lines, bodies = instructions(kernel), []
    for index, line in enumerate(lines):
        found = re.search(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", line)
        if found and (start := int(found[1], 16) // 16) < index:
            bodies.append(lines[start : index + 1])
    return min((body for body in bodies if any(product in line for line in body)), key=len)


def opcodes(lines: list[str]) -> Counter[str]:
    """How many instructions there are of each name, without what is behind its first point."""
    return Counter(re.sub(r"^@\S+\s+", "", each).split()[0].split(".")[0] for each in lines)
