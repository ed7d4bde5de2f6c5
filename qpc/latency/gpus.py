"""The GPUs that are known by a name, and where their times come from: the table that ships with the package, else a roofline."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qpc.errors import ProfileError
from qpc.latency.model import LatencyModel
from qpc.latency.profile import Profile
from qpc.latency.roofline import H100, H200, Roofline

SHIPPED = Path(__file__).parent / "profiles"
"""Tables of `python -m benchmarks profile`, as NAME.json."""

MEASURE = "measure one there with `python -m benchmarks profile --json FILE` and give that file"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    name: what a user calls it. devices: what CUDA calls it. roofline: its times while no table of it ships.
    """

    name: str
    devices: tuple[str, ...]
    roofline: Roofline

    @property
    def table(self) -> Path:
        """Where its measured table lies, if it ships."""
        return SHIPPED / f"{self.name}.json"

    def latency(self) -> LatencyModel:
        """The best that is known of its times."""
        return Profile.load(self.table) if self.table.is_file() else self.roofline


GPUS = (Gpu("h100", ("NVIDIA H100 80GB HBM3",), H100), Gpu("h200", ("NVIDIA H200",), H200))


def latency_of(gpu: LatencyModel | Path | str | None) -> LatencyModel:
    """The latency model of a GPU.

    gpu: a known name ("h100"), the path of a table that `python -m benchmarks profile` wrote, a model itself, or None for the GPU of this
        machine.

    Raises `ProfileError` that lists the known names if there is no such name and no such file, if this machine has no GPU that is known,
    or if the file is no table.
    """
    if isinstance(gpu, LatencyModel):
        return gpu
    if gpu is None:
        return _here().latency()
    for known in GPUS:
        if str(gpu).lower() == known.name:
            return known.latency()
    if not Path(gpu).is_file():
        raise ProfileError(f"gpu={str(gpu)!r} is neither a known GPU ({_names()}) nor a file; {MEASURE}")
    return Profile.load(Path(gpu))


def _here() -> Gpu:
    """The GPU of this machine."""
    if not torch.cuda.is_available():
        raise ProfileError(f"a time is that of a GPU, and this machine has none: name one ({_names()}), or {MEASURE}")
    device = torch.cuda.get_device_name()
    for known in GPUS:
        if device in known.devices:
            return known
    raise ProfileError(f"no times are known of the GPU of this machine, {device}: name another ({_names()}), or {MEASURE}")


def _names() -> str:
    return ", ".join(gpu.name for gpu in GPUS)
