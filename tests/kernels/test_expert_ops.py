"""The operators of packed stacks: by the oracle of each expert alone, both ways in which a GPU takes them, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qpc.errors import KernelError
from qpc.kernels import expert_ops, reference
from qpc.quant.experts import FEW_ROWS
from tests.kernels.packed import Packed, packed, poisoned
from tests.kernels.tolerances import assert_close

EXPERTS, ROWS, WIDTH = 3, 64, 40
FAMILIES = [("trellis", [4]), ("trellis", [5, 6]), ("scalar", [2, 3]), ("pairs", [4, 5])]


def stack(family: str, bits: list[int]) -> Packed:
    return packed(family, EXPERTS * ROWS, WIDTH, bits)


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, WIDTH, generator=generator).to(dtype), torch.randint(0, EXPERTS, (count,), generator=generator)


def expected(weight: Packed, x: Tensor, expert: Tensor) -> Tensor:
    whole = reference.linear(x, weight.codes, weight.scales, None, weight.quantizers, weight.out_features)
    return whole.view(len(x), EXPERTS, ROWS)[torch.arange(len(x)), expert]


def operator(weight: Packed) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = getattr(expert_ops, f"{weight.family}_expert_linear")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "bits"), FAMILIES)
def test_each_row_is_multiplied_by_its_expert(family: str, bits: list[int], dtype: torch.dtype) -> None:
    weight = stack(family, bits)
    for count in (0, 1, 7):
        x, expert = rows(count, dtype)
        with poisoned():
            found = operator(weight)(x, weight.codes, weight.scales, expert, *weight.format, ROWS, EXPERTS)
        assert found.shape == (count, ROWS)
        assert_close(found, expected(weight, x, expert))


@pytest.mark.parametrize("count", [1, 7, FEW_ROWS + 3])
@pytest.mark.parametrize("way", [expert_ops.row_by_row, expert_ops.expert_by_expert])
def test_row_ranges_of_the_stack_are_the_weights_of_its_experts(way: Callable[..., Tensor], count: int) -> None:
    weight = stack("trellis", [5, 6])
    x, expert = rows(count)

    def multiply(x: Tensor, codes: list[Tensor], scales: Tensor) -> Tensor:
        return reference.linear(x, codes, scales, None, weight.quantizers, ROWS)

    assert_close(way(x, weight.codes, weight.scales, expert, ROWS, EXPERTS, multiply), expected(weight, x, expert))


@pytest.mark.parametrize(("family", "bits"), FAMILIES[1:])
def test_the_operator_is_registered_as_it_behaves(family: str, bits: list[int]) -> None:
    weight = stack(family, bits)
    x, expert = rows(5)
    opcheck(operator(weight), (x, weight.codes, weight.scales, expert, *weight.format, ROWS, EXPERTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 2, WIDTH)}, "required a floating point"),
        ({"expert": torch.zeros(5, dtype=torch.int32)}, "required int64"),
        ({"expert": torch.zeros(4, dtype=torch.int64)}, "5 rows and 4 experts"),
        ({"out_features": 60}, "divisible by 64"),
        ({"experts": 2}, "required int32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    weight = stack("scalar", [3])
    x, expert = rows(5)
    arguments = {"x": x, "codes": weight.codes, "scales": weight.scales, "expert": expert, "bits": [3], "out_features": ROWS}
    with pytest.raises(KernelError, match=message):
        expert_ops.scalar_expert_linear(**(arguments | {"experts": EXPERTS} | change))
