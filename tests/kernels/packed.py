"""Random packed weights: every string of bits is the code of some weight."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpc.quant.layout import BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.quantizer import UniformQuantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import MAX_WINDOW_BITS, TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


@dataclass(frozen=True)
class Packed:
    """A random weight. quantizers: of each part, all of one family."""

    quantizers: list[UniformQuantizer]
    out_features: int
    in_features: int
    codes: list[Tensor]
    scales: Tensor

    @property
    def family(self) -> str:
        """The name of the operators' family."""
        return self.quantizers[0].family

    @property
    def format(self) -> tuple[Any, ...]:
        """The arguments of the operators that tell the format."""
        parts: Any = self.quantizers
        match self.quantizers[0]:
            case TrellisQuantizer():
                return ([part.step_bits for part in parts], [part.window_bits for part in parts])
            case VectorQuantizer(dimension):
                return ([part.bits for part in parts], dimension)
        return ([part.bits for part in parts],)


FAMILIES = ("trellis", "scalar", "pairs", "quadruples")
"""What `packed` makes: a trellis, scalars, vectors of two and of four weights."""


def quantizers(family: str, bits: Sequence[int], suffix_bits: int = 10) -> list[UniformQuantizer]:
    """One quantizer for each part. bits: of a step or of an index. suffix_bits: of a window of the trellis beyond the step."""
    make: dict[str, Callable[[int], UniformQuantizer]] = {
        "trellis": lambda each: TrellisQuantizer(each, min(each + suffix_bits, MAX_WINDOW_BITS)),
        "scalar": ScalarQuantizer,
        "pairs": partial(VectorQuantizer, 2),
        "quadruples": partial(VectorQuantizer, 4),
    }
    return [make[family](each) for each in bits]


def packed(
    family: str, out_features: int, in_features: int, bits: list[int], suffix_bits: int = 10, device: str = "cpu", seed: int = 0
) -> Packed:
    """A random weight; its block columns are shared out evenly to the parts."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = row_blocks(out_features), column_blocks(in_features)
    parts = quantizers(family, bits, suffix_bits)
    widths = [columns * (i + 1) // len(bits) - columns * i // len(bits) for i in range(len(bits))]
    codes = [
        torch.randint(-(2**31), 2**31, (rows, width, part.block_words), generator=generator, dtype=torch.int32).to(device)
        for width, part in zip(widths, parts, strict=True)
    ]
    scales = (0.5 + torch.rand(rows * BLOCK_ROWS, generator=generator)).bfloat16().to(device)
    return Packed(parts, out_features, in_features, codes, scales)


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
