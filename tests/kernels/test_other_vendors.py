"""The plain form of the kernels compiles for GPUs of AMD, without inline PTX. No GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

COMPILE = """
import torch
torch.version.hip = "7.0"  # what a build of PyTorch for such a GPU says; whether kernels are plain is decided when they are imported
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.kernels.test_compiles import KERNELS

LARGE = {"SUFFIX_BITS": 13, "POWER": 8192, "BATCH": 3}  # what is unrolled so far takes minutes
for name, kernel, types, constants, warps in KERNELS:
    if any(constants.get(key, 0) >= least for key, least in LARGE.items()):
        continue
    signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, {})
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": warps})
    assert "s_endpgm" in compiled.asm["amdgcn"], name
    print(name)
"""


def test_every_portable_kernel_compiles_for_gfx942() -> None:
    """In a process of its own, since here the kernels were imported for NVIDIA."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 6
