"""What damaged input once did, defect by defect; `tests/fuzz` looks for more."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qpc
from qpc.errors import CheckpointError, ModelError, QuantizerError
from qpc.plain_files import parse_json, read_json, require_regular
from qpc.quant.quantizer import Quantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.vector import VectorQuantizer
from qpc.sensitivity import Loss, Sensitivities
from qpc.sensitivity.values import LARGEST
from qpc.tensor_files import TENSORS, header, read
from tests.fuzz.targets import Toy, toy


def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    """A reader would wait for a writer until the end of time."""
    for name in (TENSORS, "qpc.json", "other"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="no regular file"):
        require_regular(tmp_path / "other")
    with pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "other")
    for open_it in (lambda: qpc.load(tmp_path), lambda: header(tmp_path / TENSORS), lambda: read(tmp_path)):
        with pytest.raises(CheckpointError):
            open_it()


def test_nesting_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    deep = "[" * 200_000
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(deep)
    (tmp_path / "qpc.json").write_text(deep)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        qpc.load(tmp_path)
    assert parse_json("[[1], {}]") == [[1], {}]


def test_a_gain_of_integers_is_refused(tmp_path: Path) -> None:
    qpc.save(toy(), tmp_path / "toy")
    tensors = load_file(tmp_path / "toy" / TENSORS)
    save_file(tensors | {"norm.weight": torch.ones(64, dtype=torch.int64)}, tmp_path / "toy" / TENSORS)
    with pytest.raises(CheckpointError, match=r"norm\.weight is torch\.int64, it must be torch\.float32"):
        qpc.load(tmp_path / "toy", Toy())
    save_file(tensors | {"norm.weight": torch.ones(64, dtype=torch.float16)}, tmp_path / "toy" / TENSORS)
    assert isinstance(qpc.load(tmp_path / "toy", Toy()), nn.Module), "another floating dtype is none of our business"


@pytest.mark.parametrize("quantizer", [ScalarQuantizer(4), VectorQuantizer(2, 6)], ids=str)
def test_rows_that_would_decode_to_infinity_are_refused(quantizer: Quantizer) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert quantizer.dequantize(quantizer.quantize(weight * 1e37)).isfinite().all()
    with pytest.raises(QuantizerError, match="too large for a bfloat16 scale"):
        quantizer.quantize(weight.sign() * 3.3e38)


def test_sensitivities_have_a_largest() -> None:
    assert Sensitivities({"only": LARGEST}, Loss.KL, 0.0, 0, 1).values["only"] == LARGEST
    for value in (2 * LARGEST, -1.0, math.nan, math.inf):
        with pytest.raises(ModelError, match="the sensitivity of only is"):
            Sensitivities({"only": value}, Loss.KL, 0.0, 0, 1)
