"""Where a pure function of many arguments is evaluated: in this process, or spread over others (`qpc.cluster`)."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

K = TypeVar("K")
A = TypeVar("A")
R = TypeVar("R")


class Spread(Protocol):
    """Evaluates a function of a module for each of many items, and hands results out as they come, in any order.

    Items are asked for one after the other, as soon as there is room for them; so memory is bounded, whatever there are. Functions compute
    where the tensors of an item are, and their results do not depend on where that is.

    together: bytes of weights that are best packed at once; 0: one weight at a time. None: as many as memory allows.
    """

    @property
    def together(self) -> int | None:
        """As above."""

    def on(self, device: "torch.device") -> "Spread":
        """The same on devices of such a kind. Raises `SettingsError` if there are none."""

    def usual(self) -> "torch.device":
        """What functions are best spread over, if nobody says on which device."""

    def reads_to(self, device: "torch.device") -> "torch.device":
        """Where tensors are to be read in this process, for functions that compute on such a device."""

    def __call__(self, function: Callable[[A], R], items: Iterable[tuple[K, A]]) -> Iterator[tuple[K, R]]:
        """Pairs of the key of an item and its result. Raises what the function raises."""


class Here:
    """One item after the other, in this process."""

    together: int | None = None

    def on(self, device: "torch.device") -> "Here":
        return self

    def usual(self) -> "torch.device":
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def reads_to(self, device: "torch.device") -> "torch.device":
        return device

    def __call__(self, function: Callable[[A], R], items: Iterable[tuple[K, A]]) -> Iterator[tuple[K, R]]:
        for key, item in items:
            result = function(item)
            del item  # memory for the next
            yield key, result


HERE = Here()
