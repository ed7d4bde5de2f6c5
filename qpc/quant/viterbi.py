"""Search of the tail-biting bitshift trellis on the CPU: compiled, vectorized over states, rings on all cores.

Two passes (QTIP, arXiv 2406.11235, section on tail-biting): a walk with free ends over the ring turned by half, so that it runs freely
through the joint, gives the L - k bits which the last window and the first one share; a second walk over the ring itself begins and ends
with them. Only the windows of `neighbours` are tried.
"""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.bitstring import pack
from qpc.quant.codebook import codebook
from qpc.quant.compiled import compiled
from qpc.quant.neighbours import Neighbours, nearest
from qpc.settings import Settings

JOINT_WINDOWS = 8
"""The first pass covers this many window lengths to either side of the joint; steps further away hardly change the bits there."""

FINEST = 2**15 - 1
"""Largest value in the compiled search of any code, whose points are rounded to int16. Those of the computed code are small integers."""


def encode_rings(values: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Bits of the rings closest to `values` in squared error: int32 [rings, steps * step_bits / 32], in the bit order of `trellis`.

    values: float32 [rings, steps, 2], in units of the code; moved to the CPU and back if it lies elsewhere.
    The result depends neither on the number of threads nor on the other rings. Raises `QuantizerError` for shapes that make no ring.
    """
    if values.ndim != 3 or values.shape[2] != 2:
        raise QuantizerError(f"rings must have shape [rings, steps, 2], got {tuple(values.shape)}")
    steps = values.shape[1]
    check_ring(steps, step_bits, window_bits)
    if steps % 32:
        raise QuantizerError(f"a ring of {steps=} does not fill 32-bit words at every rate; use a multiple of 32")
    symbols = _search(values.detach().to("cpu", torch.float32), _table(step_bits, window_bits), step_bits, window_bits)
    return pack(torch.from_numpy(symbols.astype(np.int32)), step_bits).to(values.device)


def search_rings(values: NDArray[np.float32], points: NDArray[Any], step_bits: int) -> NDArray[np.uint16]:
    """The low `step_bits` bits of every window of the best rings found: [rings, steps].

    values: float32 [rings, steps, 2]. points: [2^window_bits, 2], the two weights of each window, in the same unit.
    """
    window_bits = len(points).bit_length() - 1
    check_ring(values.shape[1], step_bits, window_bits)
    code = torch.from_numpy(points.astype(np.float32))
    scale = FINEST / max(float(code.abs().max()), 1e-30)
    return _search(torch.from_numpy(values), _Table.of(nearest(code, step_bits), code, step_bits, scale), step_bits, window_bits)


def check_ring(steps: int, step_bits: int, window_bits: int) -> None:
    """Raise `QuantizerError` unless rings of so many steps hold such windows."""
    if not (1 <= step_bits <= window_bits <= steps * step_bits and step_bits <= 16):
        raise QuantizerError(f"a ring of {steps=} with {step_bits=} (1 to 16) must hold a window of {window_bits=}, no shorter than a step")


def joint_reach(steps: int, step_bits: int, window_bits: int) -> int:
    """Steps of the first pass on either side of the joint."""
    return min(steps // 2, JOINT_WINDOWS * -(-window_bits // step_bits))


class _Table:
    """The neighbours with their code points beside them, so that a search reads memory in order."""

    def __init__(self, listed: Neighbours, points: NDArray[np.int16], scale: float) -> None:
        self.listed, self.points, self.scale = listed, points, scale

    @property
    def nbytes(self) -> int:
        """Of the lists and the points."""
        return self.points.nbytes + self.listed.symbols.nbytes

    @staticmethod
    def of(listed: Neighbours, code: Tensor, step_bits: int, scale: float) -> "_Table":
        """Look up the code points [2^window_bits, 2] of all listed windows, `scale` times as large and rounded."""
        short = (code * scale).round().to(torch.int16).numpy()
        symbols = listed.symbols.numpy()
        suffix = np.arange(symbols.shape[2], dtype=np.int32) << step_bits
        points = np.empty((2, *symbols.shape), dtype=np.int16)
        for cell, mine in enumerate(symbols):
            points[:, cell] = short[suffix | mine].transpose(2, 0, 1)
        return _Table(listed, points, scale)


KEPT_BYTES = 1 << 30
"""Tables that are kept take this much together, or the last one alone more."""

_tables: OrderedDict[tuple[int, int], _Table] = OrderedDict()
_tables_lock = Lock()


def _table(step_bits: int, window_bits: int) -> _Table:
    """The table of the computed code. A mixed plan comes back to its quantizers layer after layer; what was used last is kept."""
    key = step_bits, window_bits
    with _tables_lock:
        if key not in _tables:
            with torch.inference_mode(False):
                code = codebook(step_bits, window_bits)
                _tables[key] = _Table.of(nearest(code, step_bits), code, step_bits, scale=1)
        _tables.move_to_end(key)
        while len(_tables) > 1 and sum(table.nbytes for table in _tables.values()) > KEPT_BYTES:
            _tables.popitem(last=False)
        return _tables[key]


def _search(values: Tensor, table: _Table, step_bits: int, window_bits: int) -> NDArray[np.uint16]:
    rings, steps, _ = values.shape
    search_ring = compiled("viterbi_kernel").search_ring
    reach = joint_reach(steps, step_bits, window_bits)
    suffixes = 1 << (window_bits - step_bits)
    cells = table.listed.cells(values).numpy()
    scaled = (values * table.scale).numpy()
    symbols = table.listed.symbols.numpy()
    found = np.empty((rings, steps), dtype=np.uint16)
    threads = max(1, min(Settings.from_environment().threads, rings))
    workspaces: SimpleQueue[tuple[NDArray[Any], NDArray[Any]]] = SimpleQueue()
    for _ in range(threads):
        workspaces.put((np.empty((2, suffixes), dtype=np.float32), np.empty((steps, suffixes), dtype=np.uint16)))

    def search(some: Iterable[int]) -> None:
        workspace = workspaces.get()
        for ring in some:
            search_ring(scaled[ring], cells[ring], symbols, table.points, *workspace, found[ring], reach, step_bits)
        workspaces.put(workspace)

    if threads == 1:
        search(range(rings))
        return found
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(search, (range(first, rings, threads) for first in range(threads))):
            pass
    return found
