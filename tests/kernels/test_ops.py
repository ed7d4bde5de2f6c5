"""The operators on the CPU: oracles, shapes, compilation, and what they refuse."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qpc.errors import KernelError, QpcError
from qpc.kernels import ops, reference
from qpc.quant.rotation import Rotation
from tests.kernels.packed import Packed, packed, poisoned
from tests.kernels.tolerances import assert_close

WEIGHTS = [
    pytest.param("trellis", (20, 40), [4], id="trellis"),
    pytest.param("trellis", (33, 100), [5, 6], id="trellis of two rates"),
    pytest.param("scalar", (20, 40), [3], id="scalar"),
    pytest.param("scalar", (33, 100), [2, 3], id="scalar of two rates"),
    pytest.param("pairs", (33, 100), [4, 5], id="pairs of two rates"),
    pytest.param("quadruples", (20, 40), [7], id="quadruples"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def operator(weight: Packed) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(ops, f"{weight.family}_linear")
    return found


def run(weight: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    with poisoned():
        return operator(weight)(x, weight.codes, weight.scales, bias, *weight.format, weight.out_features)


def expected(weight: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.linear(x, weight.codes, weight.scales, bias, weight.quantizers, weight.out_features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "shape", "bits"), WEIGHTS)
def test_linear_matches_oracle(family: str, shape: tuple[int, int], bits: list[int], dtype: torch.dtype) -> None:
    weight = packed(family, *shape, bits)
    for batch in ((1,), (3,), (17,), (2, 5), ()):
        x = torch.randn(*batch, shape[1]).to(dtype)
        bias = torch.randn(shape[0]).to(dtype)
        assert_close(run(weight, x, bias), expected(weight, x, bias))
        assert_close(run(weight, x), expected(weight, x))


@pytest.mark.parametrize(("family", "shape", "bits"), WEIGHTS)
def test_empty_batch(family: str, shape: tuple[int, int], bits: list[int]) -> None:
    assert run(packed(family, *shape, bits), torch.empty(2, 0, shape[1])).shape == (2, 0, shape[0])


def test_strided_activation() -> None:
    weight = packed("trellis", 20, 40, [4])
    x = torch.randn(40, 3).T
    assert_close(run(weight, x), expected(weight, x.contiguous()))


def test_row_range_is_a_weight() -> None:
    whole = packed("trellis", 256, 40, [4, 7])
    part = replace(whole, out_features=128, codes=[code[1:3] for code in whole.codes], scales=whole.scales[64:192])
    x = torch.randn(3, 40)
    assert_close(run(part, x), expected(whole, x)[:, 64:192])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "shape", "bits"), WEIGHTS)
def test_dequantize_is_the_decoded_weight(family: str, shape: tuple[int, int], bits: list[int], dtype: torch.dtype) -> None:
    weight = packed(family, *shape, bits)
    decode = getattr(ops, f"{weight.family}_dequantize")
    with poisoned():
        actual = decode(weight.codes, weight.scales, *weight.format, *shape, dtype)
    unit = torch.cat([quantizer.decode(code) for quantizer, code in zip(weight.quantizers, weight.codes, strict=True)], dim=1)
    assert_close(actual, (unit.double() * weight.scales.double()[:, None])[: shape[0], : shape[1]].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "block"), [(7, 1), (48, 12), (64, 64), (576, 576), (96, 32)])
def test_rotation(features: int, block: int, dtype: torch.dtype) -> None:
    signs = torch.randint(0, 256, (Rotation.bytes_for(features),), dtype=torch.uint8)
    x = torch.randn(features, 3, 2).to(dtype).permute(1, 2, 0)
    with poisoned():
        actual = ops.rotate(x, signs, block)
    assert_close(actual, reference.rotate(x, signs, block))
    assert ops.rotate(x[:0], signs, block).shape == (0, 2, features)


def test_opcheck() -> None:
    trellis, scalar, pairs = packed("trellis", 33, 100, [5, 6]), packed("scalar", 33, 100, [2, 3]), packed("pairs", 33, 100, [4, 5])
    bias = torch.randn(33)
    opcheck(ops.rotate, (torch.randn(2, 24), torch.zeros(3, dtype=torch.uint8), 12))
    opcheck(ops.trellis_linear, (torch.randn(2, 3, 100), trellis.codes, trellis.scales, bias, *trellis.format, 33))
    opcheck(ops.scalar_linear, (torch.randn(100), scalar.codes, scalar.scales, None, [2, 3], 33))
    opcheck(ops.vector_linear, (torch.randn(1, 100), pairs.codes, pairs.scales, bias, *pairs.format, 33))
    opcheck(ops.vector_dequantize, (pairs.codes, pairs.scales, *pairs.format, 33, 100, torch.float16))
    opcheck(ops.trellis_dequantize, (trellis.codes, trellis.scales, *trellis.format, 33, 100, torch.bfloat16))
    opcheck(ops.scalar_dequantize, (scalar.codes, scalar.scales, [2, 3], 33, 100, torch.float32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    weight = packed("trellis", 128, 48, [4, 5])
    signs = torch.randint(0, 256, (6,), dtype=torch.uint8)

    def model(x: Tensor) -> Tensor:
        turned = torch.ops.qpc.rotate(x, signs, 16)
        codes = [code[:1] for code in weight.codes]
        return torch.ops.qpc.trellis_linear(turned, codes, weight.scales[:64], None, *weight.format, 64).relu()

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch, mode in ((3, torch.no_grad()), (5, torch.inference_mode())):
        with mode:
            x = torch.randn(batch, 48)
            turned = reference.rotate(x, signs, 16)
            assert_close(compiled(x), expected(weight, turned)[:, :64].relu())


def test_refuses_what_does_not_fit() -> None:
    weight = packed("trellis", 32, 48, [4])
    good: dict[str, Any] = {
        "x": torch.randn(2, 48), "codes": weight.codes, "scales": weight.scales, "bias": None, "step_bits": [4], "window_bits": [16],
        "out_features": 32,
    }  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.randn(2, 50)}, "required 4"),
        ({"x": torch.ones(2, 48, dtype=torch.int32)}, "floating point"),
        ({"codes": [weight.codes[0].long()]}, "required int32"),
        ({"codes": []}, "0 code tensors"),
        ({"codes": weight.codes * 2}, "2 code tensors for 1 parts"),
        ({"step_bits": [5]}, "80"),
        ({"step_bits": [13]}, "step_bits=13"),
        ({"window_bits": [25]}, "window_bits=25"),
        ({"window_bits": [16, 16]}, "one entry for each part"),
        ({"out_features": 65}, "required int32 .2"),
        ({"scales": weight.scales.float()}, "bfloat16"),
        ({"scales": weight.scales[:16]}, "bfloat16 .64"),
        ({"bias": torch.ones(31)}, "bias"),
        ({"scales": weight.scales.to("meta")}, "meta"),
    ]
    assert operator(weight)(**good).shape == (2, 32)
    for change, message in wrong:
        with pytest.raises(QpcError, match=message):
            operator(weight)(**{**good, **change})
    with pytest.raises(KernelError, match="divisible"):
        ops.rotate(torch.randn(2, 24), torch.zeros(3, dtype=torch.uint8), 16)
    with pytest.raises(KernelError, match="uint8"):
        ops.rotate(torch.randn(2, 24), torch.zeros(4, dtype=torch.uint8), 12)


def test_fake_refuses_too() -> None:
    weight = packed("trellis", 32, 48, [4])
    with pytest.raises(KernelError, match="required 4"):
        ops.trellis_linear(
            torch.empty(2, 50, device="meta"), [c.to("meta") for c in weight.codes], weight.scales.to("meta"), None, [4], [16], 32
        )
