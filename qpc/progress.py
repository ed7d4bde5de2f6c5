"""How long work reports that it is alive, without knowing who listens."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called as `progress(task, done, total)`; `task` names one bar, `done == total` ends it."""


def silent(task: str, done: int, total: int) -> None:
    """The progress that nobody watches."""


def track(items: Iterable[T], task: str, total: int, progress: Progress) -> Iterator[T]:
    """Yield `items`, reporting after each one has been worked on."""
    progress(task, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(task, done, total)
