"""The table of `neighbours` on a CPU, compiled: the points of a suffix lie sorted by cell, and a cell looks around in growing squares."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

FIRST_REACH = 2
"""Cells to either side that are looked at first: 25 of them hold a dozen points, of which 8 are wanted."""


@njit(nogil=True, cache=True)
def _insert(best: NDArray[np.float32], found: NDArray[np.int32], distance: np.float32, point: int) -> None:
    """Put a point nearer than the last of the found ones in its place among them."""
    slot = len(best) - 1
    while slot > 0 and best[slot - 1] > distance:
        best[slot], found[slot] = best[slot - 1], found[slot - 1]
        slot -= 1
    best[slot], found[slot] = distance, point


@njit(nogil=True, cache=True)
def _list_suffix(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    edges: NDArray[np.float32],
    centres: NDArray[np.float32],
    symbols: NDArray[np.uint16],
    lane: int,
) -> None:
    """List the points [branches] nearest to the centre of each cell in `symbols[:, :, lane]`, nearest first.

    Cells of a row of the grid lie one behind the other, so that a square of cells is a few runs of points.
    """
    grid, slots = len(centres), symbols.shape[1]
    cell = np.searchsorted(edges, x) * grid + np.searchsorted(edges, y)
    start = np.zeros(grid * grid + 1, dtype=np.int32)
    for point in range(len(x)):
        start[cell[point] + 1] += 1
    start = np.cumsum(start)
    place = start[:-1].copy()
    members = np.empty(len(x), dtype=np.int32)
    for point in range(len(x)):
        members[place[cell[point]]] = point
        place[cell[point]] += 1
    u, v = x[members], y[members]
    best = np.empty(slots, dtype=np.float32)
    found = np.empty(slots, dtype=np.int32)
    for row in range(grid):
        for column in range(grid):
            best[:] = np.inf
            across, along = centres[row], centres[column]
            seen, reach = -1, FIRST_REACH
            while True:
                top, bottom, left, right = row - reach, row + reach, column - reach, column + reach
                low, high = max(left, 0), min(right, grid - 1) + 1
                for i in range(max(top, 0), min(bottom, grid - 1) + 1):
                    line, again = i * grid, abs(i - row) <= seen
                    # Of a row that was looked at before only what lies to either side of that.
                    end, next_low = (max(column - seen, 0), min(column + seen, grid - 1) + 1) if again else (high, high)
                    for index in range(start[line + low], start[line + end]):
                        distance = (u[index] - across) ** 2 + (v[index] - along) ** 2
                        if distance < best[slots - 1]:
                            _insert(best, found, distance, members[index])
                    for index in range(start[line + next_low], start[line + high]):
                        distance = (u[index] - across) ** 2 + (v[index] - along) ** 2
                        if distance < best[slots - 1]:
                            _insert(best, found, distance, members[index])
                safe = np.float32(np.inf)  # all points nearer than this have been seen
                if top > 0:
                    safe = min(safe, across - edges[top - 1])
                if bottom < grid - 1:
                    safe = min(safe, edges[bottom] - across)
                if left > 0:
                    safe = min(safe, along - edges[left - 1])
                if right < grid - 1:
                    safe = min(safe, edges[right] - along)
                if best[slots - 1] <= safe * safe:
                    break
                seen, reach = reach, reach + 1
            for slot in range(slots):
                symbols[row * grid + column, slot, lane] = found[slot]


@njit(nogil=True, cache=True)
def list_windows(
    points: NDArray[np.float32],
    step_bits: int,
    edges: NDArray[np.float32],
    centres: NDArray[np.float32],
    symbols: NDArray[np.uint16],
    first: int,
    last: int,
) -> None:
    """Fill the symbols of `Neighbours`, uint16 [grid^2, slots, suffixes], for the suffixes `first` to `last`.

    They are gathered in a buffer first, since neighbours in memory belong to neighbouring suffixes.
    """
    branches = 1 << step_bits
    buffer = np.empty((symbols.shape[0], symbols.shape[1], last - first), dtype=np.uint16)
    for suffix in range(first, last):
        own = points[suffix * branches : (suffix + 1) * branches]
        _list_suffix(own[:, 0].copy(), own[:, 1].copy(), edges, centres, buffer, suffix - first)
    symbols[:, :, first:last] = buffer
