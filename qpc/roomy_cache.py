"""Keys and values of sequences whose length is known: room for all of them at once.

The caches of transformers are copied whenever a token comes, into memory that is a little larger each time, so that an allocator can use
little of it again.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer with what another one holds, and room for `length` tokens. What it returns are views."""

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        vars(self).update(vars(layer))
        assert layer.keys is not None and layer.values is not None
        self._rooms = [held.new_empty(*held.shape[:2], length, held.shape[3]) for held in (layer.keys, layer.values)]
        self._put(0, layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, n, width], and return all that there are."""
        return self._put(self.get_seq_length(), key_states, value_states)

    def _put(self, begin: int, *states: Tensor) -> tuple[Tensor, Tensor]:
        end = begin + states[0].shape[2]
        for room, new in zip(self._rooms, states, strict=True):
            room[:, :, begin:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values


def give_room(cache: Any, length: int) -> None:
    """Let the layers of a cache that a model returned hold so many tokens. Those that forget, or are of another kind, stay as they are."""
    layers: list[Any] = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.keys is not None:
            layers[number] = RoomyLayer(layer, length)
