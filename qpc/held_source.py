"""A part of a model's values, read once and kept while it is worked on."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qpc.safetensors_source import OnDisk, SafetensorsSource


class HeldSource:
    """A `Source` that keeps what was read of the tensors that are held; all others are read anew each time.

    reads: how often each tensor was read as a whole. most_bytes: what was kept at most.
    """

    def __init__(self, source: SafetensorsSource) -> None:
        self.device: torch.device = source.device
        self.reads: dict[str, int] = {}
        self.most_bytes = 0
        self._source = source
        self._kept: dict[str, Tensor | None] = {}

    def hold(self, names: Iterable[str]) -> None:
        """Keep these from now on, once they are read, and nothing else."""
        self._kept = {name: self._kept.get(name) for name in names}

    def read(self, name: str) -> Tensor:
        """The values, in the shape and dtype that the module has, not to be modified. Raises `ModelError` if they cannot be read."""
        value = self._kept.get(name)
        if value is None:
            value = self._source.read(name)
            self.reads[name] = self.reads.get(name, 0) + 1
            if name in self._kept:
                self._kept[name] = value
                self.most_bytes = max(self.most_bytes, sum(kept.nbytes for kept in self._kept.values() if kept is not None))
        return value

    def find(self, name: str) -> Tensor | OnDisk:
        """Where the values are: in memory, if they are kept."""
        value = self._kept.get(name)
        return self._source.find(name) if value is None else value

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The same, some rows after the other; nothing of it is kept."""
        return self._source.pieces(name)
