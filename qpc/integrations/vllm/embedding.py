"""How an embedding or output head of vLLM holds a packed table."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from qpc.errors import CheckpointError
from qpc.integrations.vllm.parameters import PackedParameters
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import StoredWeight
from qpc.kernels.lookup import lookup_operator
from qpc.quant.layout import BLOCK_ROWS


class PackedTableMethod(QuantizeMethodBase):  # type: ignore[misc]
    """The method of one table [vocabulary, features], whose rows are looked up, or multiplied by where it is an output head.

    What a model multiplies rows by is not in it: models of vLLM do that themselves.
    """

    def __init__(self, table: StoredWeight) -> None:
        self.table = table

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty parameters for its rows. Raises `CheckpointError` if they cannot be split so."""
        (self.rows,), self.dtype = output_partition_sizes, params_dtype
        rank = Rank(int(layer.tp_rank), int(layer.tp_size))
        stack = Stack.of_table(self.table, self.rows, rank)
        needed, found = (layer.org_vocab_size, input_size), (self.table.out_features, self.table.in_features)
        if found != needed or stack.row_blocks * BLOCK_ROWS != self.rows:
            raise CheckpointError(
                f"{self.table.name} is {found[0]}x{found[1]}; vLLM needs {needed[0]}x{needed[1]}, and on each rank {self.rows} rows with "
                "padding, in whole blocks of 64; compile without --embeddings"
            )
        self.packed = PackedParameters(self.table.name, [self.table], stack)
        self.packed.register(layer)
        self._operator, self._code = lookup_operator(self.packed.quantizer, input_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise `CheckpointError` if a tensor was not there."""
        self.packed.check_complete()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Indices [...] into the rows of this rank -> [..., features]."""
        shape = len(self.packed.stack.shard.rows), self.table.in_features
        codes = self.packed.codes(layer)
        rows: Tensor = self._operator(input_, codes, layer.scales, layer.signs, self.packed.block, *self._code, *shape, self.dtype)
        return rows

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., features] -> logits [..., rows of this rank], zero for rows of padding."""
        return self.packed.multiply(layer, x, bias, self.rows)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """An output head that is tied to an embedding is that embedding."""
        return embed_tokens
