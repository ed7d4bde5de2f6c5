"""A stack of experts: matrices of one shape, of which each row of an activation reads one.

`qpc::expert_linear` is the form in which graphs have it from CANONICAL on, as `aten.linear` is that of one matrix. To every pass a stack
is one matrix, its experts below each other: [experts * out_features, in_features]. So it has one rotation, one quantizer and one packed
weight, and counts with all of its weights; that a row of the activation reads only one expert matters to nothing but the multiplication.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 16
"""Rows for each of which a GPU reads the expert by itself, so that nothing waits to learn which experts are needed."""


def multiply_by_expert(x: Tensor, stack: Tensor, expert: Tensor) -> Tensor:
    """Each row by the matrix of its expert: `y[r] = stack[expert[r]] @ x[r]`.

    x: [rows, in_features]. stack: [experts, out_features, in_features], of the dtype of `x`, in any memory layout. expert: int64 [rows],
    in any order. Returns [rows, out_features]; rows of an expert that does not exist are zero, or on a GPU those of the last one.
    """
    if by_row(x):
        at_once = [slice(start, start + FEW_ROWS) for start in range(0, len(x), FEW_ROWS)]
        chosen = expert.clamp(max=len(stack) - 1)
        made = [torch.bmm(stack[chosen[rows]], x[rows].unsqueeze(-1)).squeeze(-1) for rows in at_once]
        return torch.cat(made) if made else x.new_empty((0, stack.shape[1]))
    out = x.new_zeros((len(x), stack.shape[1]))
    for index, rows in rows_of_experts(expert, len(stack)):
        out[rows] = functional.linear(x[rows], stack[index])
    return out


def by_row(x: Tensor) -> bool:
    """Whether rows [rows, features] are multiplied one by one: a GPU has few of them, or must not wait, since it records a CUDA graph."""
    return x.is_cuda and (len(x) <= FEW_ROWS or torch.cuda.is_current_stream_capturing())


def rows_of_experts(expert: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """The experts that are chosen at all, each with the numbers of its rows, int64, ascending. Waits for a GPU, once."""
    counts = torch.bincount(expert, minlength=experts).tolist()
    rows = torch.split(torch.argsort(expert, stable=True), counts)
    return [(index, rows[index]) for index in range(experts) if counts[index]]


@torch.library.custom_op("qpc::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Multiply each row by the matrix of its expert.

    x: [rows, in_features]. weight: [experts, out_features, in_features], or as one matrix [experts * out_features, in_features].
    expert: int64 [rows], from 0 to experts - 1, in any order. Returns [rows, out_features].
    """
    return multiply_by_expert(x, _as_stack(weight, experts), expert)


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, expert: Tensor, experts: int) -> Tensor:
    return x.new_empty((x.shape[0], _as_stack(weight, experts).shape[1]))


def _as_stack(weight: Tensor, experts: int) -> Tensor:
    return weight if weight.ndim == 3 else weight.view(experts, -1, weight.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, expert, ctx.experts = inputs
    ctx.save_for_backward(x, weight, expert)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, expert = ctx.saved_tensors
    stack, of_x, of_weight = _as_stack(weight, ctx.experts), None, None
    if ctx.needs_input_grad[0]:
        of_x = multiply_by_expert(gradient, stack.transpose(1, 2), expert)
    if ctx.needs_input_grad[1]:
        of_weight = torch.zeros(stack.shape, dtype=stack.dtype, device=stack.device)
        for index, rows in rows_of_experts(expert, ctx.experts):
            of_weight[index] = gradient[rows].t() @ x[rows]
        of_weight = of_weight.reshape(weight.shape)
    return of_x, of_weight, None, None


expert_linear.register_autograd(_backward, setup_context=_save)

EXPERT_LINEAR = torch.ops.qpc.expert_linear.default
