"""Tensors of a checkpoint that is being made, written into its files where they belong as soon as they are known.

All sizes are known once quantizers are chosen, so the files have their headers and their full size from the beginning: a disk that is too
small is found out before any work, and nothing is copied in the end. Each finished step is on the disk before the journal says so.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qpc.errors import CheckpointError
from qpc.passes.shelf import Facts
from qpc.progress import Progress, silent, track
from qpc.quant.quantizer import PackedWeight
from qpc.tensor_files import DTYPES, Stored, digest, outline, raw, shards
from qpc.work_in_progress import WorkInProgress


class DiskShelf:
    """A `Shelf`, and a place for all other tensors. A context manager, for its files are open.

    checksums: of every tensor that is finished, by name. What the journal calls finished is read again at the beginning, and made again
    where it is not on the disk.
    """

    def __init__(self, work: WorkInProgress, layout: Mapping[str, Tensor], shard_bytes: int, progress: Progress = silent) -> None:
        """layout: every tensor of the checkpoint by name, on the meta device or not."""
        self.checksums: dict[str, str] = {}
        self._work, self._layout, self._shard_bytes, self._progress = work, layout, shard_bytes, progress
        self._places: dict[str, Stored] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._files = ExitStack()
        self._handles: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Open the files. Raises `CheckpointError` if the disk is too small for them."""
        with ExitStack() as opened, self._work.writing():
            for file, tensors in shards(self._layout, self._shard_bytes).items():
                self._places |= self._prepare(file, tensors, opened)
            self._files = opened.pop_all()
        finished = {entry["step"]: entry for entry in self._work.entries if "checksums" in entry}
        for step, entry in track(finished.items(), "check", len(finished), self._progress):
            sums = entry["checksums"]
            if all(name in self._places and self._places[name].checksum() == checksum for name, checksum in sums.items()):
                self._done[step] = entry
                self.checksums |= sums
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    @property
    def names(self) -> list[str]:
        """Every tensor of the checkpoint."""
        return list(self._places)

    def find(self, weight: str) -> Facts | None:
        """The facts of a weight that is finished."""
        entry = self._done.get(_weight_step(weight))
        return None if entry is None else Facts(**(entry["facts"] | {"kurtosis": tuple(entry["facts"]["kurtosis"])}))

    def put(self, weight: str, sites: Sequence[str], packed: PackedWeight, facts: Facts) -> None:
        """Write the tensors of a packed weight, under those of its sites that have a place of their own."""
        signs = packed.scales.new_empty(0, dtype=torch.uint8) if packed.rotation is None else packed.rotation.signs
        leaves = {f"codes{index}": part for index, part in enumerate(packed.codes)} | {"scales": packed.scales, "signs": signs}
        named = {f"{site}.{leaf}": [tensor] for site in sites for leaf, tensor in leaves.items() if f"{site}.{leaf}" in self._places}
        self._finish(_weight_step(weight), named, facts=asdict(facts))

    def has(self, name: str) -> bool:
        """Whether a tensor is finished."""
        return name in self.checksums

    def copy(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write a tensor that comes in pieces along its first axis."""
        self._finish(f"tensor {name}", {name: pieces})

    def _prepare(self, file: str, tensors: Mapping[str, Tensor], opened: ExitStack) -> dict[str, Stored]:
        """Open a file, with its header and its full size."""
        path = self._work.directory / file
        head, places = outline(path, tensors)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        opened.callback(os.close, handle)
        self._handles[file] = handle
        size = max((place.stop for place in places.values()), default=len(head))
        os.ftruncate(handle, min(size, os.fstat(handle).st_size))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.ftruncate(handle, size)
        except OSError as error:
            raise CheckpointError(f"{path} needs {size} bytes: {error.strerror or error}; make room and start again") from error
        _write_at(handle, head, 0)
        os.fsync(handle)
        return places

    def _finish(self, step: str, named: Mapping[str, Iterable[Tensor]], **told: Any) -> None:
        """Write tensors, wait until they are on the disk, and note it."""
        sums: dict[str, str] = {}
        with self._work.writing():
            for name, pieces in named.items():
                sums[name] = self._write(name, pieces)
            for handle in {self._handles[self._places[name].file.name] for name in named}:
                os.fsync(handle)
        self._work.record(step=step, checksums=sums, **told)
        self.checksums |= sums

    def _write(self, name: str, pieces: Iterable[Tensor]) -> str:
        place = self._places[name]
        handle = self._handles[place.file.name]

        def written() -> Iterable[memoryview]:
            start = place.start
            for piece in pieces:
                assert DTYPES[piece.dtype] == place.dtype, f"{name} is {piece.dtype}"
                content = raw(piece)
                _write_at(handle, content, start)
                start += len(content)
                yield content
            assert start == place.stop, f"{name} has {start - place.start} bytes, its place {place.nbytes}"

        return digest(place.dtype, place.shape, written())


def _weight_step(weight: str) -> str:
    return f"weight {weight}"


def _write_at(handle: int, content: bytes | memoryview, start: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count
