"""The module that takes the place of a linear once its weight is packed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qpc.kernels import ops as _registered  # noqa: F401 - importing it registers torch.ops.qpc
from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


def operator(quantizer: Quantizer, in_features: int) -> tuple[torch._ops.OpOverload, tuple[object, ...]]:
    """The operator that runs a quantizer's family, and its arguments that describe the code."""
    parts = [part for part, _ in quantizer.parts(in_features)]
    trellis = [part for part in parts if isinstance(part, TrellisQuantizer)]
    if len(trellis) == len(parts):
        return torch.ops.qpc.trellis_linear.default, ([part.step_bits for part in trellis], [part.window_bits for part in trellis])
    vector = [part for part in parts if isinstance(part, VectorQuantizer)]
    if len(vector) == len(parts):
        return torch.ops.qpc.vector_linear.default, ([part.bits for part in vector], vector[0].dimension)
    scalar = [part for part in parts if isinstance(part, ScalarQuantizer)]
    assert len(scalar) == len(parts), f"the parts of {quantizer} are of several families"
    return torch.ops.qpc.scalar_linear.default, ([part.bits for part in scalar],)


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with a packed W; takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    Its buffers are what a checkpoint stores: `codes0` (and `codes1` of a mixed rate) int32 [row_blocks, column_blocks, words], `scales`
    bfloat16 [row_blocks * 64], `signs` uint8 [ceil(in_features / 8)]; `bias` is a parameter, as it was. `block` is the size of the
    Hadamard blocks; 0 means that the weight was not rotated.
    """

    scales: Tensor
    signs: Tensor

    def __init__(self, out_features: int, in_features: int, quantizer: Quantizer, block: int, bias: nn.Parameter | None = None) -> None:
        """An empty one, on the meta device; fill it with `load_state_dict(..., assign=True)`."""
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.quantizer, self.block = quantizer, block
        rows = row_blocks(out_features)
        self.parts = quantizer.parts(in_features)
        for index, (part, columns) in enumerate(self.parts):
            self.register_buffer(f"codes{index}", torch.empty(rows, columns, part.block_words, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(rows * BLOCK_ROWS, dtype=torch.bfloat16, device="meta"))
        signs = Rotation.bytes_for(in_features) if block else 0
        self.register_buffer("signs", torch.empty(signs, dtype=torch.uint8, device="meta"))
        self.bias = bias
        self._operator, self._code = operator(quantizer, in_features)

    @staticmethod
    def from_packed(packed: PackedWeight, bias: nn.Parameter | None = None) -> "QuantizedLinear":
        """A module that shares the tensors of `packed`."""
        rotation = packed.rotation
        module = QuantizedLinear(packed.out_features, packed.in_features, packed.quantizer, rotation.block if rotation else 0, bias)
        for index, codes in enumerate(packed.codes):
            setattr(module, f"codes{index}", codes)
        module.scales = packed.scales
        module.signs = rotation.signs if rotation else packed.scales.new_empty(0, dtype=torch.uint8)
        return module

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """The code tensors, one per part."""
        return tuple(getattr(self, f"codes{index}") for index in range(len(self.parts)))

    @property
    def packed(self) -> PackedWeight:
        """The weight as a value; shares the tensors of the module."""
        rotation = Rotation(self.in_features, self.block, self.signs) if self.block else None
        return PackedWeight(self.out_features, self.in_features, self.quantizer, self.codes, self.scales, rotation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if self.block:
            x = torch.ops.qpc.rotate(x, self.signs, self.block)
        result: Tensor = self._operator(x, list(self.codes), self.scales, self.bias, *self._code, self.out_features)
        return result

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move, but never convert: `model.half()` concerns activations and what is not packed."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.quantizer}, bias={self.bias is not None}"


def stack_rows(weights: Sequence[PackedWeight]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes and scales of several weights of one quantizer and one rotation as those of a single one.

    All but the last must have out_features divisible by 64, so that no padding row lies between two members.
    """
    assert all(w.out_features % BLOCK_ROWS == 0 for w in weights[:-1]), "padding rows inside a group"
    assert len({w.quantizer for w in weights}) == 1, "a group shares one quantizer"
    if len(weights) == 1:
        return weights[0].codes, weights[0].scales
    codes = tuple(torch.cat(parts) for parts in zip(*(w.codes for w in weights), strict=True))
    return codes, torch.cat([w.scales for w in weights])
