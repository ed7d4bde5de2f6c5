"""Values on their way between processes: pickled, but for their tensors, which travel as bytes and arrive on any device."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpc.safetensors_source import OnDisk
from qpc.tensor_files import raw


@dataclass(frozen=True)
class Shipped:
    """A tensor: its bytes, uint8 [nbytes], which Ray moves without pickling them."""

    content: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Shipped":
        """From any device."""
        return Shipped(np.frombuffer(raw(tensor), dtype=np.uint8), tensor.dtype, tuple(tensor.shape))

    def arrived(self, device: torch.device) -> Tensor:
        """The tensor, in memory of its own."""
        made = torch.empty(self.shape, dtype=self.dtype)
        made.view(-1).view(torch.uint8).numpy()[:] = self.content
        return made.to(device)


@dataclass(frozen=True)
class Bundle:
    """A value without its tensors, pickled, and these: one that is met twice is there once. Those in files are read where they arrive."""

    head: bytes
    tensors: tuple[Shipped | OnDisk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are moved."""
        return len(self.head) + sum(each.content.nbytes for each in self.tensors if isinstance(each, Shipped))


def bundled(value: object, sees: Callable[[Path], bool] = lambda path: False) -> Bundle:
    """A value to send. sees: whether a file of this machine can be read by whoever receives it; else what is in it is sent too."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    tensors: list[Shipped | OnDisk] = []
    for each in pickler.tensors:
        if isinstance(each, OnDisk):
            tensors.append(each if sees(each.path) else Shipped.of(each.read()))
        else:
            tensors.append(Shipped.of(each))
    return Bundle(buffer.getvalue(), tuple(tensors))


def unbundled(bundle: Bundle, device: torch.device) -> Any:
    """The value, its tensors on a device. Raises `ModelError` for a file that cannot be read."""
    tensors = [replace(each, device=device).read() if isinstance(each, OnDisk) else each.arrived(device) for each in bundle.tensors]
    return _Unpickler(bundle.head, tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them. (Through the door of pickle for objects that are kept elsewhere.)"""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor | OnDisk] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor | OnDisk):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    """Puts tensors where they were."""

    def __init__(self, head: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(head))
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
