"""Makes the codebooks of `qpc.quant.vector`: `python -m benchmarks.codebooks`. Prints the table of their distortion.

The algorithm of Linde, Buzo and Gray (IEEE Trans. Comm. 28, 1980) for a unit Gaussian: k-means over the points of a scrambled Sobol
sequence, the last rounds over 2^20 of them. It starts from points drawn at the density that is best for many of them (P. Zador, IEEE Trans.
Inf. Theory 28, 1982): proportional to f^(d / (d + 2)), which is a Gaussian of variance (d + 2) / d. All is decided by the seed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.spatial import cKDTree  # type: ignore[import-untyped]
from scipy.special import ndtri  # type: ignore[import-untyped]
from scipy.stats import qmc  # type: ignore[import-untyped]

from qpc.quant.vector import BITS, CODEBOOKS, codebook_name

SEED = 20
SCHEDULE = ((60, 1 << 17), (12, 1 << 20))
"""Rounds, and how many points of the sequence they use."""


def lloyd(dimension: int, bits: int, schedule: tuple[tuple[int, int], ...] = SCHEDULE) -> NDArray[np.float16]:
    """A codebook of 2^bits points, float16 [2^bits, dimension], sorted by its columns."""
    points = np.random.default_rng(SEED).standard_normal((1 << bits, dimension)) * np.sqrt((dimension + 2) / dimension)
    for rounds, count in schedule:
        samples = ndtri(qmc.Sobol(dimension, seed=SEED).random(count))
        for _ in range(rounds):
            nearest = cKDTree(points).query(samples, workers=-1)[1]
            mass = np.bincount(nearest, minlength=len(points))
            moments = [np.bincount(nearest, weights=samples[:, axis], minlength=len(points)) for axis in range(dimension)]
            points = np.where(mass[:, None] > 0, np.stack(moments, axis=1) / np.maximum(mass, 1)[:, None], points)
    return points[np.lexsort(points.T[::-1])].astype(np.float16)


def measured_distortion(points: NDArray[np.float16], samples: int = 1 << 20) -> float:
    """Mean squared error of each coordinate of Gaussian vectors that took no part in the making."""
    fresh = np.random.default_rng(SEED + 1).standard_normal((samples, points.shape[1]))
    distance = cKDTree(points.astype(np.float64)).query(fresh, workers=-1)[0]
    return float(np.square(distance).mean() / points.shape[1])


def main() -> None:
    """Make the codebooks, print their distortion, and write the file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", type=Path, default=CODEBOOKS, help="the safetensors file to write")
    output = arguments.parse_args().output
    made = {}
    for dimension, rates in BITS.items():
        for bits in rates:
            points = lloyd(dimension, bits)
            print(f"({dimension}, {bits}): {measured_distortion(points):.4g},", flush=True)
            made[codebook_name(dimension, bits)] = torch.from_numpy(points)
    save_file(made, output)


if __name__ == "__main__":
    main()
