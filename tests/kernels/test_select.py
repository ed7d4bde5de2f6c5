"""Which implementation runs, and why not."""

import pytest
import torch

from qpc.errors import KernelError
from qpc.kernels.select import Implementation, supports, supports_one_launch, supports_rotation


def test_cpu() -> None:
    assert supports(torch.device("cpu"), torch.float64).require() is Implementation.CPU
    assert supports_rotation(576, torch.device("cpu"), torch.bfloat16).require() is Implementation.CPU


def test_other_devices_say_why_not() -> None:
    found = supports(torch.device("xpu"), torch.float32)
    assert found.implementation is None
    with pytest.raises(KernelError, match=r"xpu.*required cpu or an NVIDIA GPU"):
        found.require()


def test_one_launch_transforms_one_block_of_a_row() -> None:
    assert supports_one_launch(14336, 14336).require() is Implementation.TRITON
    for features, block, reason in ((14336, 512, "28 blocks"), (18944, 18944, "128 x 148"), (24, 24, "2 x 12")):
        found = supports_one_launch(features, block)
        assert found.require() is Implementation.TORCH and reason in found.reason, found


def test_unsupported_dtype_on_a_gpu() -> None:
    with pytest.raises(KernelError, match="float64"):
        supports(torch.device("cuda"), torch.float64).require()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu() -> None:
    device = torch.device("cuda")
    assert supports(device, torch.bfloat16).require() is Implementation.TRITON
    assert supports_rotation(1 << 15, device, torch.float32).require() is Implementation.TRITON
    assert supports_rotation(1 << 16, device, torch.float32).require() is Implementation.TORCH
