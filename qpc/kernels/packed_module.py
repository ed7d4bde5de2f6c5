"""What the modules of packed weights have in common: their buffers, and how these move and are shared."""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.rotation import Rotation


class PackedModule(nn.Module):
    """A module around one packed weight [out_features, in_features].

    Its buffers are what a checkpoint stores: `codes0` (and `codes1` of a mixed rate) int32 [row_blocks, column_blocks, words], `scales`
    bfloat16 [row_blocks * 64], `signs` uint8 [ceil(in_features / 8)]. `block` is the size of the Hadamard blocks; 0 means that the weight
    was not rotated, or that its inputs come rotated already.
    """

    scales: Tensor
    signs: Tensor

    def __init__(self, out_features: int, in_features: int, quantizer: Quantizer, block: int) -> None:
        """An empty one, on the meta device; fill it with `take`, or with `load_state_dict(..., assign=True)`."""
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
        self._tied: list[PackedModule] = []
        self._alike: list[PackedModule] = []

    def take(self, packed: PackedWeight) -> Self:
        """Share the tensors of a packed weight of this shape, quantizer and block. Returns the module."""
        for index, codes in enumerate(packed.codes):
            setattr(self, f"codes{index}", codes)
        self.scales = packed.scales
        self.signs = packed.rotation.signs if packed.rotation else packed.scales.new_empty(0, dtype=torch.uint8)
        return self

    @property
    def codes(self) -> tuple[Tensor, ...]:
        """The code tensors, one per part."""
        return tuple(getattr(self, f"codes{index}") for index in range(len(self.parts)))

    @property
    def packed(self) -> PackedWeight:
        """The weight as a value; shares the tensors of the module."""
        rotation = Rotation(self.in_features, self.block, self.signs) if self.block else None
        return PackedWeight(self.out_features, self.in_features, self.quantizer, self.codes, self.scales, rotation)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move, but never convert: `model.half()` concerns activations and what is not packed. Tied weights stay one after a move."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        moved = next((other for other in self._tied if other is not self and other.scales.device == self.scales.device), None)
        if moved is not None:
            self.take(moved.packed)
        signs = next((other.signs for other in self._alike if other is not self and other.signs.device == self.signs.device), None)
        if signs is not None:
            self.signs = signs
        return self


def tie(modules: Sequence[PackedModule]) -> None:
    """Let modules of one weight share the tensors of the first of them, also when they are moved."""
    for module in modules:
        module.take(modules[0].packed)
        module.signs = modules[0].signs
        module._tied = list(modules)


def share_signs(modules: Iterable[PackedModule]) -> None:
    """Let modules that rotate alike have one tensor of signs, also when they are moved: a node of a graph can then rotate for all."""
    found: dict[tuple[int, int, torch.device, bytes], list[PackedModule]] = {}
    for module in modules:
        if module.block:
            key = (module.in_features, module.block, module.signs.device, module.signs.cpu().numpy().tobytes())
            found.setdefault(key, []).append(module)
    for alike in found.values():
        for module in alike:
            module.signs, module._alike = alike[0].signs, alike


def tied_groups(modules: Iterable[PackedModule]) -> list[list[PackedModule]]:
    """The modules that read the same codes, where there are several."""
    found: dict[int, list[PackedModule]] = {}
    for module in modules:
        found.setdefault(id(module.codes[0]), []).append(module)
    return [group for group in found.values() if len(group) > 1]
