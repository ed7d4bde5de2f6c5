"""`qpc::decode_attention` as an attention of transformers, for steps of one token.

A layer of the cache then gives new keys and values to it untouched, with the places for them, and it does all in one launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qpc.errors import ModelError
from qpc.integrations.static_cache import Deferred
from qpc.kernels import attention_ops as _ops  # noqa: F401 - importing it registers torch.ops.qpc

NAME = "qpc_decode"
"""Under which transformers know it. They make no mask for it."""

IGNORED = ("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "logits_to_keep", "is_causal")
"""Arguments that change nothing for one token."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Deferred,
    value: Deferred,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What models call. query: [batch, query heads, 1, width]; returns [batch, 1, query heads, width].

    Raises `ModelError` for what the operator does not compute, such as capped scores.
    """
    for name, given in others.items():
        if given is not None and name not in IGNORED:
            raise ModelError(f"attention with {name} has no kernel for generation")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = 0 if sliding_window is None else sliding_window
    places = (key.places, value.places, key.position, key.starts)
    return torch.ops.qpc.decode_attention(query, key.new, value.new, *places, None, None, scale, window), None


AttentionInterface.register(NAME, attend)


@contextmanager
def decode_attention(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model attend by it."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
