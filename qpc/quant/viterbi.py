"""Search of the tail-biting bitshift trellis on the CPU: compiled, vectorized over rings, on all cores.

Two passes (QTIP, arXiv 2406.11235, section on tail-biting): a walk with free ends over the ring turned by half, so that it runs freely
through the joint, gives the L - k bits which the last window and the first one share; a second walk over the ring itself begins and ends
with them.
"""

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.bitstring import pack
from qpc.quant.codebook import codebook
from qpc.settings import Settings

JOINT_WINDOWS = 8
"""The first pass covers this many window lengths to either side of the joint; steps further away hardly change the bits there."""

WORKSPACE_BYTES = 1 << 31
"""Bound on the workspaces of all threads together. One thread runs in any case."""


def encode_rings(values: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Bits of the rings closest to `values` in squared error: int32 [rings, steps * step_bits / 32], in the bit order of `trellis`.

    values: float32 [rings, steps, 2], in units of the integer code; moved to the CPU and back if it lies elsewhere.
    The result depends neither on the number of threads nor on the other rings. Raises `QuantizerError` for shapes that make no ring.
    """
    if values.ndim != 3 or values.shape[2] != 2:
        raise QuantizerError(f"rings must have shape [rings, steps, 2], got {tuple(values.shape)}")
    steps = values.shape[1]
    _check_ring(steps, step_bits, window_bits)
    if steps % 32:
        raise QuantizerError(f"a ring of {steps=} does not fill 32-bit words at every rate; use a multiple of 32")
    symbols = search_rings(values.detach().to("cpu", torch.float32).numpy(), codebook(window_bits).numpy(), step_bits)
    return pack(torch.from_numpy(symbols.astype(np.int32)), step_bits).to(values.device)


def search_rings(values: NDArray[np.float32], points: NDArray[Any], step_bits: int) -> NDArray[np.uint16]:
    """The low `step_bits` bits of every window of the best rings found: [rings, steps].

    values: float32 [rings, steps, 2]. points: [2^window_bits, 2], the two weights of each window, in the same unit.
    """
    rings, steps, _ = values.shape
    window_bits = len(points).bit_length() - 1
    _check_ring(steps, step_bits, window_bits)
    kernel = _kernel()
    table = _branch_table(points, step_bits)
    suffixes = 1 << (window_bits - step_bits)
    reach = min(steps // 2, JOINT_WINDOWS * -(-window_bits // step_bits))
    shapes = ((steps, 3, kernel.LANES), (steps + 1, suffixes, kernel.LANES))
    threads = Settings.from_environment().threads
    threads = max(1, min(threads, -(-rings // kernel.LANES), WORKSPACE_BYTES // (4 * sum(int(np.prod(shape)) for shape in shapes))))
    workspaces: SimpleQueue[list[NDArray[np.float32]]] = SimpleQueue()
    for _ in range(threads):
        workspaces.put([_aligned(shape) for shape in shapes])
    symbols = np.empty((rings, steps), dtype=np.uint16)

    def search_block(start: int) -> None:
        workspace = workspaces.get()
        block = slice(start, start + kernel.LANES)
        kernel.search_block(values[block], table, *workspace, symbols[block], reach, step_bits, window_bits)
        workspaces.put(workspace)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(search_block, range(0, rings, kernel.LANES)):
            pass
    return symbols


def _check_ring(steps: int, step_bits: int, window_bits: int) -> None:
    if not (1 <= step_bits <= window_bits <= steps * step_bits and step_bits <= 16):
        raise QuantizerError(f"a ring of {steps=} with {step_bits=} (1 to 16) must hold a window of {window_bits=}, no shorter than a step")


def _branch_table(points: NDArray[Any], step_bits: int) -> NDArray[np.float32]:
    """Points and their sums of squares in the order in which the kernel visits the windows: float32 [3, windows].

    A window is (high, low, symbol) from its most significant bit down, and is visited in the order (low, high, symbol): all windows that
    extend the same few suffixes of the step before follow each other.
    """
    window_bits = len(points).bit_length() - 1
    high = min(step_bits, window_bits - step_bits)
    entries = np.concatenate([points, np.square(points.astype(np.int64)).sum(axis=1, keepdims=True)], axis=1)
    visited = entries.reshape(1 << high, 1 << (window_bits - step_bits - high), 1 << step_bits, 3).transpose(1, 0, 2, 3)
    table = _aligned((3, len(points)))
    table[:] = visited.reshape(-1, 3).T
    return table


def _aligned(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An uninitialized float32 array that starts on a cache line."""
    count = 4 * int(np.prod(shape))
    raw = np.empty(count + 64, dtype=np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + count].view(np.float32).reshape(shape)


def _kernel() -> Any:
    """The compiled module, imported at the first search."""
    try:
        from qpc.quant import viterbi_kernel
    except ImportError as error:
        raise QuantizerError("the CPU encoder needs numba: install it, or pass another encoder") from error
    return viterbi_kernel
