"""Work that goes on where it was interrupted: a directory OUT.partial that fills up, and OUT.journal, which says what of it is finished.

The journal is a line of JSON for each finished step, on the disk before the next step begins. Whatever ends the process, a line that was
cut off is forgotten, and the step it stood for is done again. The first line says whose work it is.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpc.errors import CheckpointError
from qpc.output_directory import check_target, clear_retired, publish
from qpc.plain_files import parse_json

FORMAT = 1
"""Version of the journal."""


class WorkInProgress:
    """The unfinished work on one output directory.

    target: where it will be. directory: where it grows. entries: what the journal says is finished, in the order in which it was.
    """

    def __init__(self, target: Path) -> None:
        """target: an absolute path; see `working_on`."""
        self.target = target
        self.directory = target.with_name(f"{target.name}.partial")
        self.journal = target.with_name(f"{target.name}.journal")
        self.entries: list[dict[str, Any]] = []
        self._file = -1

    def record(self, **entry: Any) -> None:
        """Note a finished step; it is on the disk when this returns. Raises `CheckpointError` if it cannot be written."""
        try:
            _write_all(self._file, json.dumps(entry).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        self.entries.append(entry)

    def find(self, step: str) -> dict[str, Any] | None:
        """The last entry of a step, which is recorded as `step=...`."""
        return next((entry for entry in reversed(self.entries) if entry.get("step") == step), None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a disk that is full or broken into a `CheckpointError` that says how to go on."""
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def publish(self, overwrite: bool = False) -> None:
        """Put the directory in the place of the target, whole; the journal is then gone."""
        with self.writing():
            for path in self.directory.iterdir():
                _sync(path)
            _sync(self.directory)
        self.record(step="whole", overwrite=overwrite)
        self._move(overwrite)

    def _move(self, overwrite: bool) -> None:
        publish(self.directory, self.target, overwrite)
        clear_retired(self.target)
        with self.writing():
            _sync(self.target.parent)
            self.journal.unlink()

    def _open(self, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Lock the journal, read it, and drop a line that was cut off. Raises `CheckpointError` if it is of other work."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if not self.journal.exists():
            check_target(self.target, overwrite)
        self._file = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"another process is at work on {self.target}; wait for it, or end it") from None
        content = self.journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        try:
            self.entries = [dict(parse_json(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.journal} is damaged: {error}; remove {self.anew} to begin anew") from error
        if not self.entries:
            if self.directory.exists() and any(self.directory.iterdir()):
                self.journal.unlink()
                raise CheckpointError(f"{self.directory} is in the way, and there is no journal of what it is; remove it")
            self.directory.mkdir(exist_ok=True)
            self.record(format=FORMAT, **identity)
            _sync(self.target.parent)
            return
        known = self.entries[0]
        other = [key for key, value in ({"format": FORMAT} | dict(identity)).items() if known.get(key) != value]
        if other:
            told = "; ".join(f"{key} is {known.get(key)} there and {identity.get(key, FORMAT)} here" for key in other)
            raise CheckpointError(
                f"{self.directory} holds the unfinished work of another compile: {told}. "
                f"Give the same model and options to go on with it, or remove {self.anew} to begin anew"
            )

    @property
    def anew(self) -> str:
        """What to remove to begin anew."""
        return f"{self.journal} and {self.directory}"

    def _failed(self, error: OSError) -> CheckpointError:
        reason = error.strerror or error
        return CheckpointError(f"cannot write to {self.directory}: {reason}; make room and start again, it goes on where it is now")


@contextmanager
def working_on(target: Path, identity: Mapping[str, Any], overwrite: bool = False) -> Iterator[WorkInProgress | None]:
    """The work on a directory: begun, or gone on with; None if all that was left was to put it into its place, which is then done.

    identity: what decides the result, as JSON has it; work of another identity is refused.

    Raises `CheckpointError` if the target is taken (and not `overwrite`), its surroundings cannot be written, or another process is at it.
    """
    work = WorkInProgress(target.absolute())
    try:
        with work.writing():
            work._open(identity, overwrite)
        whole = work.find("whole")
        if whole is None:
            check_target(work.target, overwrite)
            yield work
            return
        if work.directory.exists():
            work._move(overwrite or whole["overwrite"])
        else:
            work.journal.unlink()
        yield None
    finally:
        if work._file >= 0:
            os.close(work._file)


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _sync(path: Path) -> None:
    """Let a file or directory be on the disk as it is now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
