"""Lookups in packed tables: the oracle is the whole table, decoded and turned back."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qpc.errors import KernelError
from qpc.kernels.embedding import QuantizedEmbedding
from qpc.kernels.linear import QuantizedLinear
from qpc.kernels.lookup import CHUNK_WEIGHTS, lookup_operator, reference_lookup
from qpc.kernels.packed_module import tie
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer

QUANTIZERS = [
    TrellisQuantizer(5, 12),
    ScalarQuantizer(6),
    MixedRateQuantizer(TrellisQuantizer(4, 12), TrellisQuantizer(5, 12), Fraction(1, 2)),
    MixedRateQuantizer(ScalarQuantizer(6), ScalarQuantizer(7), Fraction(1, 4)),
]


def table(quantizer: Quantizer, rows: int = 100, features: int = 60, rotated: bool = True) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, features, generator=generator)
    rotation = Rotation.random(features, generator)
    packed = quantizer.quantize(rotation.apply(matrix) if rotated else matrix)
    return replace(packed, rotation=rotation) if rotated else packed


def look_up(indices: Tensor, packed: PackedWeight, dtype: torch.dtype = torch.float32, /, **changes: Any) -> Tensor:
    target, arguments = call(indices, packed, dtype)
    names = [argument.name for argument in target._schema.arguments]
    result: Tensor = target(**dict(zip(names, arguments, strict=True)) | changes)
    return result


def call(indices: Tensor, packed: PackedWeight, dtype: torch.dtype) -> tuple[Any, tuple[object, ...]]:
    target, code = lookup_operator(packed.quantizer, packed.in_features)
    rotation = packed.rotation
    signs, block = (rotation.signs, rotation.block) if rotation else (torch.empty(0, dtype=torch.uint8), 0)
    return target, (indices, list(packed.codes), packed.scales, signs, block, *code, packed.out_features, packed.in_features, dtype)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_the_whole_table(quantizer: Quantizer, dtype: torch.dtype) -> None:
    packed = table(quantizer)
    for indices in (
        torch.tensor(99),
        torch.tensor([[3, 3, 64], [0, 99, 63]]),
        torch.empty(2, 0, dtype=torch.int64),
        torch.arange(100).int(),
    ):
        found = look_up(indices, packed, dtype)
        assert found.shape == (*indices.shape, 60) and found.dtype == dtype
        tolerance = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(found, reference_lookup(indices, packed, dtype), rtol=tolerance, atol=tolerance)


def test_a_table_without_rotation_is_exact() -> None:
    packed = table(ScalarQuantizer(5), rotated=False)
    assert torch.equal(look_up(torch.arange(100), packed), packed.restored())


def test_many_indices_are_taken_in_pieces() -> None:
    packed = table(ScalarQuantizer(4), rows=70, features=64)
    indices = torch.arange(CHUNK_WEIGHTS // 64 + 1000) % 70
    torch.testing.assert_close(look_up(indices, packed), packed.restored()[indices])


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_opcheck(quantizer: Quantizer) -> None:
    target, arguments = call(torch.tensor([[1, 2], [99, 0]]), table(quantizer), torch.bfloat16)
    opcheck(target, arguments)


def test_refuses_what_does_not_fit() -> None:
    packed = table(ScalarQuantizer(5))
    indices = torch.tensor([1, 2])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"indices": torch.tensor([100])}, "100 rows"),
        ({"indices": torch.tensor([-1, 3])}, "from -1 to 3"),
        ({"indices": torch.tensor([1.0])}, "int32 or int64"),
        ({"signs": torch.zeros(3, dtype=torch.uint8)}, "signs"),
        ({"block": 7}, "block=7"),
        ({"bits": [4]}, "required int32"),
        ({"rows": 200}, "required int32"),
        ({"indices": indices.to("meta")}, "meta"),
    ]
    for changes, message in wrong:
        with pytest.raises(KernelError, match=message):
            look_up(indices, packed, **changes)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    packed = table(TrellisQuantizer(5, 12))
    module = QuantizedEmbedding.from_packed(packed, torch.float32, scale=3.0)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (3, 5):
            indices = torch.arange(2 * length).reshape(2, length)
            torch.testing.assert_close(compiled(indices), 3 * packed.restored()[indices])


def test_an_embedding_keeps_the_dtype_of_its_table() -> None:
    packed = table(ScalarQuantizer(6))
    module = QuantizedEmbedding.from_packed(packed, torch.bfloat16)
    codes = module.codes0
    assert module(torch.tensor([1])).dtype == torch.bfloat16
    module.float()
    assert module(torch.tensor([1])).dtype == torch.float32
    assert module.codes0 is codes and module.scales.dtype == torch.bfloat16
    assert {*module.state_dict()} == {"codes0", "scales", "signs"}


def test_a_scale_is_rounded_as_the_rows_are() -> None:
    packed = table(ScalarQuantizer(6))
    module = QuantizedEmbedding.from_packed(packed, torch.bfloat16, scale=60**0.5)
    rows = look_up(torch.arange(100), packed, torch.bfloat16)
    assert torch.equal(module(torch.arange(100)), rows * torch.tensor(60**0.5, dtype=torch.bfloat16))


def test_tied_modules_stay_tied_when_they_move() -> None:
    packed = table(ScalarQuantizer(6))
    model = torch.nn.ModuleList([QuantizedLinear.from_packed(packed), QuantizedEmbedding.from_packed(packed, torch.float32)])
    tie(list(model))
    assert model[0].codes0 is model[1].codes0
    model.to("meta")
    assert model[0].codes0.is_meta
    assert all(one is other for one, other in zip(model[0].buffers(), list(model[1].buffers())[:3], strict=True))
