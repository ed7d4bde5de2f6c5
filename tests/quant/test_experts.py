"""A stack of experts by its oracle: the matrix of each row, gathered."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qpc.quant.experts import EXPERT_LINEAR, multiply_by_expert, rows_of_experts

EXPERTS, ROWS, WIDTH = 4, 6, 5


def drawn(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    expert = torch.randint(0, EXPERTS - 1, (count,), generator=generator)  # nobody chooses the last
    x, stack = torch.randn(count, WIDTH, generator=generator), torch.randn(EXPERTS, ROWS, WIDTH, generator=generator)
    return x.to(dtype), stack.to(dtype), expert


def gathered(x: Tensor, stack: Tensor, expert: Tensor) -> Tensor:
    return torch.einsum("roi,ri->ro", stack[expert], x)


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_every_row_is_multiplied_by_its_expert(count: int) -> None:
    x, stack, expert = drawn(count)
    assert torch.allclose(multiply_by_expert(x, stack, expert), gathered(x, stack, expert))
    turned = stack.mT.contiguous().mT
    assert torch.allclose(multiply_by_expert(x, turned, expert), gathered(x, stack, expert))


def test_rows_of_no_expert_are_zero() -> None:
    x, stack, expert = drawn(7)
    expert[3] = EXPERTS
    made = multiply_by_expert(x, stack, expert)
    assert not made[3].any()
    assert torch.allclose(made[4:], gathered(x[4:], stack, expert[4:]))


def test_rows_of_experts_are_all_rows_in_order() -> None:
    _, _, expert = drawn(40)
    found = rows_of_experts(expert, EXPERTS)
    assert [index for index, _ in found] == sorted(set(expert.tolist()))
    for index, rows in found:
        assert torch.equal(rows, (expert == index).nonzero().flatten())


@pytest.mark.parametrize("flat", [False, True])
def test_the_operator_has_the_gradients_of_the_oracle(flat: bool) -> None:
    x, stack, expert = drawn(9)
    wanted = [value.clone().requires_grad_() for value in (x, stack)]
    gathered(*wanted, expert).square().sum().backward()
    weight = (stack.flatten(0, 1) if flat else stack).clone().requires_grad_()
    x.requires_grad_()
    EXPERT_LINEAR(x, weight, expert, EXPERTS).square().sum().backward()
    for one, other in zip((x, weight), wanted, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad.reshape(other.grad.shape), other.grad)


def test_the_operator_is_registered_as_it_behaves() -> None:
    x, stack, expert = drawn(9)
    opcheck(EXPERT_LINEAR, (x, stack, expert, EXPERTS))
