"""Random packed weights: every string of bits is the code of some weight."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qpc.kernels import ops
from qpc.quant.layout import BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.trellis import MAX_WINDOW_BITS


@dataclass(frozen=True)
class Packed:
    """A random weight of one family. bits: of a step (trellis) or of a weight (scalar), for each part."""

    family: str
    out_features: int
    in_features: int
    bits: list[int]
    codes: list[Tensor]
    scales: Tensor
    window_bits: list[int]

    @property
    def quantizers(self) -> list[UniformQuantizer]:
        return ops.trellis_parts(self.bits, self.window_bits) if self.family == "trellis" else ops.scalar_parts(self.bits)

    @property
    def format(self) -> tuple[list[int], ...]:
        """The arguments of the operators that tell the format."""
        return (self.bits, self.window_bits) if self.family == "trellis" else (self.bits,)


def packed(
    family: str, out_features: int, in_features: int, bits: list[int], suffix_bits: int = 10, device: str = "cpu", seed: int = 0
) -> Packed:
    """A random weight; its block columns are shared out evenly to the parts. suffix_bits: of a window that lie beyond the step."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = row_blocks(out_features), column_blocks(in_features)
    widths = [columns * (i + 1) // len(bits) - columns * i // len(bits) for i in range(len(bits))]
    words = [(16 if family == "trellis" else 32) * each for each in bits]
    codes = [
        torch.randint(-(2**31), 2**31, (rows, width, count), generator=generator, dtype=torch.int32).to(device)
        for width, count in zip(widths, words, strict=True)
    ]
    scales = (0.5 + torch.rand(rows * BLOCK_ROWS, generator=generator)).bfloat16().to(device)
    return Packed(family, out_features, in_features, bits, codes, scales, [min(each + suffix_bits, MAX_WINDOW_BITS) for each in bits])


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every uninitialized tensor with NaN, so that an element that a kernel forgets is seen."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else PyTorch warns of every matrix product
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
