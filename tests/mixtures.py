"""Tiny random mixtures of experts, for the tests of stacks: transformers 5 stores them as such, version 4 did not."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qpc
from tests.families import decoder

STACKED = pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) < 5, reason="experts are stacks from transformers 5 on")
EXPERTS = 4

MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": partial(decoder, "Mixtral", num_local_experts=EXPERTS, intermediate_size=64, num_hidden_layers=1),
    "qwen3_moe": partial(decoder, "Qwen3Moe", num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=64, num_hidden_layers=1),
    "gpt_oss": partial(decoder, "GptOss", num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=64, num_hidden_layers=1),
}
OPTIONS: dict[str, Any] = {"budget": 1.75, "effort": "fast", "calibration": None, "sensitivity": "random", "same_quantizer_in_group": True}
"""Of both doors. With few bits the windows of trellises are short, and their tables soon made."""


@cache
def compiled_mixture(name: str) -> tuple[nn.Module, nn.Module]:
    """A model and what `qpc.compile` makes of it. Nobody may change either."""
    model = MIXTURES[name]()
    return model, qpc.compile(model, **OPTIONS)


@cache
def fast_mixture(name: str) -> tuple[nn.Module, nn.Module]:
    """A model of its own and what `torch.compile` makes of it, to be packed when it first runs."""
    model = MIXTURES[name]()
    return model, torch.compile(model, backend="qpalette", fullgraph=True, options={**OPTIONS, "inner": "eager"})


def greedy(model: Callable[..., Any], config: Any, tokens: Tensor, steps: int, after: Callable[[], None] = lambda: None) -> Tensor:
    """The prompt and the tokens that follow it, one step after another on a cache of fixed length. after: is called after each step."""
    cache = transformers.StaticCache(config=config, max_cache_len=tokens.shape[1] + steps)
    found, given = tokens, tokens
    for _ in range(steps):
        with torch.no_grad():
            given = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
        found = torch.cat([found, given], dim=1)
        after()
    return found
