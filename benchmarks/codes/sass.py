"""Counts the machine instructions that decode a pair of weights on sm_90, from compiled SASS; needs no GPU."""
# mypy: allow-untyped-defs, allow-untyped-decorators

import re
from collections import Counter
from dataclasses import dataclass

import triton
import triton.language as tl

from benchmarks.codes.candidates import Code
from tests.kernels.compiling import compile_kernel, instructions

ARCHITECTURE = 90
THREADS = 128
WORDS = (16, 8)
"""Words of a thread in the two kernels whose difference is counted."""

LOGIC = {"LOP3", "SHF", "PRMT", "IADD3", "SGXT", "VIADD", "LEA", "I2FP", "SEL", "HMNMX2"}
"""Opcodes of the integer and logic pipe: two clocks for a warp instruction on one of the four sub-partitions, measured on an H100."""

INTEGER_MULTIPLY = {"IMAD", "IDP"}
"""Opcodes of the pipe of integer multiplications: two clocks, and four for IMAD.HI, both measured on an H100; IMAD.WIDE is taken for the
like of IMAD.HI. What is in neither list, such as FFMA and HADD2, takes one clock, which is that of its issue."""

ISSUE_CLOCKS, WORD_CLOCKS = 1.09, 1.3
"""What an instruction takes of a sub-partition's clocks, and what a word takes in an integer wgmma that reads it from registers (5.2 for
four words of a thread): measured on an H100. A word of two halves is taken for the like of one of bytes."""

IDLE = {"NOP", "MOV", "IMAD.MOV"}
"""Opcodes that are not counted."""


@triton.jit
def _decode_kernel(words, out, CODE: tl.constexpr, WORDS: tl.constexpr, REGISTERS: tl.constexpr):
    lanes = tl.arange(0, WORDS)
    word = tl.load(words + lanes)
    if REGISTERS == 1:
        tl.store(out + lanes, tl.inline_asm_elementwise(CODE, "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1))
    elif REGISTERS == 2:
        u, v = tl.inline_asm_elementwise(CODE, "=&r,=&r,r", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)
        tl.store(out + lanes, u)
        tl.store(out + WORDS + lanes, v)
    else:
        types: tl.constexpr = (tl.uint32, tl.uint32, tl.uint32)
        u, v, w = tl.inline_asm_elementwise(CODE, "=&r,=&r,=&r,r", [word], dtype=types, is_pure=True, pack=1)
        tl.store(out + lanes, u)
        tl.store(out + WORDS + lanes, v)
        tl.store(out + 2 * WORDS + lanes, w)


@dataclass(frozen=True)
class DecodeCost:
    """For one pair of weights of a warp, with one funnel shift that extracts the window."""

    instructions: float
    logic_clocks: float
    """Clocks of the integer and logic pipe."""
    multiply_clocks: float
    """Clocks of the pipe of integer multiplications."""
    words: int
    """Registers that go to the tensor core."""

    @property
    def clocks(self) -> float:
        """Clocks of issue with the products, or of the logic or the multiply pipe if it is busier."""
        return max(ISSUE_CLOCKS * self.instructions + WORD_CLOCKS * self.words, self.logic_clocks, self.multiply_clocks)


def opcodes(ptx: str, words: int, registers: int = 1) -> Counter[str]:
    """Count the opcodes of the kernel that applies `ptx` to `words` words of a thread; of the modifiers only HI, WIDE and MOV stay."""
    types, constants = {"words": "*u32", "out": "*u32"}, {"CODE": "{" + ptx + "}", "WORDS": THREADS * words, "REGISTERS": registers}
    compiled = compile_kernel(_decode_kernel, types, constants, ARCHITECTURE)
    found = (re.match(r"(?:@\S+\s+)?([A-Z]\w*)(\S*)", line) for line in instructions(compiled))
    return Counter(
        match[1] + "".join(part for part in (".HI", ".WIDE", ".MOV") if part + "." in match[2] + ".") for match in found if match
    )


def per_word(ptx: str, registers: int) -> dict[str, float]:
    """Opcodes that one more word takes: what is loaded once, such as constants, is not in it.

    Nor are moves: they line registers up for the wide stores of this kernel.
    """
    many, few = (opcodes(ptx, words, registers) for words in WORDS)
    return {name: (many[name] - few[name]) / (WORDS[0] - WORDS[1]) for name in many if name not in IDLE}


def decode_cost(code: Code, window_bits: int) -> DecodeCost:
    """Cost of one pair: what decoding has beyond copying the words, and the funnel shift."""
    counts = per_word(code.ptx(window_bits), code.registers)
    copies = " ".join(f"mov.b32 ${index},${code.registers};" for index in range(code.registers))
    for name, count in per_word(copies, code.registers).items():
        counts[name] = counts.get(name, 0.0) - count
    counts["SHF"] = counts.get("SHF", 0.0) + 1
    heavy = {name: 4 if "." in name else 2 for name in counts if name.split(".")[0] in INTEGER_MULTIPLY}
    return DecodeCost(
        sum(counts.values()),
        2 * sum(count for name, count in counts.items() if name.split(".")[0] in LOGIC),
        sum(clocks * counts[name] for name, clocks in heavy.items()),
        code.registers,
    )
