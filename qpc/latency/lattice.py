"""Times measured on some points of a lattice, made monotone, and interpolated between its lines.

A multiplication takes `launch + max(bytes / bandwidth, weights / throughput)`, and both terms are products of what the axes count: rows,
columns, bits per weight. Interpolation that is linear along each axis contains such a product exactly, with any constants, and costs of
single rows or columns besides. Interpolation in logarithms would bend the launch.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Point = tuple[Fraction, ...]
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True)
class Lattice:
    """Times that never fall along any axis.

    axes: ascending lines of each. grows: for each axis, whether the work is proportional to it. times_ps: at each crossing, the last axis
    fastest. measured: whether the crossing was measured. launch_ps: the part of a time that does not grow.
    correction: largest relative change that it took to make the measured times monotone; 0 if they were.
    """

    axes: tuple[Point, ...]
    grows: tuple[bool, ...]
    times_ps: tuple[int, ...]
    measured: tuple[bool, ...]
    launch_ps: int
    correction: float

    @staticmethod
    def fit(points: Mapping[Point, int], grows: Sequence[bool], launch_ps: int) -> "Lattice":
        """The lattice of all the lines that the points (one or more) lie on; points: time [ps] at their coordinates, all positive.

        A measured time becomes the geometric mean of the longest at or below it on every axis and the shortest at or above it: itself if
        the measured times are monotone, else the monotone times whose largest relative error is smallest. A crossing that was not
        measured gets what the work predicts from the measured crossings below it, within the bounds that its neighbours set.
        """
        axes: tuple[Point, ...] = tuple(tuple(sorted(set(lines))) for lines in zip(*points, strict=True))
        shape = tuple(map(len, axes))
        raw = np.zeros(shape, dtype=np.int64)
        for point, time in points.items():
            raw[tuple(axis.index(x) for axis, x in zip(axes, point, strict=True))] = time
        measured = raw > 0
        at_most, at_least = _running_max(raw), _running_min(np.where(measured, raw, np.iinfo(np.int64).max))
        fitted = np.zeros(shape, dtype=np.int64)
        for index in map(tuple, np.argwhere(measured)):
            fitted[index] = math.isqrt(int(at_most[index]) * int(at_least[index]))
        correction = float((np.abs(fitted - raw) / np.where(measured, raw, 1)).max())
        times = _filled(fitted, measured, _work(axes, grows), launch_ps)
        return Lattice(axes, tuple(grows), tuple(times.ravel().tolist()), tuple(measured.ravel().tolist()), launch_ps, correction)

    def at(self, point: Point) -> tuple[int, bool]:
        """Time [ps] at some coordinates, and whether it lies between measured ones.

        Beyond the last line of an axis the time grows with the work; before the first one it is that of the first, since less work takes
        no longer. Neither is measured. Integers: the nearest to the exact value.
        """
        inside, stretch = True, Fraction(1)
        near: list[tuple[tuple[int, Fraction], ...]] = []
        for axis, grows, x in zip(self.axes, self.grows, point, strict=True):
            held = _held(axis, x)
            inside &= held == x
            if grows and x > held:
                stretch *= x / held
            near.append(_neighbours(axis, held))
        time, known = Fraction(0), True
        for corner in itertools.product(*near):
            place, share = 0, Fraction(1)
            for axis, (index, weight) in zip(self.axes, corner, strict=True):
                place, share = place * len(axis) + index, share * weight
            time += self.times_ps[place] * share
            known &= self.measured[place]
        growing = max(time - self.launch_ps, Fraction(0))
        return round(time + growing * (stretch - 1)), inside and known


def _held(axis: Point, x: Fraction) -> Fraction:
    """The coordinate nearest to x that an axis reaches."""
    return min(max(x, axis[0]), axis[-1])


def _neighbours(axis: Point, x: Fraction) -> tuple[tuple[int, Fraction], ...]:
    """Indices of the lines beside x, with their weights; one if x lies on it."""
    below = bisect_right(axis, x) - 1
    if axis[below] == x:
        return ((below, Fraction(1)),)
    share = (x - axis[below]) / (axis[below + 1] - axis[below])
    return ((below, 1 - share), (below + 1, share))


def _work(axes: Sequence[Point], grows: Sequence[bool]) -> NDArray[np.float64]:
    """The product of the coordinates that work grows with, at each crossing."""
    lines = [np.array([float(x) if grow else 1.0 for x in axis]) for axis, grow in zip(axes, grows, strict=True)]
    product: NDArray[np.float64] = math.prod(np.meshgrid(*lines, indexing="ij"), start=np.array(1.0))
    return product


def _filled(fitted: NDArray[np.int64], measured: NDArray[np.bool_], work: NDArray[np.float64], launch_ps: int) -> NDArray[np.int64]:
    """Times at every crossing, monotone; those measured stay."""
    slope = _running_max(np.where(measured, np.maximum(fitted - launch_ps, 0) / work, 0.0))
    predicted = launch_ps + np.rint(slope * work).astype(np.int64)
    bound = _running_min(np.where(measured, fitted, np.iinfo(np.int64).max))
    nothing_below = _running_max(measured.astype(np.int64)) == 0
    wanted = np.where(measured, fitted, np.where(nothing_below, bound, np.minimum(predicted, bound)))
    filled: NDArray[np.int64] = np.minimum(_running_max(wanted), bound)
    return filled


def _running_max(values: NDArray[Number]) -> NDArray[Number]:
    """The largest value at or before each place on every axis."""
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


def _running_min(values: NDArray[Number]) -> NDArray[Number]:
    """The smallest value at or after each place on every axis."""
    for axis in range(values.ndim):
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis=axis), axis)
    return values
