"""The ring-order study compiles for Hopper without a GPU."""

import pytest

pytest.importorskip("triton.experimental.gluon")

from benchmarks.studies import sass
from benchmarks.studies.ring_kernel import Order


def test_the_block_order_keeps_every_value_in_a_register() -> None:
    instructions = sass.disassemble(sass.compile_for_hopper(Order.BLOCK, step_bits=6, window_bits=16))
    assert sass.spills(instructions) == 0
    loop = sass.main_loop(instructions)
    kinds = [each.kind for each in loop]
    assert kinds.count("tensor") == 4
    assert kinds.count("half_add") == 16, "one addition per window"
    assert not any(each.opcode.startswith(("SHFL", "LDS", "STS", "BAR")) for each in loop), "no weight moves between lanes"
    opcodes = [each.opcode.split(".")[0] for each in instructions]
    assert "SHFL" not in opcodes and opcodes.count("BAR") == 1, "the sums of the warps change hands once"
