"""Every kernel compiles for the GPUs that we name, without spilling registers. No GPU is needed."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

from qpc.kernels import attention, epilogue, gpu, hadamard, viterbi
from qpc.kernels.code import NO_CODE, Code
from tests.kernels.compiling import ARCHITECTURES, compile_kernel, instructions, usage

Case = tuple[str, Any, dict[str, str], dict[str, Any], int]
"""Name, kernel, types of arguments, constants, warps."""

PLAIN = {"HAS_BIAS": False, "bias": None, "SPLIT": False}


def trellis(step_bits: int, window_bits: int = 16) -> Code:
    return Code(step_bits, window_bits, 2, 0.007)


def table(bits: int, dimension: int) -> Code:
    return Code(bits, 0, dimension, 1.0)


def tables(codes: tuple[Code, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the tables that there are, and None for those that there are not."""
    kind = "*fp16" if codes[0].dimension == 1 else "*i32"
    present = {f"table_{i}": kind for i, code in enumerate(codes) if code.bits and not code.window_bits}
    return present, {f"table_{i}": None for i in range(len(codes)) if f"table_{i}" not in present}


WALK = {"values": "*fp32", "cells": "*i32", "table": "*u16", "history": "*u16", "joint": "*i32", "symbols": "*i32"}


def vector(first: Code, second: Code, batch: int, warps: int) -> Case:
    present, absent = tables((first, second))
    types = {"x": "*bf16", "codes_0": "*i32", "codes_1": "*i32", "scales": "*bf16", "out": "*bf16", **present}
    constants = {
        "BITS_0": first.bits, "BITS_1": second.bits, "WINDOW_BITS_0": first.window_bits, "WINDOW_BITS_1": second.window_bits,
        "UNIT_0": first.unit, "UNIT_1": second.unit, "DIMENSION": first.dimension, "BATCH": batch, "LANES": 32 * warps, **PLAIN, **absent,
    }  # fmt: skip
    return f"vector {first} {second} batch {batch}", gpu._vector_kernel, types, constants, warps


def rotation(base: int, power: int, members: int, warps: int) -> Case:
    types = {"x": "*bf16", "signs": "*u8", "matrix": "*i8", "out": "*bf16", "norm": "fp32"}
    constants = {"BASE": base, "POWER": power, "STAGES": power.bit_length() - 1, "MEMBERS": members}
    return f"rotation {base} x {power}", hadamard._rotate_kernel, types, constants, warps


def walk(suffix_bits: int, slots: int, words: int) -> Case:
    constants = {"SUFFIX_BITS": suffix_bits, "SLOTS": slots, "WORDS": words}
    return (
        f"walk of 2^{suffix_bits} suffixes, {slots} slots, {words} words",
        viterbi._walk_kernel,
        WALK,
        constants,
        viterbi.walk_warps(suffix_bits),
    )


def attend(width: int, group: int, rope: bool) -> Case:
    """As on GPUs that launch kernels one after another; the other is `test_attention_that_is_launched_early_compiles`."""
    names = "q k v keys values cos sin out"
    types = {name: "*bf16" for name in names.split()} | {"position": "*i64", "starts": "*i64", "scale": "fp32"}
    constants = {
        "HEADS": 8, "GROUP": group, "ROWS": 16, "WIDTH": width, "SPLITS": 32, "BLOCK": attention.BLOCK, "ROPE": rope,
        "PRECISION": "tf32", "PDL": False, "AHEAD": False,
    }  # fmt: skip
    kernel = attention._attention_kernel
    return f"attention of heads of {width}", kernel, types | {"partial": "*fp32", "counters": "*i32"}, constants, 4


TRACE: Case = ("trace", viterbi._trace_kernel, WALK, {}, 1)


SPLITS = {"partial": "*fp32", "scales": "*bf16", "bias": "*bf16", "out": "*bf16"}

KERNELS: list[Case] = [
    vector(trellis(6), NO_CODE, 1, 8),
    vector(trellis(11, 24), trellis(12, 24), 4, 16),
    vector(table(3, 1), table(8, 1), 4, 16),
    vector(table(7, 2), NO_CODE, 2, 16),
    vector(table(11, 4), table(12, 4), 4, 16),
    ("sum of splits", epilogue._sum_splits_kernel, SPLITS, {"SPLITS": 8, "HAS_BIAS": True, "BLOCK": 256}, 4),
    *(rotation(*each) for each in ((1, 4096, 1, 16), (28, 512, 2, 4), (1, 32768, 1, 16))),
    *(walk(*each) for each in ((9, 8, 1), (13, 4, 1), (13, 8, 2))),
    TRACE,
    *(attend(*each) for each in ((64, 3, True), (128, 4, True), (256, 1, False))),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "types", "constants", "warps"), [each[1:] for each in KERNELS], ids=[each[0] for each in KERNELS])
def test_compiles_without_spills(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, architecture: int) -> None:
    compiled = compile_kernel(kernel, types, constants, architecture, warps)
    used = usage(compiled)
    assert used.stack == 0, used
    assert used.registers * warps * 32 <= 65536, used
    assert used.shared <= 96 * 1024, used
    assert len(instructions(compiled)) > 10


@pytest.mark.parametrize(("block", "warps", "ahead"), [(attention.BLOCK, 4, False), (attention.BLOCK, 4, True), (128, 8, True)])
def test_attention_that_is_launched_early_compiles(block: int, warps: int, ahead: bool) -> None:
    """It waits for the kernel before; what a plan reads ahead comes before the wait, and queries come after it."""
    _, kernel, types, constants, _ = attend(128, 4, True)
    compiled = compile_kernel(kernel, types, constants | {"PDL": True, "AHEAD": ahead, "BLOCK": block}, 90, warps)
    assert usage(compiled).stack == 0
    lines = instructions(compiled)
    (wait,) = (index for index, each in enumerate(lines) if "ACQBULK" in each)
    loads = [sum("LDG" in each for each in part) for part in (lines[:wait], lines[wait:])]
    assert (loads[0] >= 2 * block * 128 * 2 // (16 * 32 * warps)) if ahead else loads[0] == 0
    assert loads[1] > 0
