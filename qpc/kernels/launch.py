"""How a multiplication is spread over a GPU. Nothing in a kernel decides this."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpc.errors import KernelError

MAX_BATCH = 16
"""Rows of the activation that one decode serves; larger batches decode the weight to memory and use the matrix product of PyTorch."""

VECTOR_BATCHES = (1, 2, 4)
"""Batches that are multiplied lane by lane; larger ones use the tensor cores."""

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


def choose_launch(programs: int, columns: int, columns_per_warp: int, device: torch.device, max_warps: int = 16) -> Launch:
    """Enough warps to hide the latency of memory, and no more lanes than there is work.

    programs: independent programs along the output axis. columns: tile columns of the longest part.
    """
    warps = 4
    while warps < max_warps and programs * warps < 24 * processors(device) and 2 * warps * columns_per_warp <= columns:
        warps *= 2
    passes = -(-columns // (warps * columns_per_warp))
    wanted = -(-12 * processors(device) // (programs * warps))
    return Launch(warps, max(1, min(wanted, passes)))


def check_parts(codes: list[Tensor]) -> None:
    """Raise `KernelError` if a weight has more parts than the kernels take in one launch."""
    if len(codes) > MAX_PARTS:
        raise KernelError(f"packed weight: {len(codes)} parts along the input axis, required at most {MAX_PARTS} on a GPU")
