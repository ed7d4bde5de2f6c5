"""The kernels that write operands: how they are cut, and what their machine code is. They run in `benchmarks check`."""

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
from qpc.quant.hadamard import block_size
from tests.kernels.compiling import ARCHITECTURES, compile_kernel, usage
from tests.kernels.operand_cases import WIDTHS

TYPES = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "signs": "*u8", "matrix": "*fp32", "hidden": "*bf16", "words": "*i32"}
TYPES |= {"scales": "*fp32", "eps": "fp32", "offset": "fp32", "crest": "fp32"}
BARE, NORM = {"NORM": False, "RESIDUAL": False, "weight": None, "residual": None}, {"NORM": True, "RESIDUAL": True}


def with_layouts(cut: transform_hopper.Cut, norm: bool) -> Any:
    """The kernel with explicit layouts for sm_90."""
    kernel = transform_hopper.transform_kernel
    constants = {"CREST": 8.0, "OUTER": cut.outer, "POWER": cut.power, "MEMBERS": cut.members, "VECTOR": cut.vector, "WARPS": cut.warps}
    constants |= {"PDL": True, **(NORM if norm else BARE)}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    aligned = ("features", "x_stride", "residual_stride")
    names = enumerate(kernel.arg_names)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in names if signature[name].startswith("*") or name in aligned}
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": cut.warps})


@pytest.mark.parametrize("norm", [False, True], ids=["rotation", "behind a norm"])
@pytest.mark.parametrize("features", WIDTHS[::2])
def test_layouts_hold_a_row_in_registers(features: int, norm: bool) -> None:
    cut = transform_hopper.cut(features, features, norm)
    if cut is None:
        assert norm and features in (14336, 28672), "wide rows behind a norm, and narrow inner factors"
        return
    used = usage(with_layouts(cut, norm))
    assert used.stack == 0 and used.shared <= 48 << 10, used


@given(st.integers(1, 1 << 16), st.booleans())
def test_cuts_cover_a_block(features: int, norm: bool) -> None:
    cut = transform_hopper.cut(features, block_size(features), norm)
    if cut is not None:
        assert cut.outer * cut.power == features and cut.power == 32 * cut.vector * cut.warps and cut.vector in transform_hopper.VECTORS
        assert (cut.programs - 1) * cut.members < cut.outer <= cut.programs * cut.members
        assert cut.members * cut.power >= 64 * cut.warps**2, "the exchange between warps has values enough"


def test_rows_of_several_blocks_take_another_way() -> None:
    assert transform_hopper.cut(4096, 256, norm=False) is None and transform.plan(4096, 256) is None


@pytest.mark.parametrize(
    ("features", "norm", "architecture"), [*product((320, 6144), (False, True), ARCHITECTURES), (14336, True, 90)], ids=str
)
def test_plain_kernel_spills_nothing(features: int, norm: bool, architecture: int) -> None:
    """Of narrow and wide inner factors. Triton takes the square of the rows of the outer factor in time: one case has many of them, 28."""
    plan = transform.plan(features, features)
    assert plan is not None
    constants = {"OUTER": plan.outer, "POWER": plan.power, "STAGES": plan.power.bit_length() - 1, "MEMBERS": plan.members}
    constants |= {"PEAK_SCALE": False, "PDL": False, **(NORM if norm else BARE)}
    assert usage(compile_kernel(transform._transform_kernel, TYPES, constants, architecture, plan.warps)).stack == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [32, transform.PACK_CHUNK])
def test_packing_spills_nothing(chunk: int, architecture: int) -> None:
    warps = max(1, chunk // 256)
    assert usage(compile_kernel(transform._pack_kernel, TYPES, {"CHUNK": chunk}, architecture, warps)).stack == 0
