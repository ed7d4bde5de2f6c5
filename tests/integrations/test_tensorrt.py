"""What can be said of TensorRT without it: what stays in PyTorch, and what is refused."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest
from torch import nn

import qpc
from qpc.errors import SettingsError
from qpc.integrations import tensorrt
from qpc.integrations.tensorrt import Runtime
from qpc.kernels.linear import operator
from qpc.kernels.lookup import lookup_operator
from qpc.quant.palette import Family, default_palette, palette_of


def test_the_operators_of_all_quantizers_stay_in_pytorch() -> None:
    quantizers = (*default_palette().quantizers, *palette_of(Family.PAIRS, Family.QUADRUPLES).quantizers)
    used = {operator(quantizer, 64)[0] for quantizer in quantizers} | {lookup_operator(default_palette().at(Fraction(4)), 64)[0]}
    assert used < tensorrt.operators()
    assert {str(each) for each in tensorrt.operators()} >= {
        "qpc.rotate.default",
        "qpc.operand_linear.default",
        "qpc.decode_attention.default",
    }


def test_runtimes_have_names(tmp_path: Path) -> None:
    assert Runtime.parse("tensorrt") is Runtime.parse(Runtime.TENSORRT) is Runtime.TENSORRT
    with pytest.raises(SettingsError, match="unknown runtime 'abacus'; known: pytorch, tensorrt"):
        qpc.load(tmp_path, runtime="abacus")


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is installed")
def test_its_package_is_asked_for() -> None:
    with pytest.raises(SettingsError, match=r"needs torch_tensorrt .*pip install 'qpc\[tensorrt\]'"):
        tensorrt.attach(nn.Linear(2, 2))
