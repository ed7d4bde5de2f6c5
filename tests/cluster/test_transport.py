"""What travels between processes arrives as it was, its tensors once each, and without those that are read where it arrives."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qpc.cluster.transport import bundled, unbundled
from qpc.errors import ModelError
from qpc.safetensors_source import OnDisk

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Value:
    """Several tensors, of which two may be one."""

    name: str
    tensors: tuple[Tensor, ...]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_tensors_arrive_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.randint(0, 99, shape).to(dtype)
    made = unbundled(bundled(Value("a", (sent, sent.mT if sent.ndim == 2 else sent))), CPU)
    assert made.name == "a" and made.tensors[0].dtype == dtype
    assert torch.equal(made.tensors[0], sent)
    assert torch.equal(made.tensors[1], sent.mT if sent.ndim == 2 else sent)


def test_a_tensor_that_is_met_twice_travels_once() -> None:
    tensor = torch.randn(100, 100)
    bundle = bundled(Value("a", (tensor, tensor, tensor.clone())))
    made = unbundled(bundle, CPU)
    assert made.tensors[0] is made.tensors[1] and made.tensors[0] is not made.tensors[2]
    assert 80_000 < bundle.nbytes < 82_000
    made.tensors[0].zero_()
    assert tensor.any(), "what arrives has memory of its own"


def test_what_is_in_a_file_is_read_where_it_is_seen(tmp_path: Path) -> None:
    stored = torch.randn(50, 20)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    lazy = OnDisk(tmp_path / "model.safetensors", "w", torch.bfloat16, CPU)
    here, there = bundled([lazy]), bundled([lazy], sees=lambda path: path == lazy.path)
    assert here.nbytes > 2000 > there.nbytes
    (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    assert torch.equal(unbundled(here, CPU)[0], stored.bfloat16())
    with pytest.raises(ModelError, match="cannot be read"):
        unbundled(there, CPU)
    (tmp_path / "moved.safetensors").rename(tmp_path / "model.safetensors")
    assert torch.equal(unbundled(there, CPU)[0], stored.bfloat16())
