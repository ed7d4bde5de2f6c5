"""The PTX of the candidate codes, interpreted in numpy: the few instructions they use, as the PTX manual defines them."""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint64]
"""Any shape; a register of 32 bits holds values below 2^32."""

MASK = np.uint64(0xFFFFFFFF)


def run(ptx: str, words: NDArray[np.int64], outputs: int) -> list[NDArray[np.int64]]:
    """What `ptx` leaves in `$0`, `$1`, ... when `$outputs` holds `words`, of which the low 32 bits count.

    words: any shape; the result is `outputs` arrays of that shape, values in [0, 2^32).
    """
    registers: dict[str, Register] = {f"${outputs}": words.astype(np.uint64) & MASK}
    for line in filter(None, (part.strip() for part in ptx.split(";"))):
        opcode, operands = line.split(None, 1)
        if opcode == ".reg":
            continue
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
        part = np.uint64(int(opcode[-2:]) // 2 if opcode.startswith("mov") else 0)
        if target.startswith("{"):
            low, high = target.strip("{}").split(",")
            whole = registers[sources[0]]
            registers[low], registers[high] = whole & (np.uint64(1) << part) - np.uint64(1), whole >> part
        elif sources[0].startswith("{"):
            low, high = sources[0].strip("{}").split(",")
            registers[target] = registers[low] | registers[high] << part
        else:
            values = [registers[each] if each in registers else np.full(words.shape, _literal(each), np.uint64) for each in sources]
            registers[target] = INSTRUCTIONS[opcode](*values)
    return [registers[f"${index}"].astype(np.int64) for index in range(outputs)]


def _literal(text: str) -> int:
    """Bits of an integer, or of a single-precision constant such as `0f3F800000`."""
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0)


def _multiply_high_signed(a: Register, b: Register) -> Register:
    signed = [each.astype(np.uint32).view(np.int32).astype(np.int64) for each in (a, b)]
    return (signed[0] * signed[1] >> 32).astype(np.uint64) & MASK


def _logic(a: Register, b: Register, c: Register, table: Register) -> Register:
    """Bit n of the table is the result where the bits of a, b and c are those of n, a the most significant."""
    result = np.zeros_like(a)
    for row in range(8):
        terms = [each if row >> place & 1 else each ^ MASK for each, place in ((a, 2), (b, 1), (c, 0))]
        if int(table.flat[0]) >> row & 1:
            result |= terms[0] & terms[1] & terms[2]
    return result


def _permute(a: Register, b: Register, selector: Register) -> Register:
    pool, result = a | b << np.uint64(32), np.zeros_like(a)
    for index in range(4):
        digit = int(selector.flat[0]) >> (4 * index) & 0xF
        assert digit < 8, "replication of the sign is not interpreted"
        result |= (pool >> np.uint64(8 * digit) & np.uint64(0xFF)) << np.uint64(8 * index)
    return result


def _on_halves(operation: Callable[..., NDArray[np.float64]]) -> Callable[..., Register]:
    """The operation on either half, rounded once: float64 holds the exact result of what the codes do."""

    def apply(*operands: Register) -> Register:
        exact = [np.ascontiguousarray(each.astype(np.uint32)).view(np.float16).astype(np.float64) for each in operands]
        return operation(*exact).astype(np.float16).view(np.uint32).astype(np.uint64)

    return apply


def _fused_singles(a: Register, b: Register, c: Register) -> Register:
    """Rounded once: float64 holds the exact result of what the codes do."""
    exact = [each.astype(np.uint32).view(np.float32).astype(np.float64) for each in (a, b, c)]
    return (exact[0] * exact[1] + exact[2]).astype(np.float32).view(np.uint32).astype(np.uint64)


INSTRUCTIONS: dict[str, Callable[..., Register]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _logic,
    "prmt.b32": _permute,
    "mul.lo.u32": lambda a, b: a * b & MASK,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "mul.hi.s32": _multiply_high_signed,
    "mul.wide.u32": lambda a, b: a * b,
    "add.rn.f16x2": _on_halves(lambda a, b: a + b),
    "sub.rn.f16x2": _on_halves(lambda a, b: a - b),
    "mul.rn.f16x2": _on_halves(lambda a, b: a * b),
    "fma.rn.f32": _fused_singles,
    "fma.rn.f16x2": _on_halves(lambda a, b, c: a * b + c),
}
"""By opcode; moves to and from a pair in braces are in `run`."""
