"""The values of a model in the safetensors files of its directory, read one at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpc.errors import ModelError

PIECE_BYTES = 64 << 20
"""As much of a tensor is in memory at once where it is read in pieces."""


@dataclass(frozen=True)
class OnDisk:
    """A whole tensor of a file that is not read yet. dtype: that it gets. device: where it is put."""

    path: Path
    name: str
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """The values. Raises `ModelError` if they cannot be read."""
        with _opened(self.path) as file:
            values: Tensor = file.get_tensor(self.name)
            return values.to(self.device, self.dtype, copy=True)


class SafetensorsSource:
    """Reads parameters and buffers by the qualified names that the module has for them.

    A file is opened for each tensor and closed again, since what was read of an open one may stay in memory. What is stored in another
    dtype is converted, as transformers does.
    """

    def __init__(self, directory: Path, live: Mapping[str, Tensor], device: torch.device, prefix: str = "") -> None:
        """live: every parameter and buffer by each of its names, tied ones under all of them. prefix: of names that the files may lack.

        Raises `ModelError` if a parameter is not stored under any of its names, or in another shape.
        """
        self.device = device
        self.directory = directory
        self._live = live
        self._stored: dict[str, tuple[Path, str]] = {}
        found = {name: path for path in sorted(directory.glob("*.safetensors")) for name in _names(path)}
        names: dict[int, list[str]] = {}
        for name, value in live.items():
            names.setdefault(id(value), []).append(name)
        for name, value in live.items():
            wanted = [other for tied in (name, *names[id(value)]) for other in (tied, tied.removeprefix(prefix))]
            stored = next((other for other in wanted if other in found), None)
            if stored is not None:
                self._stored[name] = found[stored], stored
                self._check_shape(name)
            elif value.is_meta:
                raise ModelError(
                    f"{directory} stores no tensor {name}; a model that is read piece by piece must store its parameters under their names"
                )

    def read(self, name: str) -> Tensor:
        """The values, in the shape and dtype that the module has. Raises `ModelError` if they cannot be read."""
        return self.find(name).read()

    def find(self, name: str) -> OnDisk:
        """Where the values are."""
        return OnDisk(*self._stored[name], self._live[name].dtype, self.device)

    def pieces(self, name: str, most_bytes: int = PIECE_BYTES) -> Iterator[Tensor]:
        """The same, some rows after the other. Raises `ModelError` as `read` does."""
        live = self._live[name]
        path, stored = self._stored[name]
        rows = live.shape[0] if live.ndim else 1
        step = max(1, most_bytes * rows // max(1, live.nbytes)) if live.ndim else rows
        for start in range(0, max(1, rows), max(1, step)):
            with _opened(path) as file:
                piece = file.get_slice(stored)[start : start + step] if live.ndim else file.get_tensor(stored)
                yield piece.to(self.device, live.dtype, copy=True)

    def _check_shape(self, name: str) -> None:
        path, stored = self._stored[name]
        with _opened(path) as file:
            shape = tuple(file.get_slice(stored).get_shape())
        if shape != tuple(self._live[name].shape):
            raise ModelError(f"{stored} in {path} has shape {shape}, the model needs {tuple(self._live[name].shape)}")


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; the model is cut short or damaged") from error
