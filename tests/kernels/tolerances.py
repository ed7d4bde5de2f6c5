"""The one table of tolerances of the kernels. CI may not loosen it."""

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest allowed Frobenius norm of the error over that of the oracle. The interpreter truncates to bfloat16, hence twice its rounding."""

OPERAND_STEPS = 0.55
"""Largest allowed error of a projection in an operand, in steps of its scale: half of one for rounding, the rest for float32 before it."""

ENCODER = 1e-5
"""Largest allowed relative excess of the encoder's squared error over the oracle's."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN or a wrong shape never passes."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference, scale = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / scale) if scale else float(difference)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Fail unless `actual` is within the tolerance of its dtype."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    error = relative_error(actual, expected)
    assert error <= RELATIVE[actual.dtype], f"relative error {error:.2e} exceeds {RELATIVE[actual.dtype]:.0e} of {actual.dtype}"
