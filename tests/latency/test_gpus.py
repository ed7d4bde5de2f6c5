"""A GPU by name, by file, or the one that is here; whatever else is asked for, the message says what to do."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import layer
from benchmarks.rows import RESULTS, read_rows
from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency import GPUS, Gpu, Profile, latency_of
from qpc.quant.palette import default_palette
from tests.latency.tables import file, full


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_known_gpu_has_times_for_the_whole_palette(gpu: Gpu) -> None:
    model = latency_of(gpu.name.upper())
    assert model == latency_of(gpu.name) == gpu.latency()
    for quantizer in (*default_palette().quantizers, None):
        for batch in (1, 8):
            assert model.latency(LinearShape(4096, 4096), quantizer, batch).ps > 0


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_table_that_ships_is_of_that_gpu(gpu: Gpu) -> None:
    model = gpu.latency()
    assert isinstance(model, Profile) == gpu.table.is_file()
    assert not isinstance(model, Profile) or model.gpu in gpu.devices


def test_a_shipped_table_predicts_the_layers_that_were_measured() -> None:
    """Of the H200, whose table times multiplications behind their transforms."""
    rows, model = read_rows(RESULTS / "nvidia-h200" / "layer.json"), latency_of("h200")
    offs = [layer.compared(model, row)["off"] for row in rows]
    assert len(offs) == 24 and max(map(abs, offs)) < 0.055 and sum(abs(off) > 0.05 for off in offs) <= 1


def test_a_file_is_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(file(full())))
    model = latency_of(str(path))
    assert model == latency_of(path) == latency_of(model) == Profile.load(path)
    assert model.title == "NVIDIA Toy, measured"


def test_what_is_no_gpu_says_what_to_do(tmp_path: Path) -> None:
    for gpu in ("h1000", tmp_path / "none.json", tmp_path):
        with pytest.raises(ProfileError, match=r"neither a known GPU \(h100.*python -m benchmarks profile"):
            latency_of(gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_must_be_named() -> None:
    with pytest.raises(ProfileError, match=r"this machine has none: name one \(h100.*python -m benchmarks profile"):
        latency_of(None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_of_this_machine_is_found_or_named() -> None:
    device = torch.cuda.get_device_name()
    if any(device in gpu.devices for gpu in GPUS):
        assert latency_of(None) == next(gpu for gpu in GPUS if device in gpu.devices).latency()
    else:
        with pytest.raises(ProfileError, match=device):
            latency_of(None)
