"""The parameters of a layer that holds a packed weight on one rank: how they are made, filled and multiplied by. Knows nothing of vLLM."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpc.errors import CheckpointError
from qpc.integrations.vllm.stack import Stack
from qpc.integrations.vllm.stored import APART, StoredWeight
from qpc.kernels.linear import operator

QKV = {"q": 0, "k": 1, "v": 2}
"""Positions of the members of an attention's first layer, as models of vLLM name them."""


class PackedParameters:
    """Those of a `PackedModule`: `codes0` (and `codes1`), `scales` and `signs`, for what a rank holds.

    layer: the full name of the layer, for messages. members: the stored weights that it is made of.
    """

    def __init__(self, layer: str, members: Sequence[StoredWeight], stack: Stack) -> None:
        self.layer, self.members, self.stack = layer, tuple(members), stack
        self.columns = len(stack.shard.columns)
        self.quantizer, self.block = stack.shard.local_quantizer, stack.shard.block
        self._operator, self._code = operator(self.quantizer, self.columns)
        self._leaves = [f"codes{index}" for index, (_, held) in enumerate(stack.shard.parts) if held.stop > held.start]
        self._missing = {(index, leaf) for index in range(len(self.members)) for leaf in stack.tensors}

    def register(self, module: nn.Module) -> None:
        """Give a module empty parameters, each with the loader that vLLM calls for every stored tensor of it."""
        for leaf, (shape, dtype) in self.stack.tensors.items():
            parameter: Any = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self.load, leaf)
            module.register_parameter(leaf, parameter)

    def load(self, leaf: str, parameter: Tensor, loaded: Tensor, shard_id: str | int | None = None) -> None:
        """Copy what this rank holds of a stored tensor. shard_id: which member it belongs to, if there are several.

        Raises `CheckpointError` if the tensor does not fit, or its signs are not those of the other members.
        """
        index = QKV.get(shard_id, -1) if isinstance(shard_id, str) else 0 if shard_id is None else shard_id
        if not isinstance(index, int) or not 0 <= index < len(self.members) or (shard_id is None and len(self.members) > 1):
            raise CheckpointError(f"{self.layer} has {len(self.members)} members, vLLM loads {leaf} of {shard_id!r}; it does not fit")
        if loaded.dtype != parameter.dtype:
            raise CheckpointError(f"{self.members[index].name}.{leaf} is {loaded.dtype}, required {parameter.dtype}; it is damaged")
        for piece in self.stack.pieces:
            if piece.member == index:
                self._place(leaf, parameter.data[self.stack.rows_of(leaf, piece)], piece.shard.cut(leaf, loaded))
        self._missing.discard((index, leaf))

    def check_complete(self) -> None:
        """Raise `CheckpointError` if a tensor was not loaded: vLLM does not look."""
        if self._missing:
            index, leaf = min(self._missing)
            raise CheckpointError(f"the checkpoint lacks the tensor {self.members[index].name}.{leaf}; it is incomplete")

    def codes(self, module: Any) -> list[Tensor]:
        """The code tensors that have columns on this rank."""
        return [getattr(module, leaf) for leaf in self._leaves]

    def multiply(self, module: Any, x: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        """[..., columns] -> [..., rows], in the dtype of x: by the first rows of the stack, padding counted, plus the bias [rows]."""
        rotated = torch.ops.qpc.rotate(x, module.signs, self.block) if self.block else x
        product: Tensor = self._operator(rotated, self.codes(module), module.scales, bias, *self._code, rows)
        return product

    def _place(self, leaf: str, target: Tensor, value: Tensor) -> None:
        if value.shape != target.shape:
            raise CheckpointError(f"{self.layer}: {leaf} is {tuple(value.shape)}, required {tuple(target.shape)}; it is damaged")
        known = leaf == "signs" and sum(missing == leaf for _, missing in self._missing) < len(self.members)
        if known and not torch.equal(target, value.to(target.device)):
            raise CheckpointError(f"vLLM runs {self.layer} as one weight, but the signs of its members differ: {APART}")
        target.copy_(value)
