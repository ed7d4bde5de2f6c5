"""Check in Triton's interpreter what the GPU benchmarks time: `TRITON_INTERPRET=1 python -m tests.benchmarks.interpreted_adapters`."""

from fractions import Fraction

import torch

from benchmarks.adapters import dequantizations, multiplications
from benchmarks.plan import scalar, trellis, vector
from benchmarks.timing import check
from benchmarks.weights import activations, random_weights
from tests.kernels.interpreting import without_waste


def main() -> None:
    without_waste()
    torch.set_num_threads(1)
    for subject in (*trellis(Fraction(3), Fraction(13, 4)), *scalar(3), *vector(3)):
        weights = random_weights(subject.quantizer, (96, 160), 2, "cpu")
        x = activations(2, 160, "cpu").float()  # the interpreter truncates to bfloat16 where a GPU rounds
        for weight, call, decode in zip(weights, multiplications(weights, x), dequantizations(weights, torch.float32), strict=True):
            check(call, weight.product(x), 1e-6)
            check(decode, weight.decoded(), 1e-6)
    print("equal")


if __name__ == "__main__":
    main()
