"""The module that takes the place of an embedding once its table is packed."""

import torch
from torch import Tensor

from qpc.kernels.lookup import lookup_operator
from qpc.kernels.packed_module import PackedModule
from qpc.quant.quantizer import PackedWeight, Quantizer


class QuantizedEmbedding(PackedModule):
    """`scale * table[indices]` with a packed table [num_embeddings, embedding_dim]; takes the place of `nn.Embedding`.

    Its rows are made in the dtype that the table had; as for a table, `.to(dtype)` changes it.
    """

    scale: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, quantizer: Quantizer, block: int, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        """An empty one, on the meta device."""
        super().__init__(num_embeddings, embedding_dim, quantizer, block)
        self.factor = scale
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype), persistent=False)
        self._operator, self._code = lookup_operator(quantizer, embedding_dim)

    @staticmethod
    def from_packed(packed: PackedWeight, dtype: torch.dtype, scale: float = 1.0) -> "QuantizedEmbedding":
        """A module that shares the tensors of `packed`."""
        block = packed.rotation.block if packed.rotation else 0
        module = QuantizedEmbedding(packed.out_features, packed.in_features, packed.quantizer, block, dtype, scale)
        module.scale = module.scale.to(packed.scales.device)
        return module.take(packed)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.in_features

    def forward(self, indices: Tensor) -> Tensor:
        """int32 or int64 [...] -> [..., embedding_dim]."""
        shape = (self.out_features, self.in_features)
        rows: Tensor = self._operator(indices, list(self.codes), self.scales, self.signs, self.block, *self._code, *shape, self.scale.dtype)
        return rows if self.factor == 1 else rows * self.scale

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.quantizer}" + (f", scale={self.factor:g}" if self.factor != 1 else "")
