"""Which windows a search of the trellis must try: the code points of each suffix that lie nearest to a target.

A window s of L bits is a suffix u = s >> k and a symbol r, its low k bits. Of the 2^k windows that end in one suffix only those near the
target can lie on the best walk, since a far one costs more at once than any state of the trellis is worth. So the plane of targets is cut
into cells, about two for each window of a suffix, and for each cell and suffix the `SLOTS` windows nearest to the centre of the cell are
listed once. The search then does 2^(L-k) * SLOTS steps of work instead of 2^L: with 8 slots nothing is lost that could be measured
(`benchmarks/results/nvidia-h100/NOTES.md`), at 4 bits per weight it visits 32 times fewer, and windows can be as long as L = 24.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]
from torch import Tensor

from qpc.quant.codebook import codebook
from qpc.quant.compiled import compiled
from qpc.settings import Settings

SLOTS = 8
"""Windows listed for each cell and suffix. With 6 the loss is 0.003 dB at 3 bits, with 4 it is 0.2 dB."""

CELLS_PER_WINDOW = 2
"""Cells for each window of a suffix. With 1 the loss is 0.03 dB at 3 and 4 bits."""

GRID_SPREAD = 1.6
"""Deviation of the Gaussian whose quantiles bound the cells, over that of the code: cells widen outwards as the code points thin out."""

SUFFIXES_AT_ONCE = 64
"""Suffixes that one thread lists before it writes them out."""

CHUNK_VALUES = 1 << 28
"""Distances held at once while a table is made on a GPU."""


@dataclass(frozen=True)
class Neighbours:
    """The windows to try.

    edges: float32 [grid - 1], ascending: bounds of the cells along either axis, in units of the code.
    symbols: uint16 [grid^2, slots, 2^(L-k)]: low bits of the listed windows, nearest first, by cell (first coordinate * grid + second).
    """

    edges: Tensor
    symbols: Tensor

    @property
    def slots(self) -> int:
        """Windows listed for each cell and suffix."""
        return self.symbols.shape[1]

    def cells(self, values: Tensor) -> Tensor:
        """The cell of each target: float32 [..., 2] -> int32 [...]."""
        first, second = (torch.bucketize(values[..., axis].contiguous(), self.edges) for axis in (0, 1))
        return (first * (len(self.edges) + 1) + second).int()


@lru_cache(maxsize=16)
def neighbours(step_bits: int, window_bits: int, device: torch.device) -> Neighbours:
    """The table of the computed code, made once on each device."""
    with torch.inference_mode(False):
        return nearest(codebook(step_bits, window_bits).to(device), step_bits)


def nearest(points: Tensor, step_bits: int) -> Neighbours:
    """The table of any code: points float32 [2^window_bits, 2]."""
    branches = 1 << step_bits
    slots = min(SLOTS, branches)
    grid = max(1, round((CELLS_PER_WINDOW * branches) ** 0.5)) if branches > slots else 1
    spread = GRID_SPREAD * float(points.double().std())
    edges, centres = (torch.tensor(spread * ndtri(places), dtype=torch.float32) for places in _places(grid))
    if points.device.type == "cpu":
        symbols = _nearest_on_cpu(points, step_bits, slots, edges, centres)
    else:
        symbols = _nearest_on_gpu(points, step_bits, slots, centres.to(points.device))
    return Neighbours(edges.to(points.device), symbols)


def _places(grid: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Shares of the distribution at the edges and at the centres of the cells."""
    return np.arange(1, grid) / grid, (np.arange(grid) + 0.5) / grid


def _nearest_on_cpu(points: Tensor, step_bits: int, slots: int, edges: Tensor, centres: Tensor) -> Tensor:
    list_windows = compiled("neighbours_kernel").list_windows
    suffixes = len(points) >> step_bits
    symbols = np.empty((len(centres) ** 2, slots, suffixes), dtype=np.uint16)
    arguments = (points.numpy(), step_bits, edges.numpy(), centres.numpy(), symbols)
    with ThreadPoolExecutor(Settings.from_environment().threads) as pool:
        firsts = range(0, suffixes, SUFFIXES_AT_ONCE)
        for _ in pool.map(lambda first: list_windows(*arguments, first, min(first + SUFFIXES_AT_ONCE, suffixes)), firsts):
            pass
    return torch.from_numpy(symbols)


def _nearest_on_gpu(points: Tensor, step_bits: int, slots: int, centres: Tensor) -> Tensor:
    grid, suffixes = len(centres), len(points) >> step_bits
    symbols = torch.empty((grid * grid, slots, suffixes), dtype=torch.uint16, device=points.device)
    chunk = max(1, CHUNK_VALUES // len(points))
    for start in range(0, grid * grid, chunk):
        cell = torch.arange(start, min(start + chunk, grid * grid), device=points.device)
        across, along = (centres[index][:, None] - points[:, axis] for axis, index in ((0, cell // grid), (1, cell % grid)))
        distance = (across.square_() + along.square_()).reshape(len(cell), suffixes, 1 << step_bits)
        for slot in range(slots):
            found = distance.argmin(dim=2, keepdim=True)
            symbols[cell[0] : cell[-1] + 1, slot] = found[..., 0].int().to(torch.uint16)
            distance.scatter_(2, found, torch.inf)
    return symbols
