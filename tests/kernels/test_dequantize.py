"""What decoding to memory compiles to. That it decodes what it should is in `large_batch_cases`. No GPU is needed."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the kernels")

from qpc.kernels import dequantize
from qpc.kernels.code import Code, code_of
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer
from tests.kernels.compiling import compile_kernel, instructions, usage

WARPS = dequantize.COLUMNS // dequantize.COLUMNS_PER_WARP
LANE_WEIGHTS = 64

ONE_WORD, TWO_WORDS, LONG = code_of(TrellisQuantizer(4, 17)), code_of(TrellisQuantizer(6, 19)), code_of(TrellisQuantizer(11, 24))
TABLES = (code_of(ScalarQuantizer(3)), code_of(VectorQuantizer(2, 6)), code_of(VectorQuantizer(4, 7)))
FLOAT16, BFLOAT16 = 1, 2


def compiled(code: Code, architecture: int, halves: int = BFLOAT16) -> Any:
    """The kernel for a weight whose rows are whole lines."""
    types = {"codes": "*i32", "scales": "*bf16", "out": "*i32" if halves else "*bf16"}
    constants = {
        "BITS": code.bits, "WINDOW_BITS": code.window_bits, "DIMENSION": code.dimension, "UNIT": code.unit,
        "COLUMNS": dequantize.COLUMNS, "HALVES": halves,
    }  # fmt: skip
    if code.window_bits:
        constants["table"] = None
    else:
        types["table"] = "*fp16" if code.dimension == 1 else "*i32"
    return compile_kernel(dequantize.dequantize_kernel, types, constants, architecture, WARPS, ("out_stride",))


def opcodes(kernel: Any) -> list[str]:
    """Of all instructions, without predicates and padding."""
    found = [re.sub(r"^@!?U?P\w+\s+", "", each).split()[0] for each in instructions(kernel)]
    return [each for each in found if each != "NOP"]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("code", "most"), [(ONE_WORD, 8.0), (TWO_WORDS, 10.0), (LONG, 10.0)], ids=str)
def test_instructions_of_a_weight(code: Code, most: float, architecture: int) -> None:
    """Few enough that memory is what takes the time, registers for seven programs of a multiprocessor, and no spills."""
    kernel = compiled(code, architecture)
    used = usage(kernel)
    assert used.stack == 0 and used.registers <= 72 and used.shared <= 8 << 10, used
    assert len(opcodes(kernel)) / LANE_WEIGHTS <= most


@pytest.mark.parametrize("halves", [0, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("code", [TWO_WORDS, *TABLES], ids=str)
def test_weights_are_stored_16_bytes_at_a_time(code: Code, halves: int) -> None:
    kernel = compiled(code, 90, halves)
    stores = [each for each in opcodes(kernel) if each.startswith("STG")]
    assert stores == ["STG.E.128"] * (2 * LANE_WEIGHTS // 16)
    assert usage(kernel).stack == 0


@pytest.mark.parametrize(("code", "words"), [(ONE_WORD, 1), (TWO_WORDS, 2)], ids=str)
def test_bytes_of_a_window_are_added_by_dot_products(code: Code, words: int) -> None:
    """One for each word and weight, and nothing is converted from integers."""
    found = opcodes(compiled(code, 90))
    assert sum(each.startswith("IDP") for each in found) == words * LANE_WEIGHTS
    assert not any(each.startswith(("I2F", "LDL", "STL")) for each in found)
    assert sum(each.startswith("F2FP.BF16") for each in found) == LANE_WEIGHTS // 2


def test_a_lifted_sum_times_a_cut_scale_is_exact() -> None:
    """Neither the bits of the lifted sum nor the number that the multiply-add takes off are rounded in float32."""
    lift = dequantize._LIFT.value
    assert torch.tensor(lift).view(torch.int32).item() == dequantize._LIFT_BITS.value
    sums = torch.tensor([-20736, -4096, -1, 0, 1, 777, 20736], dtype=torch.int32)
    assert torch.equal((sums + dequantize._LIFT_BITS.value).view(torch.float32).double(), lift + sums.double())
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    cut = (scales.view(torch.int32) & -4).view(torch.float32)
    assert torch.equal((lift * cut).double(), lift * cut.double())
    assert ((cut.double() / scales.double() - 1).abs() <= 2**-21).all()
    assert not torch.equal((lift * scales).double(), lift * scales.double()), "the cut is needed"
