"""Writes that nothing else sees become operators; all others stay, and the values are the same either way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.values import mutated


class Writes(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(8, 8), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def used_before_and_after(x: Tensor) -> Tensor:
    y = x * 2
    before = y.sum()
    y.div_(before)
    y.add_(1).clamp_(max=1.5)
    return y + before


def ranked(x: Tensor) -> Tensor:
    values, order = torch.topk(x, 3, dim=-1)
    values /= values.sum(dim=-1, keepdim=True)
    order.clamp_(max=4)
    return values * order


def inverse(x: Tensor) -> Tensor:
    order = torch.sort(x[0]).indices
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return x[:, back]


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:].add_(1)
    return y


def seen_by_a_view(x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, 1:]
    y.add_(1)
    return view * 3


def of_another_dtype(x: Tensor) -> Tensor:
    y = (x * 2).half()
    y.add_(torch.ones(8, dtype=torch.float32))
    return y


def run(body: Callable[[Tensor], Tensor]) -> bool:
    """Whether anything is left that is written to, once the graph is seen to compute what the module computes."""
    torch.manual_seed(0)
    module, x = Writes(body), torch.randn(3, 8)
    program = capture(module, example_inputs=(x,))
    assert torch.equal(program.run((x,))[0], module(x))
    return bool(mutated(program.graph))


@pytest.mark.parametrize("body", [used_before_and_after, ranked, inverse])
def test_writes_to_fresh_values_are_none(body: Callable[[Tensor], Tensor]) -> None:
    assert not run(body)


@pytest.mark.parametrize("body", [through_a_view, seen_by_a_view, of_another_dtype])
def test_writes_that_something_sees_stay(body: Callable[[Tensor], Tensor]) -> None:
    assert run(body)
