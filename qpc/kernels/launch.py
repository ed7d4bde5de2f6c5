"""How a multiplication is spread over a GPU. Nothing in a kernel decides this. No batch up to `MAX_BATCH` uses the tensor cores yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpc.errors import KernelError

MAX_BATCH = 16
"""Largest batch of the vector kernels; larger ones decode the weight to memory once and use the matrix product of PyTorch."""

VECTOR_BATCHES = (4, 2, 1)
"""Rows of the activation that one launch of a vector kernel multiplies, largest first; `cut_batch` makes other batches of them."""

MAX_PARTS = 2
"""Parts of a weight along the input axis that one launch takes."""


@dataclass(frozen=True)
class Launch:
    """warps: of one program. splits: programs that share the input axis; their sums are added in a fixed order by a second kernel."""

    warps: int
    splits: int


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_launch(programs: int, columns: int, columns_per_warp: int, device: torch.device) -> Launch:
    """Enough warps to hide the latency of memory, and no more lanes than there is work.

    programs: independent programs along the output axis. columns: block columns of the longest part.
    columns_per_warp: block columns that the lanes of a warp hold together.
    """
    warps = 4
    while warps < 16 and programs * warps < 24 * processors(device) and 2 * warps * columns_per_warp <= columns:
        warps *= 2
    passes = -(-columns // (warps * columns_per_warp))
    wanted = -(-12 * processors(device) // (programs * warps))
    return Launch(warps, max(1, min(wanted, passes)))


def cut_batch(batch: int) -> Iterator[slice]:
    """The rows of each launch: of the largest of `VECTOR_BATCHES` as many as fit, then of the next. Each launch decodes the weight anew."""
    start = 0
    for size in VECTOR_BATCHES:
        while batch - start >= size:
            yield slice(start, start + size)
            start += size


def check_parts(codes: list[Tensor]) -> None:
    """Raise `KernelError` if a weight has more parts than the kernels take in one launch."""
    if len(codes) > MAX_PARTS:
        raise KernelError(f"packed weight: {len(codes)} parts along the input axis, required at most {MAX_PARTS} on a GPU")
