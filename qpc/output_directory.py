"""Directories that appear whole or not at all."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpc.errors import CheckpointError


@contextmanager
def replacing(directory: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory that takes the place of `directory` when the block ends without an exception, and vanishes otherwise.

    Raises `CheckpointError` if the place is taken (and not `overwrite`) or cannot be written.
    """
    target = check_target(directory, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror or error}; choose another output directory") from error
    try:
        partial.chmod(0o755)
        yield partial
        publish(partial, target, overwrite=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, target: Path, overwrite: bool = False) -> None:
    """Give a directory that is whole its final name.

    Raises `CheckpointError` if the place is taken (and not `overwrite`) or cannot be written.
    """
    check_target(target, overwrite)
    try:
        if not target.exists():
            partial.rename(target)
            return
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(retired / "old")
        partial.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror or error}") from error


def clear_retired(target: Path) -> None:
    """Remove what a process that was killed meanwhile has left of a directory that was replaced."""
    for retired in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        shutil.rmtree(retired, ignore_errors=True)


def check_target(directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The path, if a checkpoint may be written there; raises `CheckpointError` before any work is done."""
    target = Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; choose a directory")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(f"{target} is not empty; choose another directory or allow overwriting")
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CheckpointError(f"cannot write to {target}: {existing} is not a writable directory; choose another output directory")
    return target
