"""Where the values of a model are that is larger than memory."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from qpc.safetensors_source import OnDisk


class Source(Protocol):
    """Reads parameters and buffers by qualified name, each when it is asked for; the module has them on the meta device.

    device: where what is read is put.
    """

    device: torch.device

    def read(self, name: str) -> Tensor:
        """The values, in the shape and dtype that the module has. Raises `QpcError` if they cannot be read."""

    def find(self, name: str) -> Tensor | OnDisk:
        """The values, or where they are."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same, some rows after the other. Raises `QpcError` as `read` does."""
