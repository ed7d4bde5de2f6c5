"""How a linear layer of vLLM holds a packed weight, and multiplies by it.

It runs the operators that a model of `qpc.load` runs: one rotation of the input and one product for all members of a fused layer. Traced by
`torch.compile` they are single nodes, for any number of rows. What they keep between calls is made by calls that warm up, so a step can
be captured in a CUDA graph. On a CPU the weight is dequantized at the first product. (Run under vLLM on CPUs; not yet on a GPU.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from qpc.integrations.vllm.parameters import QKV, PackedParameters
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import StoredWeight


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The method of one layer."""

    def __init__(self, layer: str, members: tuple[StoredWeight, ...]) -> None:
        """layer: its full name. members: what it is made of, in its order."""
        self.layer, self.members = layer, members

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
        stack = Stack.of(self.layer, self.members, outputs, input_size_per_partition, rank)
        self.packed = PackedParameters(self.layer, self.members, stack)
        self.packed.register(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise `CheckpointError` if a tensor was not there."""
        self.packed.check_complete()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., columns of this rank] -> [..., rows of this rank], in the dtype of x."""
        kept = self.packed.stack.kept
        if len(kept) == 1:
            return self.packed.multiply(layer, x, bias, kept[0].stop)
        product = self.packed.multiply(layer, x, None, kept[-1].stop)
        rows = torch.cat([product[..., each] for each in kept], dim=-1)
        return rows if bias is None else rows + bias

    def _whole_sizes(self, layer: Any, output_partition_sizes: list[int]) -> list[int]:
        """Rows of each part of the layer on all ranks together, heads that several of them hold counted once."""
        if len(self.members) == len(output_partition_sizes):
            return [stored.out_features for stored in self.members]
        if hasattr(layer, "total_num_kv_heads") and len(output_partition_sizes) == len(QKV):
            heads = layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads
            return [count * width for count, width in zip(heads, (layer.head_size, layer.head_size, layer.v_head_size), strict=True)]
        return list(getattr(layer, "output_sizes", output_partition_sizes))
