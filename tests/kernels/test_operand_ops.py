"""The operators of the integer multiplication on the CPU: what they mean, shapes, compilation, and what they refuse."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from qpc.errors import KernelError, QpcError
from qpc.kernels import reference
from qpc.kernels.gate import Activation
from qpc.kernels.operand import operand_rows, projections, unpack_operand
from qpc.kernels.operand_ops import add_norm_operand, gated_operand, norm_operand, operand_linear, pack_rows, rotate_operand
from qpc.quant.layout import column_blocks
from qpc.quant.rotation import Rotation
from tests.kernels.packed import packed, poisoned
from tests.kernels.rounding import settled
from tests.kernels.tolerances import RELATIVE, assert_close, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPS = 1e-5
OPERAND = 1e-4
"""Relative error of a product by an operand: half a step of 1 / 32512 of a row's largest, about 5 of its root mean squares."""


def signs_of(features: int) -> Tensor:
    return torch.randint(0, 256, (Rotation.bytes_for(features),), dtype=torch.uint8, generator=torch.Generator().manual_seed(features))


def assert_operand(operand: tuple[Tensor, Tensor], rotated: Tensor) -> None:
    """Each projection of the rows is within half a step; rotated: float64 [batch, features]."""
    words, scales = operand
    assert words.shape == (column_blocks(rotated.shape[1]), operand_rows(len(rotated)), 2, 4, 2, 2) and scales.shape == (len(rotated),)
    assert ((unpack_operand(words, scales) - projections(rotated)).abs() <= 0.51 * scales.double()[:, None, None]).all()
    assert (scales.double() <= 1e-3 * rotated.abs().amax(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "block"), [(7, 1), (48, 12), (64, 64), (96, 32)])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 8)], ids=str)
def test_operands_are_of_the_rotated_rows(shape: tuple[int, ...], features: int, block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(*shape, features).to(dtype), torch.randn(*shape, features).to(dtype)
    weight, signs = torch.randn(features).to(dtype), signs_of(features)

    def rotated(value: Tensor) -> Tensor:
        return reference.rotate(value.double(), signs, block).reshape(-1, features)

    with poisoned():
        assert_operand(rotate_operand(x, signs, block), rotated(x))
        assert_operand(pack_rows(x), x.double().reshape(-1, features))
        assert_operand(norm_operand(x, weight, EPS, 1.0, signs, block), rotated(reference.rms_norm(x, weight, EPS, 1.0)))
        for kind in Activation:
            gate = settled(x, kind)
            assert_operand(gated_operand(gate, residual, kind.value, signs, block), rotated(reference.gated(gate, residual, kind)))
        words, scales, total = add_norm_operand(x, residual, weight, EPS, 0.0, signs, block)
    assert torch.equal(total, x + residual)
    assert_operand((words, scales), rotated(reference.rms_norm(total, weight, EPS, 0.0)))


@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_gated_is_rounded_as_by_pytorch(dtype: torch.dtype, kind: Activation) -> None:
    """Bit for bit what the operators of a model give one after another, also from ranges of one tensor."""
    both, signs = 3 * torch.randn(3, 2, 192).to(dtype), signs_of(96)
    gate, up = both.chunk(2, -1)
    plain = functional.silu if kind is Activation.SILU else partial(functional.gelu, approximate="tanh")
    expected = rotate_operand(plain(gate) * up, signs, 32)
    for arguments in ((gate, up), (gate.clone(), up.clone())):
        with poisoned():
            found = gated_operand(*arguments, kind.value, signs, 32)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert relative_error(reference.gated(gate, up, kind), plain(gate.double()) * up.double()) <= RELATIVE[dtype]


def test_norm_is_that_of_pytorch() -> None:
    x, weight = 3 * torch.randn(4, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    for offset in (0.0, 1.0):
        assert_close(reference.rms_norm(x, weight, EPS, offset), torch.nn.functional.rms_norm(x, (40,), weight + offset, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("shape", "bits"), [((20, 40), [4]), ((33, 100), [5, 6]), ((64, 7), [3])])
def test_linear_is_the_product_with_what_was_packed(shape: tuple[int, int], bits: list[int], batch: int, dtype: torch.dtype) -> None:
    weight, signs = packed("trellis", *shape, bits), signs_of(shape[1])
    x, bias = torch.randn(batch, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    for each in (bias, None):
        with poisoned():
            operand = rotate_operand(x, signs, 1)
            found = operand_linear(*operand, weight.codes, weight.scales, each, *weight.format, shape[0], dtype)
        rotated = reference.rotate(x.double(), signs, 1)
        expected = reference.linear(rotated, weight.codes, weight.scales, each, weight.quantizers, shape[0])
        assert found.dtype == dtype and relative_error(found, expected) <= RELATIVE[dtype] + OPERAND


def test_empty_batch() -> None:
    weight, signs = packed("trellis", 20, 40, [4]), signs_of(40)
    nothing = torch.empty(2, 0, 40)
    for operand in (
        rotate_operand(nothing, signs, 8),
        pack_rows(nothing),
        norm_operand(torch.empty(0, 40), torch.ones(40), EPS, 0.0, signs, 8),
        gated_operand(nothing, nothing, "silu", signs, 8),
    ):
        assert operand_linear(*operand, weight.codes, weight.scales, None, *weight.format, 20, torch.half).shape == (0, 20)
    empty = torch.empty(0, 40)
    assert add_norm_operand(empty, empty, torch.ones(40), EPS, 0.0, signs, 8)[2].shape == (0, 40)


def test_opcheck() -> None:
    weight, signs = packed("trellis", 33, 96, [5, 6]), signs_of(96)
    x, scale = torch.randn(2, 3, 96), torch.randn(96)
    opcheck(rotate_operand, (x, signs, 32))
    opcheck(pack_rows, (x,))
    opcheck(norm_operand, (x, scale, EPS, 1.0, signs, 32))
    opcheck(add_norm_operand, (x, x.clone(), scale, EPS, 0.0, signs, 32))
    opcheck(gated_operand, (*torch.randn(2, 3, 192).chunk(2, -1), "gelu_tanh", signs, 32))
    operand = rotate_operand(torch.randn(4, 96), signs, 32)
    opcheck(operand_linear, (*operand, weight.codes, weight.scales, torch.randn(33), *weight.format, 33, torch.bfloat16))
    opcheck(operand_linear, (*operand, weight.codes, weight.scales, None, *weight.format, 33, torch.float32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    weight, signs = packed("trellis", 64, 48, [4, 5]), signs_of(48)

    def model(x: Tensor) -> Tensor:
        operand = torch.ops.qpc.rotate_operand(x, signs, 16)
        return torch.ops.qpc.operand_linear(*operand, weight.codes, weight.scales, None, *weight.format, 64, x.dtype).relu()

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (3, 5):
        with torch.no_grad():
            x = torch.randn(batch, 48)
            assert_close(compiled(x), model(x))


WEIGHT = packed("trellis", 32, 48, [4])
SIGNS = signs_of(48)
ROTATION: dict[str, Any] = {"x": torch.randn(2, 48), "signs": SIGNS, "block": 16}
NORM: dict[str, Any] = ROTATION | {"weight": torch.ones(48), "eps": EPS, "offset": 0.0, "residual": torch.ones(2, 48)}
GATED: dict[str, Any] = {"gate": ROTATION["x"], "up": ROTATION["x"], "activation": "silu", "signs": SIGNS, "block": 16}
WORDS, SCALES = rotate_operand(ROTATION["x"], SIGNS, 16)
LINEAR: dict[str, Any] = {
    "words": WORDS, "scales": SCALES, "codes": WEIGHT.codes, "weight_scales": WEIGHT.scales, "bias": None, "step_bits": [4],
    "window_bits": [14], "out_features": 32, "dtype": torch.half,
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "good", "change", "message"),
    [
        (rotate_operand, ROTATION, {"x": torch.randn(17, 48)}, "at most 16 rows"),
        (rotate_operand, ROTATION, {"x": torch.randn(2, 0), "signs": SIGNS[:0], "block": 1}, "at least one feature"),
        (pack_rows, {"x": ROTATION["x"]}, {"x": torch.randn(17, 48)}, "at most 16 rows"),
        (pack_rows, {"x": ROTATION["x"]}, {"x": torch.ones(2, 48, dtype=torch.int32)}, "int32.*floating point"),
        (rotate_operand, ROTATION, {"block": 5}, "divisible"),
        (rotate_operand, ROTATION, {"signs": SIGNS[:2]}, "uint8"),
        (add_norm_operand, NORM, {"weight": torch.ones(47)}, "norm.*47.*required.*48"),
        (add_norm_operand, NORM, {"weight": torch.ones(48, dtype=torch.int32)}, "floating point"),
        (add_norm_operand, NORM, {"residual": torch.ones(1, 48)}, r"residual.*\(1, 48\).*\(2, 48\)"),
        (add_norm_operand, NORM, {"residual": torch.ones(2, 48).half()}, "residual.*float16.*float32"),
        (gated_operand, GATED, {"up": torch.ones(1, 48)}, r"up.*\(1, 48\).*gate.*\(2, 48\)"),
        (gated_operand, GATED, {"up": torch.ones(2, 48).half()}, "up.*float16.*float32"),
        (gated_operand, GATED, {"activation": "relu"}, "'relu'; known: silu, gelu_tanh"),
        (gated_operand, GATED, {"gate": torch.ones(17, 48), "up": torch.ones(17, 48)}, "at most 16 rows"),
        (gated_operand, GATED, {"block": 5}, "divisible"),
        (operand_linear, LINEAR, {"words": WORDS[:, :1]}, r"words.*\(3, 1, 2.*\(3, 2, 2"),
        (operand_linear, LINEAR, {"words": WORDS.float()}, "int32"),
        (operand_linear, LINEAR, {"scales": SCALES.double()}, "float32"),
        (operand_linear, LINEAR, {"scales": torch.ones(17)}, "at most 16"),
        (operand_linear, LINEAR, {"codes": []}, "0 code tensors"),
        (operand_linear, LINEAR, {"step_bits": [5]}, "80"),
        (operand_linear, LINEAR, {"window_bits": [14, 14]}, "one entry for each part"),
        (operand_linear, LINEAR, {"out_features": 65}, "required int32 .2"),
        (operand_linear, LINEAR, {"weight_scales": WEIGHT.scales.float()}, "bfloat16"),
        (operand_linear, LINEAR, {"bias": torch.ones(31)}, "bias"),
        (operand_linear, LINEAR, {"dtype": torch.int32}, "floating point"),
        (operand_linear, LINEAR, {"scales": SCALES.to("meta")}, "meta"),
    ],
)
def test_refuses_what_does_not_fit(operator: Callable[..., Any], good: dict[str, Any], change: dict[str, Any], message: str) -> None:
    operator(**good)
    with pytest.raises(QpcError, match=message):
        operator(**good | change)


def test_fake_refuses_too() -> None:
    many, signs = torch.empty(17, 48, device="meta"), SIGNS.to("meta")
    with pytest.raises(KernelError, match="at most 16 rows"):
        rotate_operand(many, signs, 16)
    with pytest.raises(KernelError, match="at most 16 rows"):
        gated_operand(many, many, "silu", signs, 16)
    with pytest.raises(KernelError, match="known: silu"):
        gated_operand(many[:2], many[:2], "Silu", signs, 16)
