"""What has to be alike in two processes for their results to be alike, to the byte."""

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from qpc.errors import SettingsError

PACKAGES = ("numpy", "numba", "llvmlite", "triton")
"""What else computes or compiles."""


@dataclass(frozen=True)
class Conditions:
    """Those of one process.

    versions: by name, of everything that computes. threads: into which PyTorch cuts sums. precision: of products of float32 on a GPU.
    """

    versions: tuple[tuple[str, str], ...]
    threads: int
    precision: str

    @staticmethod
    def here(device: torch.device) -> "Conditions":
        """Of this process, for what is computed on such a device."""
        return Conditions(_versions(device.type), torch.get_num_threads(), torch.get_float32_matmul_precision())

    def adopt(self, device: torch.device, cores: int = 1) -> None:
        """Let this process compute as that one does, with a thread of the encoder, whose results do not depend on threads, for each core.

        Raises `SettingsError` if its versions are others.
        """
        own = dict(_versions(device.type))
        other = [f"{name} {own.get(name)} instead of {wanted}" for name, wanted in self.versions if own.get(name) != wanted]
        if other:
            raise SettingsError(f"a worker on {platform.node()} has {', '.join(other)}; install the same on all machines, or bytes differ")
        os.environ["QPC_THREADS"] = str(cores)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)


@cache
def _versions(kind: str) -> tuple[tuple[str, str], ...]:
    """Of this process, for a kind of device."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, "qpc": _sources()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if kind == "cpu":
        found["vector instructions"] = torch.backends.cpu.get_cpu_capability()
    return tuple(found.items())


def _sources() -> str:
    """A digest of all modules of qpc: one version number stands for many states of it while it is developed."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"with sources {digest.hexdigest()[:12]}"
