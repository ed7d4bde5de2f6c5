"""The kernels that write operands: how they are cut, and what their machine code is. They run in `benchmarks check`."""

import re
from itertools import product
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from qpc.kernels import transform, transform_hopper
from qpc.kernels.gate import Activation
from qpc.quant.hadamard import block_size
from tests.kernels.compiling import ARCHITECTURES, compile_kernel, instructions, usage
from tests.kernels.operand_cases import WIDTHS

TYPES = {"x": "*bf16", "second": "*bf16", "weight": "*bf16", "signs": "*u8", "matrix": "*fp32", "hidden": "*bf16", "words": "*i32"}
TYPES |= {"scales": "*fp32", "eps": "fp32", "offset": "fp32", "crest": "fp32"}
BARE = {"NORM": False, "RESIDUAL": False, "ACTIVATION": None, "weight": None}
FRONTS: dict[str, dict[str, Any]] = {
    "rotation": BARE | {"second": None},
    "behind a norm": {"NORM": True, "RESIDUAL": True, "ACTIVATION": None},
    **{f"behind a gate by {kind}": BARE | {"ACTIVATION": kind.value} for kind in Activation},
}


def with_layouts(cut: transform_hopper.Cut, front: dict[str, Any], dtype: str) -> Any:
    """The kernel with explicit layouts for sm_90."""
    kernel = transform_hopper.transform_kernel
    constants = {"CREST": 8.0, "OUTER": cut.outer, "POWER": cut.power, "MEMBERS": cut.members, "VECTOR": cut.vector, "WARPS": cut.warps}
    constants |= {"PDL": True, **front}
    types = {name: kind.replace("bf16", dtype) for name, kind in TYPES.items()}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = ("features", "x_stride", "second_stride")
    names = enumerate(kernel.arg_names)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in names if signature[name].startswith("*") or name in aligned}
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": cut.warps})


def cut_of(features: int, front: str) -> transform_hopper.Cut | None:
    return transform_hopper.cut(features, block_size(features), FRONTS[front]["NORM"], FRONTS[front]["ACTIVATION"] is not None)


@pytest.mark.parametrize(
    ("features", "front"),
    [(features, front) for features in WIDTHS[::2] for front in FRONTS if "gelu" not in front or features in (5120, 28672)],
)
def test_layouts_hold_a_row_in_registers(features: int, front: str) -> None:
    cut = cut_of(features, front)
    if cut is None:
        assert front == "behind a norm" and features in (14336, 28672), "wide rows behind a norm, and narrow inner factors"
        return
    used = usage(with_layouts(cut, FRONTS[front], "bf16"))
    assert used.stack == 0 and used.shared <= 48 << 10, used


@pytest.mark.parametrize(("features", "dtype"), [(9216, "bf16"), (14336, "fp16"), (16384, "bf16")])
def test_what_is_gated_is_read_along_with_its_gate(features: int, dtype: str) -> None:
    """Whole vectors of both, two special functions a value, and two roundings of each two values; no spill, where most is held."""
    cut = cut_of(features, "behind a gate by silu")
    assert cut is not None
    compiled = with_layouts(cut, FRONTS["behind a gate by silu"], dtype)
    assert usage(compiled).stack == 0
    code = instructions(compiled)
    patterns = ("MUFU.EX2", "MUFU.RCP", rf"LDG.E.{16 * cut.vector}\b", "F2FP", r"HMUL2|HFMA2.*, -RZ\s*$")
    found = [sum(re.search(pattern, line) is not None for line in code) for pattern in patterns]
    values = cut.outer * cut.vector
    assert found[:2] == [values, values] and found[2] >= 2 * cut.outer and min(found[3:]) >= values // 2, found


@given(st.integers(1, 1 << 16), st.sampled_from(list(FRONTS)))
def test_cuts_cover_a_block(features: int, front: str) -> None:
    cut = cut_of(features, front)
    if cut is not None:
        assert cut.outer * cut.power == features and cut.power == 32 * cut.vector * cut.warps and cut.vector in transform_hopper.VECTORS
        assert (cut.programs - 1) * cut.members < cut.outer <= cut.programs * cut.members
        assert cut.members * cut.power >= 64 * cut.warps**2, "the exchange between warps has values enough"
    if front.startswith("behind a gate"):
        assert (cut is None) == (cut_of(features, "rotation") is None), "a gate does not make a row take another way"


def test_rows_of_several_blocks_take_another_way() -> None:
    assert transform_hopper.cut(4096, 256, norm=False) is None and transform.plan(4096, 256) is None


WIDTHS = product((320, 6144, 14336), ("rotation", "behind a norm"), ARCHITECTURES)
"""Narrow and wide inner factors, few and many rows of the outer one; Triton takes the square of those in time."""


@pytest.mark.parametrize(
    ("features", "front", "architecture"),
    [*WIDTHS, *product((1536,), ("behind a gate by silu",), ARCHITECTURES)],
    ids=str,
)
def test_plain_kernel_spills_nothing(features: int, front: str, architecture: int) -> None:
    plan = transform.plan(features, features)
    assert plan is not None
    constants = {"OUTER": plan.outer, "POWER": plan.power, "STAGES": plan.power.bit_length() - 1, "MEMBERS": plan.members}
    constants |= {"PEAK_SCALE": False, "PDL": False, **FRONTS[front]}
    assert usage(compile_kernel(transform._transform_kernel, TYPES, constants, architecture, plan.warps)).stack == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [32, transform.PACK_CHUNK])
def test_packing_spills_nothing(chunk: int, architecture: int) -> None:
    warps = max(1, chunk // 256)
    assert usage(compile_kernel(transform._pack_kernel, TYPES, {"CHUNK": chunk}, architecture, warps)).stack == 0
