"""Keys and values of a fixed number of places, which all layers fill at one position that is kept on the device.

The layers of transformers each count what they hold, which is a launch for every layer and step, and those of sliding windows count on the
host, so that a step would be compiled anew where they run full. Here every layer has all places and the mask does the rest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


@dataclass(frozen=True)
class Deferred:
    """Keys or values that were not written yet. new: [batch, heads, 1, width]. places: [batch, heads, length, width]. position: int64 [].
    starts: int64 [batch], the first place of each sequence."""

    new: Tensor
    places: Tensor
    position: Tensor
    starts: Tensor


class FixedLayer(StaticLayer):
    """Keys and values [batch, heads, length, width] of one layer, zero at first.

    position: int64 [], where the next token goes. starts: int64 [batch], the first place of each sequence. defers: whether `update` leaves
    the writing to the attention that reads what it returns.
    """

    def __init__(self, length: int, position: Tensor, starts: Tensor) -> None:
        super().__init__(length)  # type: ignore[no-untyped-call]
        self.position, self.starts = position, starts
        self.defers = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write keys and values [batch, heads, n, width] from the position on, and return all places; or both as `Deferred`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.defers:
            pairs = ((key_states, self.keys), (value_states, self.values))
            keys, values = (Deferred(new, places, self.position, self.starts) for new, places in pairs)
            return keys, values
        count = key_states.shape[-2]
        at = self.position[None] if count == 1 else torch.arange(count, device=self.position.device) + self.position
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> Any:
        """The position; a tensor, so that no step depends on its value."""
        return self.position

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        """All places, from the first on."""
        return self.max_cache_len, 0


class FixedCache(Cache):
    """The layers of a model, with one position and one vector of starts between them."""

    def __init__(self, layers: int, batch: int, length: int, device: torch.device) -> None:
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int64, device=device)
        torch._dynamo.mark_static_address(self.position)
        torch._dynamo.mark_static_address(self.starts)
        self.fixed = [FixedLayer(length, self.position, self.starts) for _ in range(layers)]
        super().__init__(layers=list(self.fixed))

    def defer(self, defers: bool) -> None:
        """Leave the writing to attention, or not."""
        for layer in self.fixed:
            layer.defers = defers
