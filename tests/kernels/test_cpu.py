"""The kept copies of the CPU path: used while they are right, gone when they are not."""

import gc
from dataclasses import replace

import pytest
import torch

from qpc.kernels import cpu, ops, reference
from tests.kernels.packed import Packed, packed
from tests.kernels.tolerances import assert_close


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    gc.collect()
    cpu.drop_cache()
    assert cpu.cache_bytes() == 0


def run(weight: Packed, x: torch.Tensor) -> torch.Tensor:
    return ops.trellis_linear(x, weight.codes, weight.scales, None, *weight.format, weight.out_features)


def check(weight: Packed, x: torch.Tensor) -> None:
    assert_close(run(weight, x), reference.linear(x, weight.codes, weight.scales, None, weight.quantizers, weight.out_features))


def test_one_copy_serves_many_calls() -> None:
    weight = packed("trellis", 32, 48, [4])
    for _ in range(3):
        check(weight, torch.randn(2, 48))
        assert cpu.cache_bytes() == 4 * 32 * 48


def test_views_made_anew_share_a_copy() -> None:
    weight = packed("trellis", 128, 48, [4])
    for _ in range(3):
        part = replace(weight, out_features=64, codes=[weight.codes[0][1:2]], scales=weight.scales[64:128])
        check(part, torch.randn(2, 48))
        assert cpu.cache_bytes() == 4 * 64 * 48


def test_copy_dies_with_the_codes() -> None:
    weight = packed("trellis", 32, 48, [4])
    run(weight, torch.randn(2, 48))
    view = weight.codes[0][:1]
    weight.codes.clear()
    assert cpu.cache_bytes() > 0, "a view keeps the storage"
    del view
    assert cpu.cache_bytes() == 0


def test_drop_cache() -> None:
    weight = packed("trellis", 32, 48, [4])
    run(weight, torch.randn(2, 48))
    cpu.drop_cache()
    assert cpu.cache_bytes() == 0
    check(weight, torch.randn(2, 48))


@pytest.mark.parametrize("change", ["codes", "second part", "scales"])
def test_change_in_place_is_seen(change: str) -> None:
    weight = packed("trellis", 32, 48, [4, 5])
    x = torch.randn(2, 48)
    before = run(weight, x)
    {"codes": weight.codes[0], "second part": weight.codes[1], "scales": weight.scales}[change][:1].mul_(3)
    check(weight, x)
    assert not torch.equal(run(weight, x), before)


def test_new_tensor_at_an_old_address() -> None:
    x = torch.randn(2, 48)
    for seed in range(20):
        check(packed("trellis", 32, 48, [4], seed=seed), x)


def test_other_scales_with_the_same_codes() -> None:
    weight = packed("trellis", 32, 48, [4])
    x = torch.randn(2, 48)
    for _ in range(20):
        check(replace(weight, scales=torch.rand(64).bfloat16()), x)


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = packed("trellis", 32, 48, [4])
        check(weight, torch.randn(2, 48))
    check(weight, torch.randn(2, 48))


def test_each_dtype_has_its_copy() -> None:
    weight = packed("trellis", 32, 48, [4])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        check(weight, torch.randn(2, 48).to(dtype))
    assert cpu.cache_bytes() == (4 + 2) * 32 * 48
