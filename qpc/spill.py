"""Activations that wait on the disk for the next part of a model: of one place in it, and of the next while that is being written.

So two files exist at most, each of the size of what passes one place: positions times width times bytes of a value. A file gets its name
once it is whole and on the disk, and the journal knows the checksum of each value in it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpc.tensor_files import DTYPES, Stored, digest, raw
from qpc.work_in_progress import WorkInProgress

PREFIX = "activations-"
"""How the names of such files begin, in the directory of the work."""

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Spill:
    """The values before some parts of a model, by number of the part, of one of the sweeps through it.

    most_bytes: what the files have held at most, all together.
    """

    def __init__(self, work: WorkInProgress, sweep: str) -> None:
        """What is whole on the disk of this sweep is there again."""
        self.most_bytes = 0
        self._work, self._sweep = work, sweep
        self._values: dict[int, list[Stored]] = {}
        for entry in work.entries:
            if str(entry.get("step")).startswith(f"{PREFIX}{sweep}-"):
                number = int(entry["part"])
                values = [Stored(self._path(number), dtype, tuple(shape), start, stop) for dtype, shape, start, stop, _ in entry["values"]]
                if _intact(values, [checksum for *_, checksum in entry["values"]]):
                    self._values[number] = values

    def newest(self, most: int) -> int:
        """The last part up to this one before which values are there; 0 if there are none."""
        return max((number for number in self._values if number <= most), default=0)

    def has(self, number: int) -> bool:
        """Whether the values before a part are there."""
        return number in self._values

    def read(self, number: int, index: int) -> Tensor:
        """One of the values before a part, in the order in which they were written; on the CPU."""
        stored = self._values[number][index]
        with self._work.writing():
            content = bytearray(b"".join(stored.pieces()))
        return torch.frombuffer(content, dtype=_DTYPES[stored.dtype]).reshape(stored.shape)

    def drop_before(self, number: int) -> None:
        """Forget what comes before a part, and whatever else other sweeps have left."""
        self._values = {part: values for part, values in self._values.items() if part >= number}
        known = {self._path(part) for part in self._values}
        with self._work.writing():
            for path in self._work.directory.glob(f"{PREFIX}*"):
                if path not in known:
                    path.unlink()

    def clear(self) -> None:
        """Forget all of it."""
        self.drop_before(max(self._values, default=0) + 1)

    @contextmanager
    def writing(self, number: int) -> Iterator["Writer"]:
        """Write the values before a part, one after the other; they are there once this ends well. Raises `CheckpointError`."""
        path, partial = self._path(number), self._work.directory / f"{PREFIX}unfinished"
        with self._work.writing():
            with partial.open("wb") as file:
                writer = Writer(file, path)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._work.record(step=path.name, part=number, values=writer.entries)
        self._values[number] = writer.stored
        self.most_bytes = max(self.most_bytes, sum(value.nbytes for values in self._values.values() for value in values))

    def _path(self, number: int) -> Path:
        return self._work.directory / f"{PREFIX}{self._sweep}-{number:05d}"


class Writer:
    """A file of values that grows. stored: what is in it. entries: the same with its checksums, as JSON has it."""

    def __init__(self, file: Any, path: Path) -> None:
        self.stored: list[Stored] = []
        self.entries: list[list[Any]] = []
        self._file, self._path = file, path

    def append(self, value: Tensor) -> None:
        """Write one more."""
        content, dtype, shape = raw(value), DTYPES[value.dtype], tuple(value.shape)
        start = self.stored[-1].stop if self.stored else 0
        self._file.write(content)
        self.stored.append(Stored(self._path, dtype, shape, start, start + len(content)))
        self.entries.append([dtype, list(shape), start, start + len(content), digest(dtype, shape, [content])])


def _intact(values: list[Stored], checksums: list[str]) -> bool:
    """Whether all of them are on the disk as they were written."""
    try:
        return all(value.checksum() == checksum for value, checksum in zip(values, checksums, strict=True))
    except OSError:
        return False
