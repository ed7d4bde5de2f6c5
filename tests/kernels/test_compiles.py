"""Every kernel compiles for the GPUs that we name, without spilling registers. No GPU is needed."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

from qpc.kernels import epilogue, hadamard, scalar, trellis, viterbi
from tests.kernels.compiling import ARCHITECTURES, compile_kernel, instructions, usage

Case = tuple[str, Any, dict[str, str], dict[str, Any], int]
"""Name, kernel, types of arguments, constants, warps."""

LINEAR = {"codes_0": "*i32", "codes_1": "*i32", "levels_0": "*fp32", "levels_1": "*fp32", "scales": "*bf16"}
PLAIN = {"HAS_BIAS": False, "bias": None, "SPLIT": False}


def trellis_constants(bits: tuple[int, int], **more: Any) -> dict[str, Any]:
    units = {"UNIT_0": 0.007, "UNIT_1": 0.007}
    return {"STEP_BITS_0": bits[0], "STEP_BITS_1": bits[1], "WINDOW_BITS": 16, **units, **PLAIN, **more}


def scalar_constants(bits: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"BITS_0": bits[0], "BITS_1": bits[1], **PLAIN, **more}


def activations(name: str) -> dict[str, str]:
    return {**LINEAR, "x": name, "out": name}


WALK = {"values": "*fp32", "history": "*fp32", "joint": "*i32", "symbols": "*i32"}


def vector(bits: tuple[int, int], batch: int, warps: int) -> Case:
    constants = trellis_constants(bits, BATCH=batch, LANES=32 * warps)
    return f"trellis vector {bits} batch {batch}", trellis._vector_kernel, activations("*bf16"), constants, warps


def rotation(base: int, power: int, members: int, warps: int) -> Case:
    types = {"x": "*bf16", "signs": "*u8", "matrix": "*i8", "out": "*bf16", "norm": "fp32"}
    constants = {"BASE": base, "POWER": power, "STAGES": power.bit_length() - 1, "MEMBERS": members}
    return f"rotation {base} x {power}", hadamard._rotate_kernel, types, constants, warps


def walk(step_bits: int, window_bits: int) -> Case:
    shape = {**viterbi.walk_shape(step_bits, window_bits), "RINGS": viterbi.RINGS}
    constants = {"STEP_BITS": step_bits, "WINDOW_BITS": window_bits, "FREE": False, **shape}
    return f"walk {step_bits} of {window_bits}", viterbi._forward_kernel, WALK, constants, viterbi.walk_warps(step_bits, window_bits)


def trace(step_bits: int, window_bits: int, free: bool) -> Case:
    constants = {"STEP_BITS": step_bits, "WINDOW_BITS": window_bits, "FREE": free}
    return f"trace {step_bits} of {window_bits}", viterbi._trace_kernel, WALK, constants, 1


DECODED = {"codes": "*i32", "levels": "*fp32", "scales": "*bf16", "out": "*bf16"}
SPLITS = {"partial": "*fp32", "scales": "*bf16", "bias": "*bf16", "out": "*bf16"}
TRELLIS_DECODE = {"STEP_BITS": 6, "WINDOW_BITS": 16, "UNIT": 0.007, "COLUMNS": 8}

KERNELS: list[Case] = [
    *(vector(*each) for each in (((6, 0), 1, 8), ((11, 12), 1, 16), ((7, 0), 4, 16))),
    ("trellis dequantize", trellis._dequantize_kernel, DECODED, TRELLIS_DECODE, 4),
    ("scalar vector", scalar._vector_kernel, activations("*bf16"), scalar_constants((3, 8), BATCH=1, LANES=512), 16),
    ("scalar vector batch 4", scalar._vector_kernel, activations("*bf16"), scalar_constants((3, 8), BATCH=4, LANES=512), 16),
    ("scalar dequantize", scalar._dequantize_kernel, DECODED, {"BITS": 3, "COLUMNS": 8}, 4),
    ("sum of splits", epilogue._sum_splits_kernel, SPLITS, {"SPLITS": 8, "HAS_BIAS": True, "BLOCK": 256}, 4),
    *(rotation(*each) for each in ((1, 4096, 1, 16), (28, 512, 2, 4), (1, 32768, 1, 16))),
    *(walk(*each) for each in ((3, 20), (4, 16), (6, 16), (12, 16))),
    *(trace(*each) for each in ((3, 20, True), (8, 16, False), (12, 16, True))),
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
