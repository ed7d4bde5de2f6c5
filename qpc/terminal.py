"""Progress on stderr: bars where somebody watches, a line now and then where a log does."""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_S = 15.0
"""Shortest time between two lines of progress in a log."""


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Drop what is written to the process's stdout meanwhile: HiGHS prints lines of its own there, and stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


class ProgressBars:
    """A `qpc.progress.Progress` to be used in a `with` block; one bar for each task."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.tasks: dict[str, TaskID] = {}
        self.last_line_s = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def __enter__(self) -> "ProgressBars":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def __call__(self, task: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `task` are finished."""
        if not self.console.is_terminal:
            self.line(task, done, total)
            return
        if task not in self.tasks:
            self.tasks[task] = self.bars.add_task(task, total=total)
        self.bars.update(self.tasks[task], completed=done, total=total)
        if done == total:
            self.bars.stop_task(self.tasks[task])
            del self.tasks[task]

    def line(self, task: str, done: int, total: int) -> None:
        """Write a line if the last one is long ago, so that short work stays silent."""
        if time.monotonic() - self.last_line_s >= LINE_INTERVAL_S:
            self.last_line_s = time.monotonic()
            print(f"{task} {done}/{total}", file=sys.stderr, flush=True)
