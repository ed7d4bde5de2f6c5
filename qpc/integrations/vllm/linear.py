"""How a linear layer of vLLM holds a packed weight, and multiplies by it.

It runs the operators that a model of `qpc.load` runs: one rotation of the input and one product for all members of a fused layer. Traced by
`torch.compile` they are single nodes, for any number of rows. What they keep between calls is made by calls that warm up, so a step can
be captured in a CUDA graph. On a CPU the weight is dequantized at the first product. (Run under vLLM on CPUs; not yet on a GPU.)
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from qpc.errors import CheckpointError
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import APART, StoredLinear
from qpc.kernels.linear import operator

QKV = {"q": 0, "k": 1, "v": 2}
"""Positions of the members of an attention's first layer, as models of vLLM name them."""


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The method of one layer. Its parameters are those of a `PackedModule`: `codes0` (and `codes1`), `scales` and `signs`."""

    def __init__(self, layer: str, members: tuple[StoredLinear, ...]) -> None:
        """layer: its full name. members: what it is made of, in its order."""
        self.layer, self.members = layer, members
        self._missing: set[tuple[int, str]] = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty parameters for its share of the members. Raises `CheckpointError` if they cannot be split so."""
        rank = Rank(int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1)))
        outputs = list(zip(self._whole_sizes(layer, output_partition_sizes), output_partition_sizes, strict=True))
        self.stack = stack = Stack.of(self.layer, self.members, outputs, input_size_per_partition, rank)
        self._operator, self._code = operator(stack.shard.local_quantizer, len(stack.shard.columns))
        self._codes = [f"codes{index}" for index, (_, columns) in enumerate(stack.shard.parts) if columns.stop > columns.start]
        for leaf, (shape, dtype) in stack.tensors.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._load, leaf)})
            layer.register_parameter(leaf, parameter)
            self._missing |= {(index, leaf) for index in range(len(self.members))}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise `CheckpointError` if a tensor was not there: vLLM does not look."""
        if self._missing:
            index, leaf = min(self._missing)
            raise CheckpointError(f"the checkpoint lacks the tensor {self.members[index].name}.{leaf}; it is incomplete")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns of this rank] -> [..., rows of this rank], in the dtype of x."""
        block, kept = self.stack.shard.block, self.stack.kept
        rotated = torch.ops.qpc.rotate(x, layer.signs, block) if block else x
        codes = [getattr(layer, leaf) for leaf in self._codes]
        whole = len(kept) == 1
        product: Tensor = self._operator(rotated, codes, layer.scales, bias if whole else None, *self._code, kept[-1].stop)
        if whole:
            return product
        rows = torch.cat([product[..., each] for each in kept], dim=-1)
        return rows if bias is None else rows + bias

    def _whole_sizes(self, layer: Any, output_partition_sizes: list[int]) -> list[int]:
        """Rows of each part of the layer on all ranks together, heads that several of them hold counted once."""
        if len(self.members) == len(output_partition_sizes):
            return [linear.out_features for linear in self.members]
        if hasattr(layer, "total_num_kv_heads") and len(output_partition_sizes) == len(QKV):
            heads = layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads
            return [count * width for count, width in zip(heads, (layer.head_size, layer.head_size, layer.v_head_size), strict=True)]
        return list(getattr(layer, "output_sizes", output_partition_sizes))

    def _load(self, leaf: str, parameter: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
        """Copy what this rank holds of a stored tensor. shard_id: which member it belongs to, if there are several."""
        index = QKV.get(shard_id, -1) if isinstance(shard_id, str) else 0 if shard_id is None else shard_id
        if not isinstance(index, int) or not 0 <= index < len(self.members) or (shard_id is None and len(self.members) > 1):
            raise CheckpointError(f"{self.layer} has {len(self.members)} members, vLLM loads {leaf} of {shard_id!r}; it does not fit")
        if loaded.dtype != parameter.dtype:
            raise CheckpointError(f"{self.members[index].name}.{leaf} is {loaded.dtype}, required {parameter.dtype}; it is damaged")
        for piece in self.stack.pieces:
            if piece.member == index:
                self._place(leaf, parameter.data[self.stack.rows_of(leaf, piece)], piece.shard.cut(leaf, loaded))
        self._missing.discard((index, leaf))

    def _place(self, leaf: str, target: Tensor, value: Tensor) -> None:
        """Fill a range of a parameter. Raises `CheckpointError` for another shape, or signs that are not those of the other members."""
        if value.shape != target.shape:
            raise CheckpointError(
                f"{self.layer}: {leaf} is {tuple(value.shape)}, required {tuple(target.shape)}; the checkpoint is damaged"
            )
        known = leaf == "signs" and sum(missing == leaf for _, missing in self._missing) < len(self.members)
        if known and not torch.equal(target, value.to(target.device)):
            raise CheckpointError(f"vLLM runs {self.layer} as one weight, but the signs of its members differ: {APART}")
        target.copy_(value)
