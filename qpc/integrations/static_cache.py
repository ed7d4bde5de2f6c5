"""Keys and values of a fixed number of places, which all layers fill at one position that is kept on the device.

The layers of transformers each count what they hold, which is a launch for every layer and step, and those of sliding windows count on the
host, so that a step would be compiled anew where they run full. Here every layer has all places and the mask does the rest.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer


class FixedLayer(StaticLayer):
    """Keys and values [batch, heads, length, head_dim] of one layer, zero at first. position: int64 [], where the next token goes."""

    def __init__(self, length: int, position: Tensor) -> None:
        super().__init__(length)  # type: ignore[no-untyped-call]
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [batch, heads, n, head_dim] from the position on, and return all places."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
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


def fixed_cache(layers: int, length: int, device: torch.device) -> tuple[Cache, Tensor]:
    """An empty cache of so many layers and places, and its position."""
    position = torch.zeros((), dtype=torch.int64, device=device)
    torch._dynamo.mark_static_address(position)
    return Cache(layers=[FixedLayer(length, position) for _ in range(layers)]), position
